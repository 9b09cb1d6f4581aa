"""Tokens to the devices that hold their experts, and back: the all-to-all of expert parallelism (Lepikhin et al. 2020, GShard,
sec. 3.3), without a token that is dropped.

A device sends each of its pairs (token, choice) to the device of the expert; results come back, are weighed and summed at the
source, so that routing weights never travel. Buffers have a fixed size. What exceeds it goes in further rounds of the same
exchange, as many as the fullest buffer needs (all devices agree on the number, which is 1 for a balanced router); those rounds
are computed anew in the backward pass, and so memory stays what one round takes.

Two carriers:
- padded (every backend): `all_to_all` of equal parts, one for each peer, of `room / peers` rows.
- ragged (TPUs, GPUs): `jax.lax.ragged_all_to_all` sends what there is, into one buffer of `room` rows. XLA:CPU lacks it.

Shapes: N tokens of this device, C choices, P peers, A pairs (N * C), D width, E experts here, G 2 if gated else 1, F hidden
width, S rows to send, R rows received.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model.experts import collect, spread
from pallas_kernels.target import target

ROW_MULTIPLE = 8  # buffers are whole tiles of a TPU's memory
Experts = Callable[[Array, Array, Array, Array], Array]  # (x_RD, local expert of each row [R], up, down) -> y_RD


class Plan(NamedTuple):
    """The pairs of a device in order of their destination, and how many there are for and from whom."""

    order_A: Int[Array, "A"]  # pair at each place of that order; those that go nowhere at the end
    place_NC: Int[Array, "N C"]  # place of each pair in that order; A for those that go nowhere
    expert_A: Int[Array, "A"]  # expert of each pair, in pair order, as its device counts them
    counts_P: Int[Array, "P"]  # pairs for each peer
    sent_PP: Int[Array, "P P"] | None  # [source, destination], of the whole group; ragged alone


def make_plan(indices_NC: Int[Array, "N C"], peers: int, experts: int) -> Plan:
    """Sorts the pairs by destination, in the order of tokens. `experts`: of one device. Indices outside go nowhere."""
    A = indices_NC.size
    index_A = indices_NC.reshape(-1)
    peer_A = jnp.where((index_A >= 0) & (index_A < peers * experts), index_A // experts, peers)
    order_A = jnp.argsort(peer_A, stable=True).astype(jnp.int32)
    place_A = jnp.zeros(A, jnp.int32).at[order_A].set(jnp.arange(A, dtype=jnp.int32), unique_indices=True)
    place_A = jnp.where(peer_A < peers, place_A, A)
    counts_P = (peer_A[:, None] == jnp.arange(peers)).sum(0, dtype=jnp.int32)
    return Plan(order_A, place_A.reshape(indices_NC.shape), (index_A % experts).astype(jnp.int32), counts_P, None)


def room(pairs: int, tokens: int, choices: int, experts: int, peers: int, factor: float) -> int:
    """Rows of the receiving buffer for an even share of `pairs`, times `factor`: whole tiles for each peer, and no more than
    can arrive (a token's choices are distinct)."""
    most = tokens * min(choices, experts)
    share = -(-math.ceil(factor * pairs / peers) // ROW_MULTIPLE) * ROW_MULTIPLE
    return peers * max(1, min(share, most))


def exchanged_experts(
    x_ND: Float[Array, "N D"],
    indices_NC: Int[Array, "N C"],
    weights_NC: Float[Array, "N C"],
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    experts: Experts,
    *,
    axes: tuple[str, ...],
    agree: tuple[str, ...],
    factor: float,
    ragged: bool | None = None,
) -> Float[Array, "N D"]:
    """sum over choices c of weights[n, c] * MLP of expert indices[n, c] at x[n]: to be called inside shard_map (unchecked).

    The experts lie over the devices along `axes`, device i holding those from i * E on; indices outside [0, P * E) add nothing.
    `experts(x_RD, expert_R, up, down)`: the MLP of each row's expert, in [0, E), or E: such rows may give anything finite.
    `agree`: mesh axes along which devices may have other tokens. `factor`: room of the buffers, in even shares.
    `ragged`: None for the carrier that the backend has.
    Gradients flow to x, weights, up and down. Pairs come back to their tokens exactly; the sum is in the order of choices.
    """
    peers, E = jax.lax.axis_size(axes), up_EDGF.shape[0]
    rows = room(indices_NC.size, *indices_NC.shape, E, peers, factor)
    plan = make_plan(indices_NC, peers, E)
    ragged = target()[0] in ("tpu", "gpu", "cuda") if ragged is None else ragged
    if ragged:
        plan = plan._replace(sent_PP=jax.lax.all_gather(plan.counts_P, axes))
        needed = -(-plan.sent_PP.sum(0).max() // rows)
    else:
        needed = -(-plan.counts_P.max() // (rows // peers))
    needed = jax.lax.pmax(needed, agree) if agree else needed
    step = partial(_round, _Static(experts, axes, rows, E))
    return _rounds(step, needed, plan, (x_ND, weights_NC, up_EDGF, down_EFD))


class _Static(NamedTuple):
    experts: Experts
    axes: tuple[str, ...]
    rows: int
    E: int


def _round(static: _Static, r: int | Array, plan: Plan, x_ND, weights_NC, up, down) -> Array:
    """What the pairs of round r add: those are the pairs that the first r rounds left and the buffers hold."""
    there, back = (_padded if plan.sent_PP is None else _ragged)(static, r, plan)
    slot_NC, pair_S = there.slot_NC, there.pair_S
    expert_S = plan.expert_A.at[pair_S].get(mode="fill", fill_value=static.E)
    x_RD = checkpoint_name(there.carry(spread(x_ND, slot_NC, pair_S, weights_NC.shape[1]), 0), "expert_in")
    y_RD = static.experts(x_RD, there.carry(expert_S, static.E), up, down)
    y_SD = checkpoint_name(back(y_RD, 0), "expert_out")
    return collect(y_SD, weights_NC, slot_NC, pair_S)


class _There(NamedTuple):
    slot_NC: Array  # row to send of each pair; out of range for those that are not of this round
    pair_S: Array  # pair of each row to send; out of range for empty ones
    carry: Callable[[Array, int], Array]  # (rows to send, what fills rows that nothing arrives in) -> rows received


def _padded(static: _Static, r, plan: Plan) -> tuple[_There, Callable[[Array, int], Array]]:
    peers, A = plan.counts_P.shape[0], plan.order_A.shape[0]
    bound = static.rows // peers
    first_P = jnp.cumsum(plan.counts_P) - plan.counts_P
    within_PS = r * bound + jnp.arange(bound, dtype=jnp.int32)[None]
    pair_PS = plan.order_A.at[first_P[:, None] + within_PS].get(mode="fill", fill_value=A)
    pair_S = jnp.where(within_PS < plan.counts_P[:, None], pair_PS, A).reshape(-1)
    peer_NC = jnp.searchsorted(first_P, plan.place_NC, side="right").astype(jnp.int32) - 1
    within_NC = plan.place_NC - first_P[peer_NC] - r * bound
    here = (plan.place_NC < A) & (within_NC >= 0) & (within_NC < bound)
    slot_NC = jnp.where(here, peer_NC * bound + within_NC, static.rows)

    def carry(rows, fill):
        del fill  # empty rows are sent too
        return jax.lax.all_to_all(rows, static.axes, 0, 0, tiled=True)

    return _There(slot_NC, pair_S, carry), carry


def _ragged(static: _Static, r, plan: Plan) -> tuple[_There, Callable[[Array, int], Array]]:
    """Rows arrive in the order of sources and, of a source, of tokens: round r takes those from r * rows on."""
    A, sent = plan.order_A.shape[0], plan.sent_PP
    assert sent is not None
    me = jax.lax.axis_index(static.axes)
    leave = jnp.cumsum(sent, 1) - sent  # where in the source's order the pairs for a destination start
    arrive = jnp.cumsum(sent, 0) - sent  # where in the destination's
    low, high = (jnp.clip(limit * static.rows - arrive, 0, sent) for limit in (r, r + 1))
    sizes = high - low
    source, destination = leave + low, jnp.clip(arrive + low - r * static.rows, 0, static.rows)
    there = (source[me], sizes[me], destination[me], sizes[:, me])
    home = (destination[:, me], sizes[:, me], source[:, me], sizes[me])
    pair_S = jnp.where(jnp.arange(A) < plan.counts_P.sum(), plan.order_A, A)
    return _There(
        plan.place_NC, pair_S, lambda rows, fill: carry_ragged(static.axes, static.rows, fill, rows, there, home)
    ), lambda rows, fill: carry_ragged(static.axes, A, fill, rows, home, there)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def carry_ragged(axes: tuple[str, ...], size: int, fill: int, rows: Array, there: tuple, home: tuple) -> Array:
    """`rows` sent as `there` says (input offsets, send sizes, output offsets, receive sizes of `jax.lax.ragged_all_to_all`)
    into a buffer of `size` rows of `fill`. The gradient takes the way `home`; that of rows that are not sent is zero."""
    out = jnp.full((size, *rows.shape[1:]), fill, rows.dtype)
    return jax.lax.ragged_all_to_all(rows, out, *there, axis_name=axes)


def _carry_ragged_forward(axes, size, fill, rows, there, home):
    return carry_ragged(axes, size, fill, rows, there, home), (there, home, rows.shape[0])


def _carry_ragged_backward(axes, size, fill, saved, dout):
    there, home, rows = saved
    return carry_ragged(axes, rows, 0, dout, home, there), None, None


carry_ragged.defvjp(_carry_ragged_forward, _carry_ragged_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(step: Callable, needed: Array, plan: Any, inputs: tuple) -> Array:
    """sum of step(r, plan, *inputs) over r < max(needed, 1). What the backward pass needs of the first is kept; later
    rounds are computed anew."""
    return _further(step, needed, plan, inputs, step(0, plan, *inputs))


def _further(step, needed, plan, inputs, y):
    return jax.lax.while_loop(
        lambda carry: carry[0] < needed,
        lambda carry: (carry[0] + 1, carry[1] + step(carry[0], plan, *inputs)),
        (jnp.int32(1), y),
    )[1]


def _rounds_forward(step, needed, plan, inputs):
    y, pull = jax.vjp(lambda *inputs: step(0, plan, *inputs), *inputs)
    return _further(step, needed, plan, inputs, y), (pull, needed, plan, inputs)


def _rounds_backward(step, saved, dy):
    pull, needed, plan, inputs = saved

    def more(carry):
        r, gradients = carry
        _, pull = jax.vjp(lambda *inputs: step(r, plan, *inputs), *inputs)
        return r + 1, jax.tree.map(jnp.add, gradients, pull(dy))

    _, gradients = jax.lax.while_loop(lambda carry: carry[0] < needed, more, (jnp.int32(1), pull(dy)))
    return None, None, gradients


_rounds.defvjp(_rounds_forward, _rounds_backward)
