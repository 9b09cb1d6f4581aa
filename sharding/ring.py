"""Attention over a sequence that is spread over devices, by passing keys and values around a ring.

Each device keeps its queries; keys and values make the round of the mesh axis, and the attention to each visiting part
is merged by its log-sum-exp (Liu et al. 2023, Ring Attention). In the backward pass the gradients of keys and values
travel with them. A device holds its own part, the one that visits and the one that comes next: memory falls with the
number of devices.

Under a causal mask a contiguous layout leaves the first devices idle. Zig-zag (Brandon et al. 2023, Striped Attention,
in the form of Llama 3, sec. 3.3.2): of 2n chunks device i holds i and 2n-1-i. Of the four pairs of a visiting device's
chunks with its own, exactly two are then visible, both wholly, on every device at every step after the first; just
these are computed.

The attention of a pair of parts is the caller's, so that this file needs no kernel:

    attend(q, k, v, *, offset, q_segments, k_segments) -> (out_BTNV, lse_BNT float32)
        offset: slot of q[0] minus that of k[0], the int 0 or a traced int32 scalar; the mask goes by it. Segments as
        [B, T] or None. Rows that see nothing: out 0, lse -1e30.
    attend_backward(q, k, v, out, lse, dout, *, offset, q_segments, k_segments) -> (dq, dk, dv)
        with out, lse and dout of whole rows: the part of the gradients that these keys have, p = exp(s - lse).

They are traced a few times, not once a step, and may not close over traced arrays.
Shapes: B batch, T local queries, S local keys, N query heads, K key/value heads, H head dimension, V that of the
values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.manual import vary, varying_axes

UNSEEN = -1e30  # lse of a row that sees nothing: finite, so that merging two such rows gives no NaN

Attend = Callable[..., tuple[Array, Array]]
AttendBackward = Callable[..., tuple[Array, Array, Array]]


class _Ring(NamedTuple):
    """What is known when tracing."""

    attend: Attend
    attend_backward: AttendBackward
    axis: str
    zigzag: bool
    causal: bool
    steps: int  # parts that each query meets, its own included


class _Visitor(NamedTuple):
    """Keys and values of one device, and their documents."""

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
    """Attention of the local queries to the keys of all devices along `axis`: to be called inside shard_map, with local
    shards.

    `attend`, `attend_backward`: see the head of this file; `causal` says whether they mask by order, so that what no
    query sees is not computed. `segments`: ids of packed documents. `sinks_N`: logits of a key that every row sees and
    whose value is zero.
    `zigzag`: equal work on all devices under a causal mask (ignored without one); it needs an even T. `layout`: how
    rows lie on entry and return. 'contiguous' with `zigzag` exchanges q, k, v and segments before and the output after:
    each device sends each of these once, (N H + K (H + V) + N V) * B * T numbers, beside the ring's (n - 1) * K (H + V)
    * B * T forward.
    `window`: a query sees no key further back than window - 1 slots; the ring then stops after the devices it
    reaches. For contiguous causal rows with zigzag=False; attend applies the window itself.

    q, k, v of one dtype; the output in it; sums over devices in float32. Kept for the backward pass: q, k, v, out of
    this device and lse. Differentiable once, in reverse, with respect to q, k, v and sinks. Raises ValueError on
    choices that do not fit.
    """
    n, T = jax.lax.axis_size(axis), q_BTNH.shape[1]
    zigzag = zigzag and causal
    if layout not in ("contiguous", "zigzag"):
        raise ValueError(f"layout = {layout!r}: contiguous or zigzag")
    if layout == "zigzag" and not zigzag and causal and n > 1:
        raise ValueError(
            "layout = 'zigzag' with zigzag = False: a causal ring that is not balanced wants contiguous rows"
        )
    if zigzag and T % 2:
        raise ValueError(
            f"{T} queries a device: zig-zag holds two chunks of equal length on each; pad, or set zigzag=False"
        )
    if k_BTKH.shape[1] != T or v_BTKV.shape[1] != T:
        raise ValueError(
            f"{T} queries but {k_BTKH.shape[1]} keys and {v_BTKV.shape[1]} values a device: one row has one length"
        )
    steps = n
    if window is not None:
        if zigzag or not causal or window < 1:
            raise ValueError(f"window = {window}: at least 1, in a causal ring with zigzag = False")
        steps = min(n, 1 + -(-(window - 1) // T))
    ring = _Ring(attend, attend_backward, axis, zigzag, causal, steps)
    # One type for all inputs: loops and the gradients below need it.
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
    """Contiguous shards [B, T, ...] to zig-zag: device i of n gets chunks i and 2n-1-i of 2n. Inside shard_map; two
    collective permutes of half a shard each. T must be even."""
    first, second = jnp.split(x_BT, 2, axis=1)
    even_places, odd_places = _places(axis)
    first, second = jax.lax.ppermute(first, axis, even_places), jax.lax.ppermute(second, axis, odd_places)
    even = jax.lax.axis_index(axis) % 2 == 0  # an even device's first chunk is an even one: it came as a first half
    return jnp.concatenate([jnp.where(even, first, second), jnp.where(even, second, first)], axis=1)


def from_zigzag(x_BT: Array, axis: str = "sequence") -> Array:
    """The inverse of `to_zigzag`, at the same cost."""
    low, high = jnp.split(x_BT, 2, axis=1)
    even = jax.lax.axis_index(axis) % 2 == 0
    first, second = jnp.where(even, low, high), jnp.where(even, high, low)
    even_places, odd_places = ([(to, at) for at, to in places] for places in _places(axis))
    return jnp.concatenate(
        [jax.lax.ppermute(first, axis, even_places), jax.lax.ppermute(second, axis, odd_places)], axis=1
    )


def _places(axis: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(from, to) of the first halves of contiguous shards, which are the even chunks, and of the second halves."""
    n = jax.lax.axis_size(axis)
    home = lambda chunk: min(chunk, 2 * n - 1 - chunk)
    return [(i, home(2 * i)) for i in range(n)], [(i, home(2 * i + 1)) for i in range(n)]


# ------------------------------------------------------------------------------------------------- the ring


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: _Ring, q_BTNH, k_BTKH, v_BTKV, segments_BT, sinks_N):
    return _forward(ring, q_BTNH, k_BTKH, v_BTKV, segments_BT, sinks_N)[0]


def _forward(ring: _Ring, q_BTNH, k_BTKH, v_BTKV, segments_BT, sinks_N):
    visitor = _Visitor(k_BTKH, v_BTKV, segments_BT)
    meet = partial(_meet, ring, q_BTNH, segments_BT)
    coming = _pass_on(ring, visitor) if ring.steps > 1 else None  # sent before it is computed with: both at once
    merged = _meet_own(ring, q_BTNH, visitor)

    def step(s, carry):
        merged, visitor = carry
        coming = _pass_on(ring, visitor)
        return _merge(merged, meet(visitor, s)), coming

    if ring.steps > 1:
        merged, coming = jax.lax.fori_loop(1, ring.steps - 1, step, (merged, coming))
        merged = _merge(merged, meet(coming, ring.steps - 1))
    out_BTNV, lse_BNT = merged
    if sinks_N is not None:
        with_sink_BNT = jnp.logaddexp(lse_BNT, sinks_N.astype(jnp.float32)[:, None])
        out_BTNV, lse_BNT = out_BTNV * _by_row(jnp.exp(lse_BNT - with_sink_BNT)), with_sink_BNT
    out_BTNV = out_BTNV.astype(q_BTNH.dtype)
    return out_BTNV, (q_BTNH, visitor, segments_BT, sinks_N, out_BTNV, lse_BNT)


def _backward(ring: _Ring, saved, dout_BTNV):
    q_BTNH, visitor, segments_BT, sinks_N, out_BTNV, lse_BNT = saved
    rows = (q_BTNH, out_BTNV, lse_BNT, dout_BTNV)
    coming = _pass_on(ring, visitor) if ring.steps > 1 else None
    dq, dkv = _meet_own_backward(ring, rows, visitor)

    def add(dq, dkv, visitor, s):
        """Gradients follow their keys one step behind, so that they too travel while the next part is computed."""
        more_dq, more_dkv = _meet_backward(ring, rows, segments_BT, visitor, s)
        return dq + more_dq, jax.tree.map(jnp.add, _pass_on(ring, dkv), more_dkv)

    def step(s, carry):
        dq, dkv, visitor = carry
        coming = _pass_on(ring, visitor)
        return *add(dq, dkv, visitor, s), coming

    if ring.steps > 1:
        dq, dkv, coming = jax.lax.fori_loop(1, ring.steps - 1, step, (dq, dkv, coming))
        dq, dkv = add(dq, dkv, coming, ring.steps - 1)
        dkv = _pass_on(ring, dkv, jax.lax.axis_size(ring.axis) - (ring.steps - 1))  # home
    dk, dv = dkv
    dsinks_N = None
    if sinks_N is not None:
        dots_BNT = (out_BTNV.astype(jnp.float32) * dout_BTNV.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)
        share_BNT = jnp.exp(sinks_N.astype(jnp.float32)[:, None] - lse_BNT)
        dsinks_N = -(share_BNT * dots_BNT).sum((0, 2)).astype(sinks_N.dtype)
    return dq.astype(q_BTNH.dtype), dk.astype(visitor.k_BSKH.dtype), dv.astype(visitor.v_BSKV.dtype), None, dsinks_N


_attention.defvjp(_forward, _backward)


def _pass_on(ring: _Ring, parts, by: int = 1):
    """What device i held is held by device i + by."""
    n = jax.lax.axis_size(ring.axis)
    pairs = [(i, (i + by) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis, pairs), parts)


# ------------------------------------------------------------------------------------------- a part and its visitor


def _meet_own(ring: _Ring, q, own: _Visitor):
    """(out float32, lse) of the local queries over the local keys: the first step."""
    if not ring.zigzag:
        return _float32(
            ring.attend(q, own.k_BSKH, own.v_BSKV, offset=0, q_segments=own.segments_BS, k_segments=own.segments_BS)
        )
    low, high = _halves(own)
    q_low, q_high = jnp.split(q, 2, axis=1)
    in_low = _attend(ring, q_low, low.segments_BS, low, 0)
    in_high = _merge(
        _attend(ring, q_high, high.segments_BS, low, _own_distance(ring, q_low)),
        _attend(ring, q_high, high.segments_BS, high, 0),
    )
    return _join(in_low, in_high)


def _meet_own_backward(ring: _Ring, rows, own: _Visitor):
    """(dq, (dk, dv)) of the first step, float32."""
    if not ring.zigzag:
        return _attend_backward(ring, rows, own.segments_BS, own, 0)
    (low, high), (rows_low, rows_high) = _halves(own), _split_rows(rows)
    dq_low, dkv_low = _attend_backward(ring, rows_low, low.segments_BS, low, 0)
    dq_across, dkv_across = _attend_backward(ring, rows_high, high.segments_BS, low, _own_distance(ring, rows_low[0]))
    dq_high, dkv_high = _attend_backward(ring, rows_high, high.segments_BS, high, 0)
    dkv = jax.tree.map(lambda a, b, c: jnp.concatenate([a + b, c], axis=1), dkv_low, dkv_across, dkv_high)
    return jnp.concatenate([dq_low, dq_across + dq_high], axis=1), dkv


def _meet(ring: _Ring, q, segments, visitor: _Visitor, s):
    """(out float32, lse) of the local queries over the keys that came s devices far."""
    if not ring.zigzag:
        offset, visible = _distance(ring, q, s)
        seen = lambda: _attend(ring, q, segments, visitor, offset)
        return seen() if not ring.causal else jax.lax.cond(visible, seen, lambda: _nothing(seen, q))
    places, (low, high), q_halves = _zigzag_step(ring, q, s), _halves(visitor), jnp.split(q, 2, axis=1)
    segment_halves = (None, None) if segments is None else jnp.split(segments, 2, axis=1)
    across = _attend(ring, q_halves[1], segment_halves[1], low, places.across)
    q_picked, picked_segments, picked = places.pick(
        (q_halves[0], segment_halves[0], low), (q_halves[1], segment_halves[1], high)
    )
    out, lse = _attend(ring, q_picked, picked_segments, picked, places.along)
    unseen = jnp.zeros_like(out), jnp.full_like(lse, UNSEEN)
    return _join(places.pick((out, lse), unseen), _merge(across, places.pick(unseen, (out, lse))))


def _meet_backward(ring: _Ring, rows, segments, visitor: _Visitor, s):
    """(dq, (dk, dv)) of a later step, float32."""
    if not ring.zigzag:
        offset, visible = _distance(ring, rows[0], s)
        seen = lambda: _attend_backward(ring, rows, segments, visitor, offset)
        return seen() if not ring.causal else jax.lax.cond(visible, seen, lambda: _zeros(seen, rows[0]))
    places, (low, high), (rows_low, rows_high) = _zigzag_step(ring, rows[0], s), _halves(visitor), _split_rows(rows)
    segment_halves = (None, None) if segments is None else jnp.split(segments, 2, axis=1)
    dq_across, dkv_across = _attend_backward(ring, rows_high, segment_halves[1], low, places.across)
    picked_rows, picked_segments, picked = places.pick(
        (rows_low, segment_halves[0], low), (rows_high, segment_halves[1], high)
    )
    along = _attend_backward(ring, picked_rows, picked_segments, picked, places.along)
    zeros = jax.tree.map(jnp.zeros_like, along)
    (dq_low, dkv_low), (dq_high, dkv_high) = places.pick(along, zeros), places.pick(zeros, along)
    dkv = jax.tree.map(lambda a, b, c: jnp.concatenate([a + b, c], axis=1), dkv_across, dkv_low, dkv_high)
    return jnp.concatenate([dq_low, dq_across + dq_high], axis=1), dkv


class _ZigzagStep(NamedTuple):
    """The two visible pairs: always the high queries with the low keys, and low with low or high with high."""

    across: Array  # offset of the first pair
    along: Array  # of the second
    before: Array  # the visitor's low chunk lies before ours: low with low is what is seen

    def pick(self, low, high):
        return jax.tree.map(partial(jnp.where, self.before), low, high)


def _zigzag_step(ring: _Ring, q, s) -> _ZigzagStep:
    n, i, half = jax.lax.axis_size(ring.axis), jax.lax.axis_index(ring.axis), q.shape[1] // 2
    j = (i - s) % n
    return _ZigzagStep((2 * n - 1 - i - j) * half, jnp.abs(i - j) * half, j < i)


def _own_distance(ring: _Ring, low) -> Array:
    """Slots from the start of the low chunk to that of the high one."""
    return (2 * jax.lax.axis_size(ring.axis) - 1 - 2 * jax.lax.axis_index(ring.axis)) * low.shape[1]


def _distance(ring: _Ring, q, s) -> tuple[Array, Array]:
    """(offset, whether a causal query sees anything) for contiguous rows and keys of s devices before, round the
    ring."""
    i, n = jax.lax.axis_index(ring.axis), jax.lax.axis_size(ring.axis)
    j = (i - s) % n
    return (i - j) * q.shape[1], j < i


def _attend(ring: _Ring, q, segments, visitor: _Visitor, offset):
    return _float32(
        ring.attend(
            q, visitor.k_BSKH, visitor.v_BSKV, offset=offset, q_segments=segments, k_segments=visitor.segments_BS
        )
    )


def _attend_backward(ring: _Ring, rows, segments, visitor: _Visitor, offset):
    q, out, lse, dout = rows
    dq, dk, dv = ring.attend_backward(
        q,
        visitor.k_BSKH,
        visitor.v_BSKV,
        out,
        lse,
        dout,
        offset=offset,
        q_segments=segments,
        k_segments=visitor.segments_BS,
    )
    return _float32((dq, (dk, dv)))


def _merge(a, b):
    """Attention over two sets of keys from that over each: (out float32, lse)."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    return out_a * _by_row(jnp.exp(lse_a - lse)) + out_b * _by_row(jnp.exp(lse_b - lse)), lse


def _by_row(weights_BNT: Array) -> Array:
    return weights_BNT.transpose(0, 2, 1)[..., None]


def _join(low, high):
    return jnp.concatenate([low[0], high[0]], axis=1), jnp.concatenate([low[1], high[1]], axis=2)


def _halves(visitor: _Visitor) -> tuple[_Visitor, _Visitor]:
    half = visitor.k_BSKH.shape[1] // 2
    return jax.tree.map(lambda x: x[:, :half], visitor), jax.tree.map(lambda x: x[:, half:], visitor)


def _split_rows(rows):
    q, out, lse, dout = rows
    parts = [jnp.split(x, 2, axis=1) for x in (q, out)] + [jnp.split(lse, 2, axis=2), jnp.split(dout, 2, axis=1)]
    return tuple(p[0] for p in parts), tuple(p[1] for p in parts)


def _float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _zeros(function, like: Array):
    """Zeros of the shapes that `function` gives, typed as varying where `like` does."""
    return jax.tree.map(lambda x: vary(jnp.zeros(x.shape, x.dtype), varying_axes(like)), jax.eval_shape(function))


def _nothing(function, like: Array):
    out, lse = _zeros(function, like)
    return out, lse + UNSEEN
