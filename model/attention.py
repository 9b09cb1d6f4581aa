"""The attention layer: projections, positions, cache; the attention itself is in attend.py.

Shapes: B batch, T queries, S keys, D width, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model.attend import LayerCache, Places, attend, attend_cache
from model.config import ModelConfig
from model.norms import Norm
from model.positions import rope_tables, rotate
from model.weights import constant, matmul, normal, use
from sharding.rules import ShardingRules, activation_spec, reshard


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention with every published option of `AttentionConfig`."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, layer: str):
        self.config, self.rules, self.layer = config, rules, layer
        a, D = config.attention, config.embed_dim
        N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
        keys = jax.random.split(key, 4)
        std, out_std = weight_std(config, D), weight_std(config, N * H, residual=True)
        self.q = normal(keys[0], (D, N, H), ("embed", "heads", None), std, rules)
        self.k = normal(keys[1], (D, K, H), ("embed", "kv_heads", None), std, rules)
        self.v = normal(keys[2], (D, K, H), ("embed", "kv_heads", None), std, rules)
        self.out = normal(keys[3], (N, H, D), ("heads", None, "embed"), out_std, rules)
        biased = a.bias != "none"
        self.q_bias = constant((N, H), ("heads", None), 0.0, rules) if biased else None
        self.k_bias = constant((K, H), ("kv_heads", None), 0.0, rules) if biased else None
        self.v_bias = constant((K, H), ("kv_heads", None), 0.0, rules) if biased else None
        self.out_bias = constant((D,), ("embed",), 0.0, rules) if a.bias == "all" else None
        self.sinks = constant((N,), ("heads",), 0.0, rules) if a.sinks else None
        shapes = {"none": None, "head": ((H,), (H,)), "full": ((N, H), (K, H))}[a.qk_norm]
        axes = (("heads", None), ("kv_heads", None)) if a.qk_norm == "full" else ((None,), (None,))
        self.q_norm = Norm(shapes[0], axes[0], config.norm, rules) if shapes else None
        self.k_norm = Norm(shapes[1], axes[1], config.norm, rules) if shapes else None

    def empty_cache(self, repeats: int, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
        """A cache for a stack of `repeats` such layers."""
        shape = (repeats, batch, self.config.attention.num_kv_heads, capacity, self.config.attention.head_dim)
        spec = activation_spec(self.rules, "layer", "batch", "kv_heads", None, None)
        return LayerCache(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))

    def __call__(
        self, x_BTD: Float[Array, "B T D"], places: Places, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The output and, if one was given, the cache with this call's keys and values at `places.slots_BT[:, 0]`
        on."""
        config, rules = self.config, self.rules
        dtype = x_BTD.dtype
        q = self._project(x_BTD, self.q, self.q_bias, "heads")
        k = self._project(x_BTD, self.k, self.k_bias, "kv_heads")
        v = self._project(x_BTD, self.v, self.v_bias, "kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if (limit := config.attention.clip_qkv) is not None:
            q, k, v = (jnp.clip(value, -limit, limit) for value in (q, k, v))
        q, k, v = (checkpoint_name(value, "qkv") for value in (q, k, v))

        # Dynamic NTK turns every key anew when the context grows, so its cache holds keys that are not yet turned.
        late = config.position.scaling is not None and config.position.scaling.kind == "dynamic_ntk"
        length_B = places.length_B if late else None
        q = turn(config, self.layer, q, places.positions_BT, length_B)
        if not late:
            k = turn(config, self.layer, k, places.positions_BT, None)
        sinks_N = None if self.sinks is None else use(self.sinks, ("heads",), jnp.float32, rules)
        if cache is None:
            if late:
                k = turn(config, self.layer, k, places.positions_BT, length_B)
            out_BTNH = attend(config, rules, self.layer, q, k, v, sinks_N, places)
        else:
            k_BKTH, v_BKTH = (reshard(y, rules, "batch", None, "kv_heads", None).transpose(0, 2, 1, 3) for y in (k, v))
            start_BK = jnp.broadcast_to(places.slots_BT[:, :1], k_BKTH.shape[:2])
            start_BK = reshard(start_BK, rules, "batch", "kv_heads")
            cache = LayerCache(write_cache(cache.k_BKSH, k_BKTH, start_BK), write_cache(cache.v_BKSH, v_BKTH, start_BK))
            seen = cache
            if late:
                slots_BS = jnp.broadcast_to(
                    jnp.arange(cache.k_BKSH.shape[2], dtype=jnp.int32), (k.shape[0], cache.k_BKSH.shape[2])
                )
                turned = turn(config, self.layer, cache.k_BKSH.transpose(0, 2, 1, 3).astype(dtype), slots_BS, length_B)
                seen = LayerCache(turned.transpose(0, 2, 1, 3), cache.v_BKSH)
            out_BTNH = attend_cache(config, rules, self.layer, q, seen, sinks_N, places)
        out = matmul(
            out_BTNH, use(self.out, ("heads", None, "embed"), dtype, rules), 2, ("batch", "sequence", "embed"), rules
        )
        if self.out_bias is not None:
            out = out + use(self.out_bias, ("embed",), dtype, rules)
        return checkpoint_name(out, "attention_out"), cache

    def _project(self, x_BTD: Array, weight: nnx.Param, bias: nnx.Param | None, heads: str) -> Array:
        w = use(weight, ("embed", heads, None), x_BTD.dtype, self.rules)
        y = matmul(x_BTD, w, 1, ("batch", "sequence", heads, None), self.rules)
        return y if bias is None else y + use(bias, (heads, None), x_BTD.dtype, self.rules)


def weight_std(config: ModelConfig, fan_in: int, residual: bool = False) -> float:
    """Standard deviation of a matrix with `fan_in` inputs; `residual`: its output is added to the residual stream."""
    init = config.init
    std = init.scale * fan_in**-0.5 if init.scheme == "fan_in" else init.scale
    if residual and init.residual != "none":
        std *= (2 * config.num_layers) ** -0.5 if init.residual == "depth" else 0.0
    return std


def turn(
    config: ModelConfig,
    layer: str,
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "B T"],
    length_B: Int[Array, "B"] | None,
) -> Float[Array, "B T N H"]:
    """The first `rotary_dim` dimensions of each head turned by RoPE as a layer of kind `layer` does; without RoPE, as
    they are."""
    if config.position.kind != "rope":
        return x_BTNH
    # The barrier keeps XLA from computing sines anew for every head and every use.
    cos_BTR, sin_BTR = jax.lax.optimization_barrier(
        rope_tables(config, positions_BT, length_B, local=layer == "sliding")
    )
    return rotate(x_BTNH, cos_BTR, sin_BTR, config.position.interleaved)


def write_cache(cache_BKSH: Array, new_BKTH: Array, start_BK: Array) -> Array:
    """The cache with each row's new entries at its own start.

    Each head has a start, though those of a row are equal, so that XLA makes a scatter of it, which is done in place.
    To a batch of one it would give a dynamic_update_slice, fuse that into each reader, and copy the cache to keep its
    old state.
    """
    write = lambda cache_SH, new_TH, start: jax.lax.dynamic_update_slice_in_dim(cache_SH, new_TH, start, axis=0)
    return jax.vmap(jax.vmap(write))(cache_BKSH, new_BKTH.astype(cache_BKSH.dtype), start_BK)
