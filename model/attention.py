"""Attention: projections, positions, cache, and the plain tiled-by-nothing reference of the attention itself.

Shapes: B batch, T queries, S keys, D width, N query heads, K key/value heads, G = N / K, H head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from model.config import AttentionConfig, ModelConfig
from model.norms import Norm
from model.positions import alibi_slopes, rope_tables, rotate
from model.weights import constant, matmul, normal, use
from sharding.rules import ShardingRules, no_mesh, reshard

MASKED = -1e30  # finite: a row that sees nothing gives equal weights, never NaN
CAUSAL_ROWS, CAUSAL_BLOCKS = 64, 8  # queries that share the keys they are multiplied with: at least, and such blocks at most


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query sees, as a function of their places in the row."""

    mask: str  # causal | bidirectional | prefix
    layer: str  # global | sliding | block_sparse
    window: int
    block_size: int
    local_blocks: int
    block_stride: int


class Places(NamedTuple):
    """Where the queries of a call stand."""

    slots_BT: Int[Array, "B T"]  # index in the row (in the cache, when there is one)
    positions_BT: Int[Array, "B T"]  # what RoPE and learned positions see; restarts with each packed document
    segment_ids_BT: Int[Array, "B T"] | None = None  # tokens attend within their segment only; 0 is padding
    prefix_BT: Bool[Array, "B T"] | None = None  # part of the bidirectional prefix
    length_B: Int[Array, "B"] | None = None  # context of each row, this call's tokens included; for 'dynamic_ntk'


class LayerCache(NamedTuple):
    """Keys and values of one layer. A key's slot is its index; slots at and beyond the row's length hold garbage."""

    k_BKSH: Float[Array, "B K S H"]
    v_BKSH: Float[Array, "B K S H"]


def visible(
    spec: MaskSpec,
    q_slots_BT: Int[Array, "B T"],
    k_slots_BS: Int[Array, "B S"],
    q_positions_BT: Int[Array, "B T"],
    k_positions_BS: Int[Array, "B S"],
    q_segments_BT: Int[Array, "B T"] | None = None,
    k_segments_BS: Int[Array, "B S"] | None = None,
    k_prefix_BS: Bool[Array, "B S"] | None = None,
) -> Bool[Array, "B T S"]:
    """True where the query may see the key. Order and distance go by slots; blocks of a block-sparse pattern by positions,
    so that they start anew with each packed document."""
    q, k = q_slots_BT[:, :, None], k_slots_BS[:, None, :]
    if spec.mask == "bidirectional":
        seen = jnp.broadcast_to(jnp.bool_(True), (q_slots_BT.shape[0], q.shape[1], k.shape[2]))
    else:
        seen = k <= q
    if spec.layer == "sliding":
        seen &= q - k < spec.window
        if spec.mask == "bidirectional":
            seen &= k - q < spec.window
    if spec.layer == "block_sparse":
        q_block, k_block = q_positions_BT[:, :, None] // spec.block_size, k_positions_BS[:, None, :] // spec.block_size
        near = jnp.abs(q_block - k_block) < spec.local_blocks
        seen &= near | (k_block % spec.block_stride == spec.block_stride - 1)
    if spec.mask == "prefix" and k_prefix_BS is not None:
        seen |= k_prefix_BS[:, None, :]
    if q_segments_BT is not None and k_segments_BS is not None:
        seen &= q_segments_BT[:, :, None] == k_segments_BS[:, None, :]
    return seen


def dot_product_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    seen_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float | None = None,
    distance_BTS: Float[Array, "B T S"] | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    causal: bool = False,
) -> Float[Array, "B T N H"]:
    """softmax(q k^T * scale) v over the keys that are seen; softmax in float32.

    `softcap`: cap * tanh(logits / cap) before the mask. `distance_BTS`: ALiBi adds -slope * distance. `sinks_N`: logits
    of a key that is always seen and whose value is zero. `causal` promises that query t sees no key after t: without a
    mesh, most of the masked half is then not computed.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKSH.shape[1]
    grouped = None
    if not no_mesh():  # said, because jax 0.12 would move the heads' axis to the groups where there is one key head
        batch, time, _, width = jax.typeof(q_BTNH).sharding.spec
        grouped = jax.sharding.PartitionSpec(batch, time, jax.typeof(k_BKSH).sharding.spec[1], None, width)
    q_BTKGH = jnp.reshape(q_BTNH * scale, (B, T, K, N // K, H), out_sharding=grouped)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    slopes_KG = jnp.asarray(alibi_slopes(N)).reshape(K, N // K)
    sinks_KG = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(K, N // K)

    def rows(start: int, end: int, keys: int) -> Array:
        """The queries from `start` to `end` over the first `keys` keys."""
        logits = jnp.einsum(
            "bkgth,bksh->bkgts", q_BKGTH[..., start:end, :], k_BKSH[:, :, :keys], preferred_element_type=jnp.float32
        )
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if distance_BTS is not None:
            logits = logits - slopes_KG[..., None, None] * distance_BTS[:, None, None, start:end, :keys]
        logits = jnp.where(seen_BTS[:, None, None, start:end, :keys], logits, MASKED)
        top = logits.max(-1, keepdims=True)
        if sinks_KG is not None:
            top = jnp.maximum(top, sinks_KG[..., None, None])
        top = jax.lax.stop_gradient(top)
        weights = jnp.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        if sinks_KG is not None:
            total = total + jnp.exp(sinks_KG[..., None, None] - top)
        # Divided here rather than in the weights: H numbers a row, not S.
        out = jnp.einsum(
            "bkgts,bksh->bkgth", weights.astype(v_BKSH.dtype), v_BKSH[:, :, :keys], preferred_element_type=jnp.float32
        )
        return (out / total).astype(v_BKSH.dtype)

    if causal and no_mesh():
        size = max(CAUSAL_ROWS, -(-T // CAUSAL_BLOCKS))
        bounds = [(start, min(start + size, T)) for start in range(0, T, size)]
        out_BKGTH = jnp.concatenate([rows(start, end, end) for start, end in bounds], axis=3)
    else:
        out_BKGTH = rows(0, T, k_BKSH.shape[2])
    return jnp.reshape(
        out_BKGTH.transpose(0, 3, 1, 2, 4), (B, T, N, H), out_sharding=None if no_mesh() else jax.typeof(q_BTNH).sharding.spec
    )


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
        self.q_bias = constant((N, H), ("heads", None), 0.0, rules) if a.qkv_bias else None
        self.k_bias = constant((K, H), ("kv_heads", None), 0.0, rules) if a.qkv_bias else None
        self.v_bias = constant((K, H), ("kv_heads", None), 0.0, rules) if a.qkv_bias else None
        self.out_bias = constant((D,), ("embed",), 0.0, rules) if a.out_bias else None
        self.sinks = constant((N,), ("heads",), 0.0, rules) if a.sinks else None
        shapes = {"none": None, "head": ((H,), (H,)), "full": ((N, H), (K, H))}[a.qk_norm]
        axes = (("heads", None), ("kv_heads", None)) if a.qk_norm == "full" else ((None,), (None,))
        self.q_norm = Norm(shapes[0], axes[0], config.norm, rules) if shapes else None
        self.k_norm = Norm(shapes[1], axes[1], config.norm, rules) if shapes else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], places: Places, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """The output and, if one was given, the cache with this call's keys and values at `places.slots_BT[:, 0]` on."""
        config, rules, a = self.config, self.rules, self.config.attention
        dtype = x_BTD.dtype
        q = self._project(x_BTD, self.q, self.q_bias, "heads")
        k = self._project(x_BTD, self.k, self.k_bias, "kv_heads")
        v = self._project(x_BTD, self.v, self.v_bias, "kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (checkpoint_name(value, "qkv") for value in (q, k, v))

        # Dynamic NTK turns every key anew when the context grows, so its cache holds keys that are not yet turned.
        late = config.position.scaling is not None and config.position.scaling.kind == "dynamic_ntk"
        length_B = places.length_B if late else None
        q = self._turn(q, places.positions_BT, length_B)
        if not late:
            k = self._turn(k, places.positions_BT, None)
        # Keys and values of the whole row for each query: gathered where a row is spread over devices.
        k_BKSH, v_BKSH = (
            reshard(y, rules, "batch", None, "kv_heads", None).transpose(0, 2, 1, 3) for y in (k, v)
        )
        k_slots_BS, k_segments_BS, k_positions_BS = places.slots_BT, places.segment_ids_BT, places.positions_BT
        k_prefix_BS = places.prefix_BT
        if cache is not None:
            start_BK = jnp.broadcast_to(places.slots_BT[:, :1], k_BKSH.shape[:2])
            start_BK = reshard(start_BK, rules, "batch", "kv_heads")
            cache = LayerCache(_write(cache.k_BKSH, k_BKSH, start_BK), _write(cache.v_BKSH, v_BKSH, start_BK))
            k_BKSH, v_BKSH = cache.k_BKSH.astype(dtype), cache.v_BKSH.astype(dtype)
            B, _, S, _ = k_BKSH.shape
            k_slots_BS = k_positions_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
            k_segments_BS = None
            if k_prefix_BS is not None:
                k_prefix_BS = jnp.pad(k_prefix_BS, ((0, 0), (0, S - k_prefix_BS.shape[1])))
        if late:
            k_BKSH = self._turn(k_BKSH.transpose(0, 2, 1, 3), k_positions_BS, length_B).transpose(0, 2, 1, 3)

        seen_BTS = visible(
            mask_spec(a, self.layer),
            places.slots_BT,
            reshard(k_slots_BS, rules, "batch", None),
            places.positions_BT,
            reshard(k_positions_BS, rules, "batch", None),
            places.segment_ids_BT,
            None if k_segments_BS is None else reshard(k_segments_BS, rules, "batch", None),
            None if k_prefix_BS is None else reshard(k_prefix_BS, rules, "batch", None),
        )
        distance = None
        if config.position.kind == "alibi":
            distance = jnp.abs(places.slots_BT[:, :, None] - reshard(k_slots_BS, rules, "batch", None)[:, None, :])
            distance = distance.astype(jnp.float32)
        out_BTNH = dot_product_attention(
            q,
            k_BKSH,
            v_BKSH,
            seen_BTS,
            scale=a.head_dim**-0.5 if a.query_scale is None else a.query_scale,
            softcap=a.softcap,
            distance_BTS=distance,
            sinks_N=None if self.sinks is None else use(self.sinks, ("heads",), jnp.float32, rules),
            causal=a.mask == "causal" and cache is None,
        )
        out = matmul(out_BTNH, use(self.out, ("heads", None, "embed"), dtype, rules), 2, ("batch", "sequence", "embed"), rules)
        if self.out_bias is not None:
            out = out + use(self.out_bias, ("embed",), dtype, rules)
        return checkpoint_name(out, "attention_out"), cache

    def _project(self, x_BTD: Array, weight: nnx.Param, bias: nnx.Param | None, heads: str) -> Array:
        w = use(weight, ("embed", heads, None), x_BTD.dtype, self.rules)
        y = matmul(x_BTD, w, 1, ("batch", "sequence", heads, None), self.rules)
        return y if bias is None else y + use(bias, (heads, None), x_BTD.dtype, self.rules)

    def _turn(self, x_BTNH: Array, positions_BT: Array, length_B: Array | None) -> Array:
        p = self.config.position
        if p.kind != "rope":
            return x_BTNH
        theta = p.local_theta if self.layer == "sliding" and p.local_theta is not None else p.theta
        # The barrier keeps XLA from computing sines anew for every head and every use.
        cos_BTR, sin_BTR = jax.lax.optimization_barrier(rope_tables(self.config, positions_BT, theta, length_B))
        return rotate(x_BTNH, cos_BTR, sin_BTR, p.interleaved)


def mask_spec(a: AttentionConfig, layer: str) -> MaskSpec:
    """The mask of a layer of kind `layer`."""
    return MaskSpec(a.mask, layer, a.window, a.block_size, a.local_blocks, a.block_stride)


def weight_std(config: ModelConfig, fan_in: int, residual: bool = False) -> float:
    """Standard deviation of a matrix with `fan_in` inputs; `residual`: its output is added to the residual stream."""
    init = config.init
    std = init.scale * fan_in**-0.5 if init.scheme == "fan_in" else init.scale
    if residual and init.residual != "none":
        std *= (2 * config.num_layers) ** -0.5 if init.residual == "depth" else 0.0
    return std


def _write(cache_BKSH: Array, new_BKTH: Array, start_BK: Array) -> Array:
    """The cache with each row's new entries at its own start.

    Each head has a start, though those of a row are equal, so that XLA makes a scatter of it, which is done in place. To a
    batch of one it would give a dynamic_update_slice, fuse that into each reader, and copy the cache to keep its old state.
    """
    write = lambda cache_SH, new_TH, start: jax.lax.dynamic_update_slice_in_dim(cache_SH, new_TH, start, axis=0)
    return jax.vmap(jax.vmap(write))(cache_BKSH, new_BKTH.astype(cache_BKSH.dtype), start_BK)
