"""Multi-head attention: projections and positions. model/attend.py computes the attention; model/cache.py has the
caches.

Shapes: B batch, T queries, S keys, D width, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from model.attend import AttendSpec, keys_seen, layer_mask
from model.cache import ContiguousCache, LayerCache, RingCache, append
from model.config import ModelConfig
from model.context import ForwardContext
from model.norms import Norm
from model.positions import apply_rope
from model.weights import Axes, Weight, constant, normal, weight_std
from sharding.rules import ShardingRules


class MultiHeadAttention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention with all options of `AttentionConfig`."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, kind: str):
        self.config, self.rules, self.kind = config, rules, kind
        a, D = config.attention, config.embed_dim
        N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
        keys = jax.random.split(key, 4)
        std, out_std = weight_std(config, D), weight_std(config, N * H, residual=True)
        of_q, of_kv, of_out = ("embed", "heads", None), ("embed", "kv_heads", None), ("heads", None, "embed")
        self.q = normal(keys[0], (D, N, H), of_q, std, rules, name="attention.q")
        self.k = normal(keys[1], (D, K, H), of_kv, std, rules, name="attention.k")
        self.v = normal(keys[2], (D, K, H), of_kv, std, rules, name="attention.v")
        self.out = normal(keys[3], (N, H, D), of_out, out_std, rules, name="attention.out", inputs=2)

        def vector(name: str, shape: tuple[int, ...], axes: Axes, wanted: bool) -> Weight | None:
            return constant(shape, axes, 0.0, rules, name=f"attention.{name}") if wanted else None

        biased = a.bias != "none"
        self.q_bias = vector("q_bias", (N, H), of_q[1:], biased)
        self.k_bias = vector("k_bias", (K, H), of_kv[1:], biased)
        self.v_bias = vector("v_bias", (K, H), of_kv[1:], biased)
        self.out_bias = vector("out_bias", (D,), ("embed",), a.bias == "all")
        self.sinks = vector("sinks", (N,), ("heads",), a.sinks)
        shapes = {"none": None, "head": ((H,), (H,)), "full": ((N, H), (K, H))}[a.qk_norm]
        axes: tuple[Axes, Axes] = (of_q[1:], of_kv[1:]) if a.qk_norm == "full" else ((None,), (None,))
        self.q_norm = Norm(shapes[0], axes[0], config.norm, rules, "attention.q_norm") if shapes else None
        self.k_norm = Norm(shapes[1], axes[1], config.norm, rules, "attention.k_norm") if shapes else None

    @staticmethod
    def flops(config: ModelConfig, kind: str, length: int) -> float:
        """Return the forward FLOPs per token of a window of `length`, by the convention of model/cost.py."""
        a = config.attention
        matrices = config.embed_dim * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
        return 2 * matrices + 4 * a.num_heads * a.head_dim * keys_seen(config, kind, length)

    @staticmethod
    def divisibility(config: ModelConfig) -> list[tuple[str, str, int]]:
        """Return (field, logical axis, size) of every dimension that a mesh must divide."""
        a = config.attention
        return [
            ("model.attention.num_heads", "heads", a.num_heads),
            ("model.attention.num_kv_heads", "kv_heads", a.num_kv_heads),
        ]

    def init_cache(self, repeats: int, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
        """Return an empty cache for `repeats` stacked layers: a ring if the layer's window is shorter than
        `capacity`."""
        a, window = self.config.attention, layer_mask(self.config.attention, self.kind).window
        sizes = (a.head_dim, a.head_dim, dtype, self.rules)
        # ALiBi and dynamic NTK need keys in order of their index; a ring does not keep that order.
        ordered = self.config.position.kind == "alibi" or self._rope_after_cache()
        if window is not None and window < capacity and a.mask == "causal" and not ordered:
            return RingCache.empty(repeats, batch, a.num_kv_heads, window, *sizes)
        return ContiguousCache.empty(repeats, batch, a.num_kv_heads, capacity, *sizes)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: ForwardContext, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Return (output, the cache with this call's keys and values or None without a cache)."""
        config = self.config
        q = self._project(x_BTD, self.q, self.q_bias)
        k = self._project(x_BTD, self.k, self.k_bias)
        v = self._project(x_BTD, self.v, self.v_bias)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if (limit := config.attention.clip_qkv) is not None:
            q, k, v = (jnp.clip(value, -limit, limit) for value in (q, k, v))
        q, k, v = (checkpoint_name(value, "qkv") for value in (q, k, v))

        # Dynamic NTK changes the rotation of every key as the context grows, so its cache holds keys before rotation.
        rope_after_cache = self._rope_after_cache()
        length_B = ctx.length_B if rope_after_cache else None
        rotate_keys = lambda k_BSKH, positions_BS: apply_rope(config, self.kind, k_BSKH, positions_BS, length_B)
        q = apply_rope(config, self.kind, q, ctx.positions_BT, length_B)
        if not rope_after_cache:
            k = rotate_keys(k, ctx.positions_BT)
        sinks_N = None if self.sinks is None else self.sinks.gathered(jnp.float32)
        spec = AttendSpec(config, self.rules, self.kind, sinks_N, rotate_keys if rope_after_cache else None)
        keys, cache = append(cache, k, v, ctx)
        out = self.out.dot(keys.attend(q, ctx, spec), ("batch", "sequence"))
        if self.out_bias is not None:
            out = out + self.out_bias.gathered(x_BTD.dtype)
        return checkpoint_name(out, "attention_out"), cache

    def _rope_after_cache(self) -> bool:
        scaling = self.config.position.scaling
        return scaling is not None and scaling.kind == "dynamic_ntk"

    def _project(self, x_BTD: Array, weight: Weight, bias: Weight | None) -> Array:
        y = weight.dot(x_BTD, ("batch", "sequence"))
        return y if bias is None else y + bias.gathered(x_BTD.dtype)
