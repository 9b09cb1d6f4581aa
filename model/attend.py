"""From the model's view of attention to the kernels': which mask a layer has, and what each device of a mesh works on.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.config import AttentionConfig, ModelConfig
from model.positions import alibi_slopes
from pallas_kernels.decode_attention import MAX_QUERIES, decode_attention
from pallas_kernels.flash_attention import Mask, Strided, flash_attention, flash_attention_backward
from sharding.ring import ring_attention
from sharding.rules import ShardingRules, no_mesh, reshard
from sharding.ulysses import ulysses_attention


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


class LatentCache(NamedTuple):
    """What keys and values of all heads of one layer are read out of (`model/latent.py`): C = kv_rank + rope_dim
    numbers a slot."""

    latent_B1SC: Float[Array, "B 1 S C"]


def layer_mask(a: AttentionConfig, layer: str) -> Mask:
    """The mask of a layer of kind `layer`. Order and distance go by slots; blocks of a block-sparse pattern by
    positions,
    so that they start anew with each packed document."""
    strided = Strided(*a.blocks) if layer == "block_sparse" else None
    return Mask(a.mask != "bidirectional", a.window if layer == "sliding" else None, strided)


def attend(
    config: ModelConfig,
    rules: ShardingRules,
    layer: str,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    sinks_N: Float[Array, "N"] | None,
    places: Places,
) -> Float[Array, "B T N H"]:
    """Each query over the keys of its row that its layer's mask shows it, on one device or on a mesh: batch and heads
    divide; where a row is spread over devices its keys are gathered, passed around, or exchanged for heads (`context`).
    """
    a = config.attention
    mask = layer_mask(a, layer)
    segments_BT, prefix_BT = places.segment_ids_BT, places.prefix_BT if a.mask == "prefix" else None
    positions_BT = places.positions_BT if mask.strided is not None else None
    rows, whole_rows = ("batch", "sequence"), ("batch", None)

    if _spread(rules) and a.context != "gather":
        if len(rules.activations.sequence) > 1:
            raise ValueError(
                f"model.attention.context = {a.context!r}: rows lie over one mesh axis, but "
                f"sharding.activations.sequence = "
                f"{rules.activations.sequence}; name one, or use 'gather'"
            )
        return _on_devices(
            (_ring if a.context == "ring" else _ulysses)(config, rules, mask), rules, (*rows, "heads", None),
            (q_BTNH, (*rows, "heads", None)), (k_BSKH, (*rows, "kv_heads", None)), (v_BSKH, (*rows, "kv_heads", None)),
            (sinks_N, ("heads",)), (_slopes(config), ("heads",)), (segments_BT, rows),
        )  # fmt: skip

    def local(q, k, v, sinks, alibi, q_segments, k_segments, q_positions, k_positions, prefix):
        return flash_attention(
            q, *_heads_of(q, k, v, a, rules), mask=mask, offset=_first_slot(q, rules),
            segment_ids=None if q_segments is None else (q_segments, k_segments),
            positions=None if q_positions is None else (q_positions, k_positions),
            prefix_BS=prefix, alibi_N=alibi, sinks_N=sinks, **_options(config),
        )  # fmt: skip

    return _on_devices(
        local, rules, (*rows, "heads", None),
        (q_BTNH, (*rows, "heads", None)),
        (k_BSKH, (*whole_rows, "kv_heads", None)), (v_BSKH, (*whole_rows, "kv_heads", None)),
        (sinks_N, ("heads",)), (_slopes(config), ("heads",)),
        (segments_BT, rows), (segments_BT, whole_rows),
        (positions_BT, rows), (positions_BT, whole_rows),
        (prefix_BT, whole_rows),
    )  # fmt: skip


def attend_cache(
    config: ModelConfig,
    rules: ShardingRules,
    layer: str,
    q_BTNH: Float[Array, "B T N H"],
    cache: LayerCache,
    sinks_N: Float[Array, "N"] | None,
    places: Places,
) -> Float[Array, "B T N H"]:
    """As `attend`, of T new tokens whose keys are in the cache already, at `places.slots_BT`. No segments: a row of a
    cache
    is one document."""
    a, T = config.attention, q_BTNH.shape[1]
    mask = layer_mask(a, layer)
    few = _few(a, mask, T)
    prefix_BS = None
    if a.mask == "prefix" and places.prefix_BT is not None:
        prefix_BS = jnp.pad(places.prefix_BT, ((0, 0), (0, cache.k_BKSH.shape[2] - places.prefix_BT.shape[1])))

    def local(q, k, v, sinks, alibi, start_B, prefix):
        k, v = (x.transpose(0, 2, 1, 3) for x in _heads_of(q, *(x.transpose(0, 2, 1, 3) for x in (k, v)), a, rules))
        options = _options(config)
        if few:
            # Caches start as zeros and only keys and values are written: unseen slots are finite.
            options |= {
                "window": mask.window,
                "alibi_N": alibi,
                "sinks_N": sinks,
                "finite": True,
                "implementation": None,
            }
            return decode_attention(q, k, v, start_B + T, **options)
        k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        return flash_attention(
            q,
            k,
            v,
            mask=mask,
            offset=start_B + _first_slot(q, rules),
            prefix_BS=prefix,
            alibi_N=alibi,
            sinks_N=sinks,
            **options,
        )

    rows = ("batch", None, "heads", None) if few else ("batch", "sequence", "heads", None)
    held = ("batch", "kv_heads", None, None)
    return _on_devices(
        local, rules, rows,
        (q_BTNH, rows), (cache.k_BKSH.astype(q_BTNH.dtype), held), (cache.v_BKSH.astype(q_BTNH.dtype), held),
        (sinks_N, ("heads",)), (_slopes(config), ("heads",)),
        (places.slots_BT[:, 0], ("batch",)), (prefix_BS, ("batch", None)),
    )  # fmt: skip


def absorbs(config: ModelConfig, layer: str, queries: int) -> bool:
    """Whether `attend_latents` takes so many new tokens of each row of a layer of kind `layer`."""
    return _few(config.attention, layer_mask(config.attention, layer), queries)


def attend_latents(
    config: ModelConfig,
    rules: ShardingRules,
    layer: str,
    q_BTNC: Float[Array, "B T N C"],
    cache: LatentCache,
    sinks_N: Float[Array, "N"] | None,
    places: Places,
) -> Float[Array, "B T N C"]:
    """As `attend_cache`, of few tokens whose queries were brought among the latents, which are keys and values of all
    heads.
    The last rope_dim numbers of the result mean nothing: to leave them out of the values would be to copy the cache."""
    T, window = q_BTNC.shape[1], layer_mask(config.attention, layer).window
    options = _options(config) | {"window": window, "finite": True, "implementation": None}

    def local(q, latents, sinks, start_B):
        return decode_attention(q, latents, latents, start_B + T, sinks_N=sinks, **options)

    rows = ("batch", None, "heads", None)
    return _on_devices(
        local, rules, rows,
        (q_BTNC, rows), (cache.latent_B1SC.astype(q_BTNC.dtype), ("batch", None, None, None)),
        (sinks_N, ("heads",)), (places.slots_BT[:, 0], ("batch",)),
    )  # fmt: skip


def _few(a: AttentionConfig, mask: Mask, queries: int) -> bool:
    """Whether so many new tokens of a cache are for `decode_attention`."""
    return queries <= MAX_QUERIES and a.mask == "causal" and mask.strided is None and a.implementation == "auto"


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


def _spread(rules: ShardingRules) -> bool:
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


def _first_slot(q_BTNH: Array, rules: ShardingRules) -> int | Array:
    """How far into the rows of the call this device's queries start."""
    return jax.lax.axis_index(rules.activations.sequence) * q_BTNH.shape[1] if _spread(rules) else 0


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
