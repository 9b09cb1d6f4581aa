"""Multi-head latent attention (DeepSeek-V2, sec. 2.1): keys and values of all heads come from one small vector per
token.

For whole rows, the latents are projected to N keys and values, and attention runs as for other heads. A cache holds
only latents, and decoding uses absorbed projections: each head's queries are multiplied by its key matrix, so that the
latents serve as one key shared by all heads; the attended latents are then multiplied by the value matrix (sec. 2.1.2:
the same product in another order). The Triton kernel of decode_attention supports head dimensions up to 256, so on GPUs
absorbed decoding at the published C = 576 runs in plain JAX.

Shapes: B batch, T queries, S keys, D width, N heads, H head dimension, P its last part, which RoPE rotates, V value
dimension, Q rank of the queries, R rank of keys and values, C = R + P numbers per token in the cache.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from model.attend import AttendSpec, LatentProjections, keys_seen
from model.cache import LatentCache, LayerCache, append
from model.config import ModelConfig
from model.context import ForwardContext
from model.norms import Norm
from model.positions import apply_rope
from model.weights import Axes, Weight, constant, normal, weight_std
from sharding.rules import ShardingRules, activation_spec

# Epsilon of the latents' norms in the published code, independent of the model's epsilon (Moonlight: 1e-5).
NORM_EPSILON = 1e-6


class LatentAttention(nnx.Module):
    """Latent attention by `AttentionConfig.latent`. Heads are sharded over devices; latents and their cache are
    replicated."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, kind: str):
        latent = config.attention.latent
        assert latent is not None
        self.config, self.rules, self.kind, self.latent = config, rules, kind, latent
        a, D = config.attention, config.embed_dim
        N, H, P, V, Q, R = a.num_heads, a.head_dim, latent.rope_dim, latent.value_dim, latent.q_rank, latent.kv_rank
        norm = replace(config.norm, epsilon=NORM_EPSILON)
        keys = jax.random.split(key, 6)

        def matrix(i: int, name: str, shape: tuple[int, ...], axes: Axes) -> Weight:
            return normal(keys[i], shape, axes, weight_std(config, shape[0]), rules, name=f"attention.{name}")

        def vector(name: str, size: int, axis: str | None, wanted: bool) -> Weight | None:
            return constant((size,), (axis,), 0.0, rules, name=f"attention.{name}") if wanted else None

        up_axes: Axes = ("rank", "heads", None)
        self.q_down = None if Q is None else matrix(0, "q_down", (D, Q), ("embed", None))
        self.q_down_norm = None if Q is None else Norm((Q,), (None,), norm, rules, "attention.q_down_norm")
        self.q = matrix(1, "q", (Q or D, N, H), ("embed", "heads", None) if Q is None else up_axes)
        self.kv_down = matrix(2, "kv_down", (D, R + P), ("embed", None))
        self.kv_down_norm = Norm((R,), (None,), norm, rules, "attention.kv_down_norm")
        self.k_up = matrix(3, "k_up", (R, N, H - P), up_axes)
        self.v_up = matrix(4, "v_up", (R, N, V), up_axes)
        out_std, out_axes = weight_std(config, N * V, residual=True), ("heads", None, "embed")
        self.out = normal(keys[5], (N, V, D), out_axes, out_std, rules, name="attention.out", inputs=2)
        biased = a.bias != "none"
        self.q_down_bias = vector("q_down_bias", Q or 0, None, biased and Q is not None)
        self.kv_down_bias = vector("kv_down_bias", R + P, None, biased)
        self.out_bias = vector("out_bias", D, "embed", a.bias == "all")
        self.sinks = vector("sinks", N, "heads", a.sinks)

    @staticmethod
    def flops(config: ModelConfig, kind: str, length: int) -> float:
        """Return the forward FLOPs per token of a window of `length`, by the convention of model/cost.py."""
        a, D, latent = config.attention, config.embed_dim, config.attention.latent
        assert latent is not None
        N, H, V, P, R = a.num_heads, a.head_dim, latent.value_dim, latent.rope_dim, latent.kv_rank
        queries = D * N * H if latent.q_rank is None else latent.q_rank * (D + N * H)
        matrices = queries + D * (R + P) + R * N * (H - P + V) + N * V * D
        return 2 * matrices + 2 * N * (H + V) * keys_seen(config, kind, length)

    @staticmethod
    def divisibility(config: ModelConfig) -> list[tuple[str, str, int]]:
        """Return (field, logical axis, size) of every dimension that a mesh must divide."""
        a, latent = config.attention, config.attention.latent
        assert latent is not None
        return [
            ("model.attention.num_heads", "heads", a.num_heads),
            # Ranks are sharded like the width.
            ("model.attention.latent.kv_rank", "embed", latent.kv_rank),
            ("model.attention.latent.q_rank", "embed", latent.q_rank or config.embed_dim),
        ]

    def init_cache(self, repeats: int, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
        """Return an empty cache for `repeats` stacked layers."""
        width = self.latent.kv_rank + self.latent.rope_dim
        return LatentCache.empty(repeats, batch, capacity, width, dtype, self.rules)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: ForwardContext, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Return (output, the cache with this call's latents or None without a cache)."""
        q_BTNH, latent_BTC = self._queries(x_BTD, ctx), self._latents(x_BTD, ctx)
        sinks_N = None if self.sinks is None else self.sinks.gathered(jnp.float32)
        sequence = "sequence" if cache is None else None  # each device caches its rows unsharded
        projections = LatentProjections(lambda latents: self._expand(latents, sequence), self._absorb, self._project)
        spec = AttendSpec(self.config, self.rules, self.kind, sinks_N, latent=projections)
        keys, cache = append(cache, latent_BTC, None, ctx)
        out_BTD = self.out.dot(keys.attend(q_BTNH, ctx, spec), ("batch", "sequence"))
        if self.out_bias is not None:
            out_BTD = out_BTD + self.out_bias.gathered(x_BTD.dtype)
        return checkpoint_name(out_BTD, "attention_out"), cache

    def _queries(self, x_BTD: Array, ctx: ForwardContext) -> Array:
        """Return the queries of each head, [B, T, N, H], the last P numbers rotated."""
        nope = self.config.attention.head_dim - self.latent.rope_dim
        if self.q_down is None:
            q_BTNH = checkpoint_name(self.q.dot(x_BTD, ("batch", "sequence")), "qkv")
        else:
            assert self.q_down_norm is not None
            down_BTQ = checkpoint_name(self._down(x_BTD, self.q_down, self.q_down_bias), "qkv")
            q_BTNH = self.q.dot(self.q_down_norm(down_BTQ), ("batch", "sequence"))
        rotated_BTNP = apply_rope(self.config, self.kind, q_BTNH[..., nope:], ctx.positions_BT, None)
        return jnp.concatenate((q_BTNH[..., :nope], rotated_BTNP), axis=-1)

    def _latents(self, x_BTD: Array, ctx: ForwardContext) -> Array:
        """Return the cache entries of the tokens, [B, T, C]: the normalized latent, and the rotated key that the heads
        share."""
        R = self.latent.kv_rank
        # Keys and values are computed from this projection, so it is the value for remat to keep. The rest is cheap to
        # recompute.
        down_BTC = checkpoint_name(self._down(x_BTD, self.kv_down, self.kv_down_bias), "qkv")
        rotated_BT1P = apply_rope(self.config, self.kind, down_BTC[..., None, R:], ctx.positions_BT, None)
        return jnp.concatenate((self.kv_down_norm(down_BTC[..., :R]), rotated_BT1P[..., 0, :]), axis=-1)

    def _expand(self, latent_BSC: Array, sequence: str | None) -> tuple[Array, Array]:
        """Return keys [B, S, N, H] and values [B, S, N, V] of every head."""
        R, lead = self.latent.kv_rank, ("batch", sequence)
        latent_BSR, shared_BS1P = latent_BSC[..., :R], latent_BSC[..., None, R:]
        k_BSNX, v_BSNV = self.k_up.dot(latent_BSR, lead), self.v_up.dot(latent_BSR, lead)
        shape = (*k_BSNX.shape[:-1], self.latent.rope_dim)
        spec = activation_spec(self.rules, *lead, "heads", None)
        shared_BSNP = jnp.broadcast_to(shared_BS1P, shape, out_sharding=spec)
        return jnp.concatenate((k_BSNX, shared_BSNP), axis=-1), v_BSNV

    def _absorb(self, q_BTNH: Array) -> Array:
        """Return queries in the latent space, [B, T, N, C]: each head's queries times its key matrix."""
        nope = self.config.attention.head_dim - self.latent.rope_dim
        spec = activation_spec(self.rules, "batch", "sequence", "heads", None)
        k_RNX = self.k_up.gathered(q_BTNH.dtype)
        q_BTNR = jnp.einsum("btnx,rnx->btnr", q_BTNH[..., :nope], k_RNX, out_sharding=spec)
        return jnp.concatenate((q_BTNR, q_BTNH[..., nope:]), axis=-1)

    def _project(self, attended_BTNC: Array) -> Array:
        """Return the values [B, T, N, V] of attended latents: each head's latents times its value matrix."""
        spec = activation_spec(self.rules, "batch", "sequence", "heads", None)
        attended_BTNR, v_RNV = attended_BTNC[..., : self.latent.kv_rank], self.v_up.gathered(attended_BTNC.dtype)
        return jnp.einsum("btnr,rnv->btnv", attended_BTNR, v_RNV, out_sharding=spec)

    def _down(self, x_BTD: Array, weight: Weight, bias: Weight | None) -> Array:
        y = weight.dot(x_BTD, ("batch", "sequence"))
        return y if bias is None else y + bias.gathered(x_BTD.dtype)
