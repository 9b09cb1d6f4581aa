"""From the model's view of attention to the kernels': which mask a layer has, and what each device of a mesh works on.

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
    """How a latent cache is read (model/attention/latent.py). Shapes there."""

    expand: Callable[[Array], tuple[Array, Array]]  # latents [B, S, C] -> keys [B, S, N, H], values [B, S, N, V]
    absorb: Callable[[Array], Array]  # queries [B, T, N, H] -> among the latents [B, T, N, C]
    project: Callable[[Array], Array]  # attended latents [B, T, N, C] -> [B, T, N, V]


@dataclass(frozen=True, eq=False)
class AttendSpec:
    """What a layer asks of attention beside queries, keys and values: everything that a cache needs to attend."""

    config: ModelConfig
    rules: ShardingRules
    kind: str  # of the layer: 'global', 'sliding', 'block_sparse' or a variant of the user's
    sinks_N: Float[Array, "N"] | None = None
    # Applied to cached keys [B, S, N, H] at positions [B, S]: of layers whose rotation changes as the context grows.
    rope_after_cache: Callable[[Array, Array], Array] | None = None
    latent: LatentProjections | None = None

    @property
    def mask(self) -> Mask:
        return layer_mask(self.config.attention, self.kind)

    def few(self, queries: int) -> bool:
        """Return whether `decode_attention` takes this number of new tokens."""
        a = self.config.attention
        switched_on = a.decode_implementation != "off" and (
            a.implementation == "auto" or a.decode_implementation != "auto"
        )
        return switched_on and queries <= MAX_QUERIES and a.mask == "causal" and self.mask.strided is None


def layer_mask(a: AttentionConfig, kind: str) -> Mask:
    """Return the mask of a layer of kind `kind`.

    Order and distance go by index in the row; blocks of a block-sparse pattern by position, so that they start again
    with each packed document.
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
    """Return the attention of each query over the keys of its row that the layer's mask shows it.

    On a mesh batch and heads divide. Where a row is spread over devices its keys are gathered, passed around a ring, or
    exchanged for heads (`config.attention.context`).
    """
    config, rules, a, mask = spec.config, spec.rules, spec.config.attention, spec.mask
    segments_BT, prefix_BT = ctx.segment_ids_BT, ctx.prefix_BT if a.mask == "prefix" else None
    positions_BT = ctx.positions_BT if mask.strided is not None else None
    rows, whole_rows = ("batch", "sequence"), ("batch", None)
    heads = ((spec.sinks_N, ("heads",)), (_slopes(config), ("heads",)))

    if _sequence_sharded(rules) and a.context != "gather":
        if len(rules.activations.sequence) > 1:
            raise ValueError(
                f"model.attention.context = {a.context!r}: rows lie over one mesh axis, but "
                f"sharding.activations.sequence = {rules.activations.sequence}; name one, or use 'gather'"
            )
        return _on_devices(
            (_ring if a.context == "ring" else _ulysses)(config, rules, mask), rules, (*rows, "heads", None),
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
        (k_BSKH, (*whole_rows, "kv_heads", None)), (v_BSKH, (*whole_rows, "kv_heads", None)),
        *heads,
        (segments_BT, rows), (segments_BT, whole_rows),
        (positions_BT, rows), (positions_BT, whole_rows),
        (prefix_BT, whole_rows),
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
    """Return the attention of T new tokens over keys that are in a cache already, their own among them.

    `offset_B`: index among the S keys of the row's first query. A row is one document. `prefix_BT`: of the row from its
    beginning. `visible_BS`: keys that may be seen at all, where some before the first query may not.
    """
    config, rules, a, mask, T = spec.config, spec.rules, spec.config.attention, spec.mask, q_BTNH.shape[1]
    few = spec.few(T) and visible_BS is None
    prefix_BS, q_segments_BT = None, None
    if a.mask == "prefix" and prefix_BT is not None:
        prefix_BS = jnp.pad(prefix_BT, ((0, 0), (0, k_BKSH.shape[2] - prefix_BT.shape[1])))
    if visible_BS is not None:
        visible_BS = visible_BS.astype(jnp.int32)  # as segments: queries are of segment 1
        q_segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)

    def local(q, k, v, sinks, alibi, offset, prefix, q_segments, k_segments):
        k, v = _heads_of(q, *(x.transpose(0, 2, 1, 3) for x in (k, v)), a, rules)
        options = _options(config) | {"alibi_N": alibi, "sinks_N": sinks}
        if few:
            k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
            # Caches start as zeros and only keys and values are written: unseen slots are finite.
            options |= {"window": mask.window, "finite": True, "implementation": _decode_implementation(config)}
            return decode_attention(q, k, v, offset + T, **options)
        segments = None if k_segments is None else (q_segments, k_segments)
        offset = offset + _first_index(q, rules)
        return flash_attention(q, k, v, mask=mask, offset=offset, prefix_BS=prefix, segment_ids=segments, **options)

    rows = ("batch", None, "heads", None) if few else ("batch", "sequence", "heads", None)
    held = ("batch", "kv_heads", None, None)
    return _on_devices(
        local, rules, rows,
        (q_BTNH, rows), (k_BKSH.astype(q_BTNH.dtype), held), (v_BKSV.astype(q_BTNH.dtype), held),
        (spec.sinks_N, ("heads",)), (_slopes(config), ("heads",)),
        (offset_B, ("batch",)), (prefix_BS, ("batch", None)),
        (q_segments_BT, rows[:2]), (visible_BS, ("batch", None)),
    )  # fmt: skip


def attend_latent(
    spec: AttendSpec, q_BTNC: Float[Array, "B T N C"], latent_B1SC: Float[Array, "B 1 S C"], offset_B: Int[Array, "B"]
) -> Float[Array, "B T N C"]:
    """Return the attention of few new tokens over latents, which are keys and values of all heads.

    The queries were brought among the latents. The last rope_dim numbers of the result mean nothing: to leave them out
    of the values would be to copy the cache.
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
    """Return the mean number of keys that a query sees in a window of `length`; a causal mask counts as half of it."""
    a = config.attention
    if kind == "block_sparse":
        seen = 0
        size, local, stride = a.blocks
        blocks = -(-length // size)
        for q in range(blocks):
            keys = range(blocks) if a.mask == "bidirectional" else range(q + 1)
            near = sum(abs(q - k) < local or k % stride == stride - 1 for k in keys)
            seen += near * size - (size // 2 if a.mask != "bidirectional" else 0)
        return seen / blocks
    if kind == "sliding":
        window = min(a.window, length)
        one_side = window - window**2 / (2 * length)
        return 2 * one_side - 1 + window / length if a.mask == "bidirectional" else one_side  # itself counted once
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
        def whole_rows(q, k, v, *, offset, q_segments, k_segments):
            N = q.shape[2]
            mine = lambda x: None if x is None else jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * N, N)
            return flash_attention(
                q, k, v, mask=mask, segment_ids=None if q_segments is None else (q_segments, k_segments),
                sinks_N=mine(sinks), alibi_N=mine(alibi), return_lse=True, **_options(config),
            )  # fmt: skip

        k, v = _heads_of(q, k, v, config.attention, rules)
        return ulysses_attention(q, k, v, attend=whole_rows, axis=axis, segments=segments)

    return local


def _sequence_sharded(rules: ShardingRules) -> bool:
    """True where rows are spread over devices."""
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
    """`fn` of each device's part of the inputs, given with their logical axes; kernels take part in no mesh
    themselves."""
    if no_mesh():
        return fn(*(x for x, _ in inputs))
    arrays = tuple(None if x is None else reshard(x, rules, *axes) for x, axes in inputs)
    specs = tuple(None if x is None else rules.spec("activations", axes) for x, axes in inputs)
    out_spec = rules.spec("activations", out_axes)
    # Unchecked: kernels' results do not carry the types of varying axes. All mesh axes are manual, nothing is summed
    # inside.
    return jax.shard_map(fn, in_specs=specs, out_specs=out_spec, check_vma=False)(*arrays)


def _first_index(q_BTNH: Array, rules: ShardingRules) -> int | Array:
    """How far into the rows of the call this device's queries start."""
    return jax.lax.axis_index(rules.activations.sequence) * q_BTNH.shape[1] if _sequence_sharded(rules) else 0


def _heads_of(
    q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, a: AttentionConfig, rules: ShardingRules
) -> tuple[Array, Array]:
    """The key/value heads of this device's query heads, where those are spread over more devices than the former."""
    N, K, group = q_BTNH.shape[2], k_BSKH.shape[2], a.num_heads // a.num_kv_heads
    if N == K * group:
        return k_BSKH, v_BSKH
    if N % group and group % N:
        raise ValueError(
            f"model.attention: {N} query heads a device share key heads {group} at a time, which do not divide; give "
            "sharding.activations.kv_heads the axes of heads, or spread heads over fewer devices"
        )
    first = jax.lax.axis_index(rules.activations.heads) * N // group
    if rules.activations.kv_heads:
        first = first % K
    mine = lambda x: jax.lax.dynamic_slice_in_dim(x, first, max(N // group, 1), axis=2)
    return mine(k_BSKH), mine(v_BSKH)
