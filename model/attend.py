"""Attention of one layer: choose its mask, divide the work over the devices of a mesh, and call a kernel.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import AttentionConfig, ModelConfig
from model.context import ForwardContext
from model.positions import alibi_slopes
from pallas_kernels.decode_attention import MAX_QUERIES, decode_attention
from pallas_kernels.flash_attention import Mask, Strided, flash_attention, flash_attention_backward
from sharding.ring import ring_attention
from sharding.rules import ShardingRules, no_mesh, reshard
from sharding.ulysses import ulysses_attention


@dataclass(frozen=True, eq=False)
class LatentProjections:
    """The projections that read a latent cache. model/attention/latent.py explains the shapes."""

    expand: Callable[[Array], tuple[Array, Array]]  # latents [B, S, C] -> keys [B, S, N, H], values [B, S, N, V]
    absorb: Callable[[Array], Array]  # queries [B, T, N, H] -> queries in the latent space [B, T, N, C]
    project: Callable[[Array], Array]  # attended latents [B, T, N, C] -> [B, T, N, V]


@dataclass(frozen=True, eq=False)
class AttendSpec:
    """The attention settings of one layer: all that a cache needs besides queries, keys and values."""

    config: ModelConfig
    rules: ShardingRules
    kind: str  # kind of the layer: 'global', 'sliding', 'block_sparse' or a user's variant
    sinks_N: Float[Array, "N"] | None = None
    # Rotates cached keys [B, S, N, H] at positions [B, S]; set for layers whose rotation changes as the context grows.
    rope_after_cache: Callable[[Array, Array], Array] | None = None
    latent: LatentProjections | None = None

    @property
    def mask(self) -> Mask:
        return layer_mask(self.config.attention, self.kind)

    def few(self, queries: int) -> bool:
        """Return whether `decode_attention` can attend from this number of new tokens."""
        a = self.config.attention
        switched_on = a.decode_implementation != "off" and (
            a.implementation == "auto" or a.decode_implementation != "auto"
        )
        return switched_on and queries <= MAX_QUERIES and a.mask == "causal" and self.mask.strided is None


def layer_mask(a: AttentionConfig, kind: str) -> Mask:
    """Return the mask of a layer of kind `kind`.

    Causal order and window distance use the index in the row. Block-sparse patterns use positions, so that their blocks
    restart with each packed document.
    """
    strided = Strided(*a.blocks) if kind == "block_sparse" else None
    return Mask(a.mask != "bidirectional", a.window if kind == "sliding" else None, strided)


def attend_rows(
    spec: AttendSpec,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K V"],
    ctx: ForwardContext,
) -> Float[Array, "B T N V"]:
    """Return the attention of each query over the keys of its row that the layer's mask makes visible.

    A mesh divides batch and heads. If it also shards the sequence, `config.attention.context_parallel` chooses whether
    keys are gathered, passed around a ring, or exchanged for heads.
    """
    config, rules, a, mask = spec.config, spec.rules, spec.config.attention, spec.mask
    segments_BT, prefix_BT = ctx.segment_ids_BT, ctx.prefix_BT if a.mask == "prefix" else None
    positions_BT = ctx.positions_BT if mask.strided is not None else None
    rows, gathered_rows = ("batch", "sequence"), ("batch", None)
    heads = ((spec.sinks_N, ("heads",)), (_slopes(config), ("heads",)))

    if _sequence_sharded(rules) and a.context_parallel != "gather":
        if len(rules.activations.sequence) > 1:
            raise ValueError(
                f"model.attention.context_parallel = {a.context_parallel!r}: needs the sequence on one mesh axis, but "
                f"sharding.activations.sequence = {rules.activations.sequence}. Name one axis, or use 'gather'"
            )
        return _on_devices(
            (_ring if a.context_parallel == "ring" else _ulysses)(config, rules, mask), rules, (*rows, "heads", None),
            (q_BTNH, (*rows, "heads", None)), (k_BSKH, (*rows, "kv_heads", None)), (v_BSKH, (*rows, "kv_heads", None)),
            *heads, (segments_BT, rows),
        )  # fmt: skip

    def local(q, k, v, sinks, alibi, q_segments, k_segments, q_positions, k_positions, prefix):
        return flash_attention(
            q, *_heads_of(q, k, v, a, rules), mask=mask, offset=_first_index(q, rules),
            segment_ids=None if q_segments is None else (q_segments, k_segments),
            positions=None if q_positions is None else (q_positions, k_positions),
            prefix_BS=prefix, alibi_N=alibi, sinks_N=sinks, **_options(config),
        )  # fmt: skip

    return _on_devices(
        local, rules, (*rows, "heads", None),
        (q_BTNH, (*rows, "heads", None)),
        (k_BSKH, (*gathered_rows, "kv_heads", None)), (v_BSKH, (*gathered_rows, "kv_heads", None)),
        *heads,
        (segments_BT, rows), (segments_BT, gathered_rows),
        (positions_BT, rows), (positions_BT, gathered_rows),
        (prefix_BT, gathered_rows),
    )  # fmt: skip


def attend_cached(
    spec: AttendSpec,
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSV: Float[Array, "B K S V"],
    offset_B: Int[Array, "B"],
    prefix_BT: Bool[Array, "B P"] | None = None,
    visible_BS: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T N V"]:
    """Return the attention of T new tokens over cached keys, which already include their own.

    `offset_B`: index of each row's first query among the S keys. A row is one document. `prefix_BT`: marks the
    bidirectional prefix from the beginning of the row. `visible_BS`: False for keys that no query may attend to; needed
    only if some of them precede the first query.
    """
    config, rules, a, mask, T = spec.config, spec.rules, spec.config.attention, spec.mask, q_BTNH.shape[1]
    use_decode_kernel = spec.few(T) and visible_BS is None
    prefix_BS, q_segments_BT = None, None
    if a.mask == "prefix" and prefix_BT is not None:
        prefix_BS = jnp.pad(prefix_BT, ((0, 0), (0, k_BKSH.shape[2] - prefix_BT.shape[1])))
    if visible_BS is not None:
        visible_BS = visible_BS.astype(jnp.int32)  # as segment ids: queries belong to segment 1
        q_segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)

    def local(q, k, v, sinks, alibi, offset, prefix, q_segments, k_segments):
        k, v = _heads_of(q, *(x.transpose(0, 2, 1, 3) for x in (k, v)), a, rules)
        options = _options(config) | {"alibi_N": alibi, "sinks_N": sinks}
        if use_decode_kernel:
            k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
            # Caches start as zeros and receive only keys and values, so masked entries are finite.
            options |= {"window": mask.window, "finite": True, "implementation": _decode_implementation(config)}
            return decode_attention(q, k, v, offset + T, **options)
        segments = None if k_segments is None else (q_segments, k_segments)
        offset = offset + _first_index(q, rules)
        return flash_attention(q, k, v, mask=mask, offset=offset, prefix_BS=prefix, segment_ids=segments, **options)

    rows = ("batch", None if use_decode_kernel else "sequence", "heads", None)
    cached = ("batch", "kv_heads", None, None)
    return _on_devices(
        local, rules, rows,
        (q_BTNH, rows), (k_BKSH.astype(q_BTNH.dtype), cached), (v_BKSV.astype(q_BTNH.dtype), cached),
        (spec.sinks_N, ("heads",)), (_slopes(config), ("heads",)),
        (offset_B, ("batch",)), (prefix_BS, ("batch", None)),
        (q_segments_BT, rows[:2]), (visible_BS, ("batch", None)),
    )  # fmt: skip


def attend_latent(
    spec: AttendSpec, q_BTNC: Float[Array, "B T N C"], latent_B1SC: Float[Array, "B 1 S C"], offset_B: Int[Array, "B"]
) -> Float[Array, "B T N C"]:
    """Return the attention of a few new tokens over latents, which serve as keys and values of all heads.

    The queries are already in the latent space. Ignore the last rope_dim numbers of the result: dropping them from the
    values would copy the cache.
    """
    T = q_BTNC.shape[1]
    options = _options(spec.config) | {
        "window": spec.mask.window, "finite": True, "implementation": _decode_implementation(spec.config),
    }  # fmt: skip

    def local(q, latents, sinks, offset):
        return decode_attention(q, latents, latents, offset + T, sinks_N=sinks, **options)

    rows = ("batch", None, "heads", None)
    return _on_devices(
        local, spec.rules, rows,
        (q_BTNC, rows), (latent_B1SC.astype(q_BTNC.dtype), ("batch", None, None, None)),
        (spec.sinks_N, ("heads",)), (offset_B, ("batch",)),
    )  # fmt: skip


def keys_seen(config: ModelConfig, kind: str, length: int) -> float:
    """Return the mean number of keys visible to a query in a window of `length`; a causal mask counts as half of it."""
    a = config.attention
    if kind == "block_sparse":
        total = 0
        size, local, stride = a.blocks
        blocks = -(-length // size)
        for q in range(blocks):
            keys = range(blocks) if a.mask == "bidirectional" else range(q + 1)
            near = sum(abs(q - k) < local or k % stride == stride - 1 for k in keys)
            total += near * size - (size // 2 if a.mask != "bidirectional" else 0)
        return total / blocks
    if kind == "sliding":
        window = min(a.window, length)
        one_side = window - window**2 / (2 * length)
        # In both directions, count the query's own key once.
        return 2 * one_side - 1 + window / length if a.mask == "bidirectional" else one_side
    return float(length) if a.mask == "bidirectional" else length / 2


def _ring(config: ModelConfig, rules: ShardingRules, mask: Mask) -> Callable:
    options = {**_options(config), "mask": mask}

    def pair(ids, *arrays, call, offset, **more):
        q_segments, k_segments = ids
        segments = None if q_segments is None else (q_segments, k_segments)
        return call(*arrays, offset=offset, segment_ids=segments, **options, **more)

    def forward(q, k, v, *, offset, q_segments, k_segments):
        return pair((q_segments, k_segments), q, k, v, call=flash_attention, offset=offset, return_lse=True)

    def backward(q, k, v, out, lse, dout, *, offset, q_segments, k_segments):
        return pair((q_segments, k_segments), q, k, v, out, lse, dout, call=flash_attention_backward, offset=offset)

    def local(q, k, v, sinks, alibi, segments):
        return ring_attention(
            q, *_heads_of(q, k, v, config.attention, rules), attend=forward, attend_backward=backward,
            axis=rules.activations.sequence[0], segments=segments, sinks_N=sinks, causal=mask.causal,
            zigzag=mask.window is None and q.shape[1] % 2 == 0, window=mask.window if mask.causal else None,
        )  # fmt: skip

    return local


def _ulysses(config: ModelConfig, rules: ShardingRules, mask: Mask) -> Callable:
    axis = rules.activations.sequence[0] if rules.activations.sequence else ""

    def local(q, k, v, sinks, alibi, segments):
        def attend_full_rows(q, k, v, *, offset, q_segments, k_segments):
            N = q.shape[2]
            local_heads = lambda x: (
                None if x is None else jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * N, N)
            )
            return flash_attention(
                q, k, v, mask=mask, segment_ids=None if q_segments is None else (q_segments, k_segments),
                sinks_N=local_heads(sinks), alibi_N=local_heads(alibi), return_lse=True, **_options(config),
            )  # fmt: skip

        k, v = _heads_of(q, k, v, config.attention, rules)
        return ulysses_attention(q, k, v, attend=attend_full_rows, axis=axis, segments=segments)

    return local


def _sequence_sharded(rules: ShardingRules) -> bool:
    """Return whether the current mesh shards rows along the sequence."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return any(sizes.get(axis, 1) > 1 for axis in rules.activations.sequence)


def _options(config: ModelConfig) -> dict:
    a = config.attention
    return {
        "scale": a.head_dim**-0.5 if a.query_scale is None else a.query_scale,
        "softcap": a.softcap,
        "implementation": None if a.implementation == "auto" else a.implementation,
    }


def _decode_implementation(config: ModelConfig) -> str | None:
    chosen = config.attention.decode_implementation
    return None if chosen == "auto" else chosen


def _slopes(config: ModelConfig) -> Array | None:
    return jnp.asarray(alibi_slopes(config.attention.num_heads)) if config.position.kind == "alibi" else None


def _on_devices(fn: Callable, rules: ShardingRules, out_axes: tuple, *inputs: tuple[Array | None, tuple]) -> Array:
    """Apply `fn` in shard_map to each device's shards of the inputs, given with their logical axes: kernels take local
    arrays."""
    if no_mesh():
        return fn(*(x for x, _ in inputs))
    arrays = tuple(None if x is None else reshard(x, rules, *axes) for x, axes in inputs)
    specs = tuple(None if x is None else rules.spec("activations", axes) for x, axes in inputs)
    out_spec = rules.spec("activations", out_axes)
    # check_vma=False: the results of kernels do not carry the types of varying axes. All mesh axes are manual, and `fn`
    # sums over none.
    return jax.shard_map(fn, in_specs=specs, out_specs=out_spec, check_vma=False)(*arrays)


def _first_index(q_BTNH: Array, rules: ShardingRules) -> int | Array:
    """Return the index in the rows of this call at which this device's queries start."""
    return jax.lax.axis_index(rules.activations.sequence) * q_BTNH.shape[1] if _sequence_sharded(rules) else 0


def _heads_of(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, a: AttentionConfig, rules: ShardingRules
) -> tuple[Array, Array]:
    """Return the key/value heads that this device's query heads use. They differ from its own if more devices divide
    the query heads than the key/value heads."""
    N, K, group = q_BTNH.shape[2], k_BSKH.shape[2], a.num_heads // a.num_kv_heads
    if N == K * group:
        return k_BSKH, v_BSKH
    if N % group and group % N:
        raise ValueError(
            f"model.attention: each device has {N} query heads, and every {group} of them share a key head: neither "
            "number divides the other. Give sharding.activations.kv_heads the axes of heads, or shard heads over fewer "
            "devices"
        )
    first = jax.lax.axis_index(rules.activations.heads) * N // group
    if rules.activations.kv_heads:
        first = first % K
    local_heads = lambda x: jax.lax.dynamic_slice_in_dim(x, first, max(N // group, 1), axis=2)
    return local_heads(k_BSKH), local_heads(v_BSKH)
