"""Attention over a sharded sequence, by passing keys and values around a ring (Liu et al. 2023, Ring Attention).

Each device keeps its queries. The shards of keys and values move around the mesh axis, and each device merges its
attention over every shard by the log-sum-exp. In the backward pass the gradients of keys and values move with them. A
device stores its own shard, the current one and the next one, so memory falls with the number of devices.

Under a causal mask, a contiguous layout leaves the first devices idle. In the zig-zag layout (Brandon et al. 2023,
Striped Attention, in the form of Llama 3, sec. 3.3.2) the sequence has 2n chunks, and device i holds chunks i and
2n-1-i. At every step after the first, exactly two of the four pairs of local and received chunks are visible on every
device, and both are fully visible. Only these two are computed.

The caller supplies the attention over one shard of keys, so this file needs no kernel:

    attend(q, k, v, *, offset, q_segments, k_segments) -> (out_BTNV, lse_BNT float32)
        offset: index of q[0] minus index of k[0], the int 0 or a traced int32 scalar; the mask depends on it.
        Segments are [B, T] or None. Rows without a visible key get out 0 and lse -1e30.
    attend_backward(q, k, v, out, lse, dout, *, offset, q_segments, k_segments) -> (dq, dk, dv)
        Takes out, lse and dout of whole rows and returns the contribution of these keys to the gradients,
        with p = exp(s - lse).

Both are traced a few times in total, not once per step, and may not close over traced arrays.

Shapes: B batch, T local queries, S local keys, N query heads, K key/value heads, H head dimension, V value dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.manual import vary, varying_axes

UNSEEN = -1e30  # lse of a row without visible keys: finite, so that merging two such rows gives no NaN

Attend = Callable[..., tuple[Array, Array]]
AttendBackward = Callable[..., tuple[Array, Array, Array]]


class _Ring(NamedTuple):
    """The static arguments of a ring."""

    attend: Attend
    attend_backward: AttendBackward
    axis: str
    zigzag: bool
    causal: bool
    steps: int  # shards that each query attends to, including its own


class _Shard(NamedTuple):
    """The keys, values and segment ids of one device."""

    k_BSKH: Array
    v_BSKV: Array
    segments_BS: Array | None


def ring_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"],
    *,
    attend: Attend,
    attend_backward: AttendBackward,
    axis: str = "sequence",
    segments: Int[Array, "B T"] | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    causal: bool = True,
    zigzag: bool = True,
    layout: Literal["contiguous", "zigzag"] = "contiguous",
    window: int | None = None,
) -> Float[Array, "B T N V"]:
    """Return the attention of the local queries to the keys of all devices along `axis`. Call it inside shard_map, with
    local shards.

    `attend`, `attend_backward`: see the module docstring. `causal`: whether they apply a causal mask; the ring then
    skips shards that no query can attend to. `segments`: ids of packed documents. `sinks_N`: logits of a key that is
    visible to every row and has the value zero.

    `zigzag`: balance the work of all devices under a causal mask (ignored without one); requires an even T. `layout`:
    order of the rows on entry and return. 'contiguous' with `zigzag` exchanges q, k, v and segments before and the
    output after: each device sends each of these once, (N H + K (H + V) + N V) * B * T numbers, in addition to the
    ring's (n - 1) * K (H + V) * B * T in the forward pass.

    `window`: a query attends to no key more than window - 1 positions back, so the ring stops at the last device that
    the window reaches. Use it for contiguous causal rows with zigzag=False; attend applies the window itself.

    q, k and v must have one dtype, which the output has too. Sums over devices are in float32. The backward pass keeps
    this device's q, k, v, out and lse. Differentiable once, in reverse mode, with respect to q, k, v and sinks. Raises
    ValueError for incompatible arguments.
    """
    n, T = jax.lax.axis_size(axis), q_BTNH.shape[1]
    zigzag = zigzag and causal
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"layout = {layout!r}: unknown. Use contiguous or zigzag")
    if layout == "zigzag" and not zigzag and causal and n > 1:
        raise ValueError(
            "layout = 'zigzag' with zigzag = False: an unbalanced causal ring needs contiguous rows. Set zigzag=True, "
            "or layout='contiguous'"
        )
    if zigzag and T % 2:
        raise ValueError(
            f"{T} queries a device: zig-zag needs an even number, for two equal chunks. Pad, or set zigzag=False"
        )
    if k_BTKH.shape[1] != T or v_BTKV.shape[1] != T:
        raise ValueError(
            f"{T} queries, {k_BTKH.shape[1]} keys and {v_BTKV.shape[1]} values a device: must be equally many"
        )
    steps = n
    if window is not None:
        if zigzag or not causal or window < 1:
            raise ValueError(f"window = {window}: must be at least 1, in a causal ring with zigzag = False")
        steps = min(n, 1 + -(-(window - 1) // T))
    ring = _Ring(attend, attend_backward, axis, zigzag, causal, steps)
    # Loops and the gradients below need inputs of one type, varying over the same axes.
    inputs = (q_BTNH, k_BTKH, v_BTKV, segments, sinks_N)
    axes = frozenset().union(*(varying_axes(x) for x in jax.tree.leaves(inputs)))
    q_BTNH, k_BTKH, v_BTKV, segments, sinks_N = jax.tree.map(lambda x: vary(x, axes), inputs)
    exchange = zigzag and layout == "contiguous" and n > 1
    if exchange:
        q_BTNH, k_BTKH, v_BTKV, segments = jax.tree.map(
            lambda x: to_zigzag(x, axis), (q_BTNH, k_BTKH, v_BTKV, segments)
        )
    out_BTNV = _attention(ring, q_BTNH, k_BTKH, v_BTKV, segments, sinks_N)
    return from_zigzag(out_BTNV, axis) if exchange else out_BTNV


def to_zigzag(x_BT: Array, axis: str = "sequence") -> Array:
    """Convert contiguous shards [B, T, ...] to zig-zag: device i of n gets chunks i and 2n-1-i of 2n. Call it inside
    shard_map. It makes two collective permutes of half a shard each. T must be even."""
    first, second = jnp.split(x_BT, 2, axis=1)
    even_moves, odd_moves = _chunk_moves(axis)
    first, second = jax.lax.ppermute(first, axis, even_moves), jax.lax.ppermute(second, axis, odd_moves)
    even = jax.lax.axis_index(axis) % 2 == 0  # an even device's first chunk is even, so it arrived as a first half
    return jnp.concatenate([jnp.where(even, first, second), jnp.where(even, second, first)], axis=1)


def from_zigzag(x_BT: Array, axis: str = "sequence") -> Array:
    """Convert zig-zag shards to contiguous ones: the inverse of `to_zigzag`, at the same cost."""
    low, high = jnp.split(x_BT, 2, axis=1)
    even = jax.lax.axis_index(axis) % 2 == 0
    first, second = jnp.where(even, low, high), jnp.where(even, high, low)
    even_moves, odd_moves = ([(to, at) for at, to in moves] for moves in _chunk_moves(axis))
    return jnp.concatenate(
        [jax.lax.ppermute(first, axis, even_moves), jax.lax.ppermute(second, axis, odd_moves)], axis=1
    )


def _chunk_moves(axis: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the (source, destination) pairs of the first halves of contiguous shards (the even chunks), and those of
    the second halves."""
    n = jax.lax.axis_size(axis)
    owner = lambda chunk: min(chunk, 2 * n - 1 - chunk)
    return [(i, owner(2 * i)) for i in range(n)], [(i, owner(2 * i + 1)) for i in range(n)]


# ------------------------------------------------------------------------------------------------- the ring


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: _Ring, q_BTNH, k_BTKH, v_BTKV, segments_BT, sinks_N):
    return _forward(ring, q_BTNH, k_BTKH, v_BTKV, segments_BT, sinks_N)[0]


def _forward(ring: _Ring, q_BTNH, k_BTKH, v_BTKV, segments_BT, sinks_N):
    shard = _Shard(k_BTKH, v_BTKV, segments_BT)
    attend_shard = partial(_step, ring, q_BTNH, segments_BT)
    next_shard = _shift(ring, shard) if ring.steps > 1 else None  # sent first, to overlap with compute
    merged = _own_step(ring, q_BTNH, shard)

    def step(s, carry):
        merged, shard = carry
        next_shard = _shift(ring, shard)
        return _merge(merged, attend_shard(shard, s)), next_shard

    if ring.steps > 1:
        merged, next_shard = jax.lax.fori_loop(1, ring.steps - 1, step, (merged, next_shard))
        merged = _merge(merged, attend_shard(next_shard, ring.steps - 1))
    out_BTNV, lse_BNT = merged
    if sinks_N is not None:
        with_sink_BNT = jnp.logaddexp(lse_BNT, sinks_N.astype(jnp.float32)[:, None])
        out_BTNV, lse_BNT = out_BTNV * _by_row(jnp.exp(lse_BNT - with_sink_BNT)), with_sink_BNT
    out_BTNV = out_BTNV.astype(q_BTNH.dtype)
    return out_BTNV, (q_BTNH, shard, segments_BT, sinks_N, out_BTNV, lse_BNT)


def _backward(ring: _Ring, saved, dout_BTNV):
    q_BTNH, shard, segments_BT, sinks_N, out_BTNV, lse_BNT = saved
    rows = (q_BTNH, out_BTNV, lse_BNT, dout_BTNV)
    next_shard = _shift(ring, shard) if ring.steps > 1 else None
    dq, dkv = _own_step_backward(ring, rows, shard)

    def add(dq, dkv, shard, s):
        """Add the gradients of a later step. Gradients follow their keys one step behind, so that sending them also
        overlaps with compute."""
        more_dq, more_dkv = _step_backward(ring, rows, segments_BT, shard, s)
        return dq + more_dq, jax.tree.map(jnp.add, _shift(ring, dkv), more_dkv)

    def step(s, carry):
        dq, dkv, shard = carry
        next_shard = _shift(ring, shard)
        return *add(dq, dkv, shard, s), next_shard

    if ring.steps > 1:
        dq, dkv, next_shard = jax.lax.fori_loop(1, ring.steps - 1, step, (dq, dkv, next_shard))
        dq, dkv = add(dq, dkv, next_shard, ring.steps - 1)
        dkv = _shift(ring, dkv, jax.lax.axis_size(ring.axis) - (ring.steps - 1))  # back to their device
    dk, dv = dkv
    dsinks_N = None
    if sinks_N is not None:
        dots_BNT = (out_BTNV.astype(jnp.float32) * dout_BTNV.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
        share_BNT = jnp.exp(sinks_N.astype(jnp.float32)[:, None] - lse_BNT)
        dsinks_N = -(share_BNT * dots_BNT).sum((0, 2)).astype(sinks_N.dtype)
    return dq.astype(q_BTNH.dtype), dk.astype(shard.k_BSKH.dtype), dv.astype(shard.v_BSKV.dtype), None, dsinks_N


_attention.defvjp(_forward, _backward)


def _shift(ring: _Ring, parts, by: int = 1):
    """Send the arrays of device i to device i + by."""
    n = jax.lax.axis_size(ring.axis)
    pairs = [(i, (i + by) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, pairs), parts)


# ------------------------------------------------------------------------------------------- one step of the ring


def _own_step(ring: _Ring, q, own: _Shard):
    """Return (out float32, lse) of the local queries over the local keys: the first step."""
    if not ring.zigzag:
        return _float32(
            ring.attend(q, own.k_BSKH, own.v_BSKV, offset=0, q_segments=own.segments_BS, k_segments=own.segments_BS)
        )
    low, high = _halves(own)
    q_low, q_high = jnp.split(q, 2, axis=1)
    low_result = _attend(ring, q_low, low.segments_BS, low, 0)
    high_result = _merge(
        _attend(ring, q_high, high.segments_BS, low, _own_distance(ring, q_low)),
        _attend(ring, q_high, high.segments_BS, high, 0),
    )
    return _join(low_result, high_result)


def _own_step_backward(ring: _Ring, rows, own: _Shard):
    """Return (dq, (dk, dv)) of the first step, in float32."""
    if not ring.zigzag:
        return _attend_backward(ring, rows, own.segments_BS, own, 0)
    (low, high), (rows_low, rows_high) = _halves(own), _split_rows(rows)
    dq_low, dkv_low = _attend_backward(ring, rows_low, low.segments_BS, low, 0)
    dq_across, dkv_across = _attend_backward(ring, rows_high, high.segments_BS, low, _own_distance(ring, rows_low[0]))
    dq_high, dkv_high = _attend_backward(ring, rows_high, high.segments_BS, high, 0)
    dkv = jax.tree.map(lambda a, b, c: jnp.concatenate([a + b, c], axis=1), dkv_low, dkv_across, dkv_high)
    return jnp.concatenate([dq_low, dq_across + dq_high], axis=1), dkv


def _step(ring: _Ring, q, segments, shard: _Shard, s):
    """Return (out float32, lse) of the local queries over the keys of the device s places before."""
    if not ring.zigzag:
        offset, visible = _distance(ring, q, s)
        compute = lambda: _attend(ring, q, segments, shard, offset)
        return compute() if not ring.causal else jax.lax.cond(visible, compute, lambda: _masked(compute, q))
    pairs, (low, high), q_halves = _zigzag_step(ring, q, s), _halves(shard), jnp.split(q, 2, axis=1)
    segment_halves = (None, None) if segments is None else jnp.split(segments, 2, axis=1)
    across = _attend(ring, q_halves[1], segment_halves[1], low, pairs.across)
    q_picked, picked_segments, picked = pairs.pick(
        (q_halves[0], segment_halves[0], low), (q_halves[1], segment_halves[1], high)
    )
    out, lse = _attend(ring, q_picked, picked_segments, picked, pairs.along)
    masked = jnp.zeros_like(out), jnp.full_like(lse, UNSEEN)
    return _join(pairs.pick((out, lse), masked), _merge(across, pairs.pick(masked, (out, lse))))


def _step_backward(ring: _Ring, rows, segments, shard: _Shard, s):
    """Return (dq, (dk, dv)) of a later step, in float32."""
    if not ring.zigzag:
        offset, visible = _distance(ring, rows[0], s)
        compute = lambda: _attend_backward(ring, rows, segments, shard, offset)
        return compute() if not ring.causal else jax.lax.cond(visible, compute, lambda: _zeros(compute, rows[0]))
    pairs, (low, high), (rows_low, rows_high) = _zigzag_step(ring, rows[0], s), _halves(shard), _split_rows(rows)
    segment_halves = (None, None) if segments is None else jnp.split(segments, 2, axis=1)
    dq_across, dkv_across = _attend_backward(ring, rows_high, segment_halves[1], low, pairs.across)
    picked_rows, picked_segments, picked = pairs.pick(
        (rows_low, segment_halves[0], low), (rows_high, segment_halves[1], high)
    )
    along = _attend_backward(ring, picked_rows, picked_segments, picked, pairs.along)
    zeros = jax.tree.map(jnp.zeros_like, along)
    (dq_low, dkv_low), (dq_high, dkv_high) = pairs.pick(along, zeros), pairs.pick(zeros, along)
    dkv = jax.tree.map(lambda a, b, c: jnp.concatenate([a + b, c], axis=1), dkv_across, dkv_low, dkv_high)
    return jnp.concatenate([dq_low, dq_across + dq_high], axis=1), dkv


class _ZigzagStep(NamedTuple):
    """The two visible pairs of chunks: high queries with low keys, and either low with low or high with high."""

    across: Array  # offset of the first pair
    along: Array  # offset of the second pair
    before: Array  # whether the received low chunk precedes the local one; then low with low is visible

    def pick(self, low, high):
        return jax.tree.map(partial(jnp.where, self.before), low, high)


def _zigzag_step(ring: _Ring, q, s) -> _ZigzagStep:
    n, i, half = jax.lax.axis_size(ring.axis), jax.lax.axis_index(ring.axis), q.shape[1] // 2
    j = (i - s) % n
    return _ZigzagStep((2 * n - 1 - i - j) * half, jnp.abs(i - j) * half, j < i)


def _own_distance(ring: _Ring, low) -> Array:
    """Return the distance in positions from the start of the low chunk to the start of the high chunk."""
    return (2 * jax.lax.axis_size(ring.axis) - 1 - 2 * jax.lax.axis_index(ring.axis)) * low.shape[1]


def _distance(ring: _Ring, q, s) -> tuple[Array, Array]:
    """Return (offset, whether a causal query has a visible key) for contiguous rows and the keys of the device s places
    before in the ring."""
    i, n = jax.lax.axis_index(ring.axis), jax.lax.axis_size(ring.axis)
    j = (i - s) % n
    return (i - j) * q.shape[1], j < i


def _attend(ring: _Ring, q, segments, shard: _Shard, offset):
    return _float32(
        ring.attend(q, shard.k_BSKH, shard.v_BSKV, offset=offset, q_segments=segments, k_segments=shard.segments_BS)
    )


def _attend_backward(ring: _Ring, rows, segments, shard: _Shard, offset):
    q, out, lse, dout = rows
    dq, dk, dv = ring.attend_backward(
        q,
        shard.k_BSKH,
        shard.v_BSKV,
        out,
        lse,
        dout,
        offset=offset,
        q_segments=segments,
        k_segments=shard.segments_BS,
    )
    return _float32((dq, (dk, dv)))


def _merge(a, b):
    """Return (out float32, lse) over two sets of keys, from the results over each."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    return out_a * _by_row(jnp.exp(lse_a - lse)) + out_b * _by_row(jnp.exp(lse_b - lse)), lse


def _by_row(weights_BNT: Array) -> Array:
    return weights_BNT.transpose(0, 2, 1)[..., None]


def _join(low, high):
    return jnp.concatenate([low[0], high[0]], axis=1), jnp.concatenate([low[1], high[1]], axis=2)


def _halves(shard: _Shard) -> tuple[_Shard, _Shard]:
    half = shard.k_BSKH.shape[1] // 2
    return jax.tree.map(lambda x: x[:, :half], shard), jax.tree.map(lambda x: x[:, half:], shard)


def _split_rows(rows):
    q, out, lse, dout = rows
    parts = [jnp.split(x, 2, axis=1) for x in (q, out)] + [jnp.split(lse, 2, axis=2), jnp.split(dout, 2, axis=1)]
    return tuple(p[0] for p in parts), tuple(p[1] for p in parts)


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _zeros(function, like: Array):
    """Return zeros with the shapes of the results of `function`, typed as varying over the axes of `like`."""
    return jax.tree.map(lambda x: vary(jnp.zeros(x.shape, x.dtype), varying_axes(like)), jax.eval_shape(function))


def _masked(function, like: Array):
    out, lse = _zeros(function, like)
    return out, lse + UNSEEN
