"""The all-to-all of expert parallelism (Lepikhin et al. 2020, GShard, sec. 3.3), without dropped tokens: send tokens to
the devices that hold their experts, and the results back.

A device sends each of its pairs (token, choice) to the device of the expert. Results come back and are weighted and
summed at the source, so routing weights are never sent. Buffers have a fixed size. Pairs that exceed it go in overflow
rounds of the same exchange, as many as the fullest buffer needs (all devices agree on the number; a balanced router
needs 1 round in all). The backward pass recomputes the overflow rounds, so memory does not grow with them.

Two transports:
- padded (every backend): an `all_to_all` of equal parts, one per peer, of `buffer_rows / peers` rows.
- ragged (TPUs): `jax.lax.ragged_all_to_all` sends only the actual pairs, into one buffer of `buffer_rows` rows. XLA:CPU
  lacks it. It has not been run on GPUs, so they use the padded transport unless asked.

Rows that a device sends in each direction: padded (P - 1) / P * factor * k * N, ragged about (P - 1) / P * k * N, while
gathering the tokens takes (P - 1) * N. With more choices than peers, gathering therefore sends less, but each device
then sorts P times as many pairs.

Shapes: N tokens of this device, C choices, P peers, A pairs (N * C), D width, E experts of this device, G 2 if gated
else 1, F hidden width, S rows to send, R rows received.
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

from model.experts import permute, unpermute
from pallas_kernels.target import target

ROW_MULTIPLE = 8  # buffers are whole tiles of a TPU's memory
Experts = Callable[..., Array]  # (x_RD, local expert of each row [R], up, down, *more) -> y_RD


class Plan(NamedTuple):
    """The pairs of a device sorted by expert, and so by destination, with the number of pairs that every device has for
    every expert. From these counts a device computes the expert of each row that it receives."""

    order_A: Int[Array, "A"]  # pairs in sorted order; pairs without an expert come last
    place_NC: Int[Array, "N C"]  # index of each pair in that order; A for pairs without an expert
    peer_NC: Int[Array, "N C"]  # destination of each pair; P for pairs without an expert
    counts_PPE: Int[Array, "P P E"]  # pairs by [source, destination, expert of the destination]


def make_plan(indices_NC: Int[Array, "N C"], peers: int, experts: int, axes: tuple[str, ...]) -> Plan:
    """Sort the pairs by expert, keeping the order of tokens, and gather the counts of all peers along `axes`.

    `experts`: number of experts per device. Pairs with an index outside [0, peers * experts) are not sent.
    """
    A, last = indices_NC.size, peers * experts
    index_A = jnp.where((indices_NC >= 0) & (indices_NC < last), indices_NC, last).reshape(-1).astype(jnp.int32)
    order_A = jnp.argsort(index_A, stable=True).astype(jnp.int32)
    place_A = jnp.zeros(A, jnp.int32).at[order_A].set(jnp.arange(A, dtype=jnp.int32), unique_indices=True)
    place_A = jnp.where(index_A < last, place_A, A)
    first_X = jnp.searchsorted(index_A[order_A], jnp.arange(last + 1)).astype(jnp.int32)
    counts_PE = jnp.diff(first_X).reshape(peers, experts)
    counts_PPE = jax.lax.all_gather(counts_PE, axes)
    return Plan(order_A, place_A.reshape(indices_NC.shape), (index_A // experts).reshape(indices_NC.shape), counts_PPE)


def buffer_rows(pairs: int, tokens: int, choices: int, experts: int, peers: int, factor: float) -> int:
    """Return the rows of the receiving buffer: an even share of `pairs` times `factor`, rounded up to whole tiles per
    peer. A peer gets no more rows than it can send (a token's choices are distinct)."""
    most = tokens * min(choices, experts)
    share = -(-math.ceil(factor * pairs / peers) // ROW_MULTIPLE) * ROW_MULTIPLE
    return peers * max(1, min(share, most))


def overflow_rounds(counts_PPE: Int[Array, "P P E"], rows: int, ragged: bool) -> Int[Array, ""]:
    """Return the number of rounds that send every pair through buffers of `rows` rows; 0 only if there are no pairs."""
    sent_PP = counts_PPE.sum(-1)
    return -(-sent_PP.sum(0).max() // rows) if ragged else -(-sent_PP.max() // (rows // counts_PPE.shape[0]))


def exchanged_experts(
    x_ND: Float[Array, "N D"],
    indices_NC: Int[Array, "N C"],
    weights_NC: Float[Array, "N C"],
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    experts: Experts,
    *more: Array,
    axes: tuple[str, ...],
    agree: tuple[str, ...],
    factor: float,
    ragged: bool | None = None,
) -> Float[Array, "N D"]:
    """Return the sum over choices c of weights[n, c] * MLP of expert indices[n, c] at x[n]. Call it inside shard_map
    with check_vma=False.

    The experts are sharded over the devices along `axes`: device i holds experts i * E to i * E + E - 1. Indices
    outside [0, P * E) add nothing.

    `experts(x_RD, expert_R, up, down, *more)`: returns the MLP of each row's expert, which is in [0, E), or E for empty
    rows, whose result may be any finite value. `more`: further arrays of the experts (biases). `agree`: mesh axes along
    which devices may have different tokens. `factor`: buffer size, in even shares. `ragged`: the transport; None:
    ragged on TPUs, padded elsewhere (on GPUs too, where ragged is untested).

    Gradients flow to x, weights, up, down and more. Each result returns to its own token, and the sum runs in the order
    of choices.
    """
    peers, E = jax.lax.axis_size(axes), up_EDGF.shape[0]
    tokens, choices = indices_NC.shape
    rows = buffer_rows(tokens * choices, tokens, choices, E, peers, factor)
    ragged = target()[0] == "tpu" if ragged is None else ragged
    plan = make_plan(indices_NC, peers, E, axes)
    needed = overflow_rounds(plan.counts_PPE, rows, ragged)
    others = tuple(a for a in agree if a not in axes)
    needed = jax.lax.pmax(needed, others) if others else needed
    step = partial(_round, experts, _ragged if ragged else _padded, axes, rows)
    return _rounds(step, needed, plan, (x_ND, weights_NC, up_EDGF, down_EFD, *more))


def _round(
    experts: Experts, transport: Callable, axes, rows: int, r: int | Array, plan: Plan, x_ND, weights_NC, *weights
) -> Array:
    """Return the contribution of the pairs of round r: those that fit into the buffers after r earlier rounds."""
    route = transport(axes, rows, r, plan)
    x_SD = permute(x_ND, route.slot_NC, route.pair_S)
    x_RD = checkpoint_name(route.send(x_SD), "expert_in")
    y_SD = checkpoint_name(route.send_back(experts(x_RD, route.expert_R, *weights)), "expert_out")
    return unpermute(y_SD, weights_NC, route.slot_NC, route.pair_S)


class _Route(NamedTuple):
    """The path of the rows of one round."""

    slot_NC: Array  # row that sends each pair; out of range for pairs of other rounds
    pair_S: Array  # pair in each row to send; out of range for empty rows
    expert_R: Array  # local expert of each received row; E for empty rows
    send: Callable[[Array], Array]  # rows to send -> rows received
    send_back: Callable[[Array], Array]  # results of the rows received -> results in the rows that sent them


def _padded(axes: tuple[str, ...], rows: int, r: int | Array, plan: Plan) -> _Route:
    peers, A = plan.counts_PPE.shape[0], plan.order_A.shape[0]
    me, bound = jax.lax.axis_index(axes), rows // peers
    size_P = plan.counts_PPE[me].sum(-1)
    first_P = jnp.cumsum(size_P) - size_P
    within_B = r * bound + jnp.arange(bound, dtype=jnp.int32)
    pair_PB = plan.order_A.at[first_P[:, None] + within_B].get(mode="fill", fill_value=A)
    pair_S = jnp.where(within_B < size_P[:, None], pair_PB, A).reshape(-1)
    within_NC = plan.place_NC - first_P.at[plan.peer_NC].get(mode="fill", fill_value=0) - r * bound
    here_NC = (plan.peer_NC < peers) & (within_NC >= 0) & (within_NC < bound)
    ends_PE = jnp.cumsum(plan.counts_PPE[:, me], 1)
    expert_R = (within_B[:, None] >= ends_PE[:, None]).sum(-1, dtype=jnp.int32).reshape(-1)
    send = lambda x: jax.lax.all_to_all(x, axes, 0, 0, tiled=True)  # its own inverse
    return _Route(jnp.where(here_NC, plan.peer_NC * bound + within_NC, rows), pair_S, expert_R, send, send)


def _ragged(axes: tuple[str, ...], rows: int, r: int | Array, plan: Plan) -> _Route:
    """Rows arrive ordered by source and then by expert. Round r takes `rows` of them from r * rows on."""
    A, me = plan.order_A.shape[0], jax.lax.axis_index(axes)
    sent_PP, E = plan.counts_PPE.sum(-1), plan.counts_PPE.shape[-1]
    leave = jnp.cumsum(sent_PP, 1) - sent_PP  # start of each destination's pairs in the order of their source
    arrive = jnp.cumsum(sent_PP, 0) - sent_PP  # start of each source's pairs in the order of their destination
    low, high = (jnp.clip(limit * rows - arrive, 0, sent_PP) for limit in (r, r + 1))
    sizes, start, end = high - low, leave + low, jnp.clip(arrive + low - r * rows, 0, rows)
    sending = (start[me], sizes[me], end[me], sizes[:, me])
    returning = (end[:, me], sizes[:, me], start[:, me], sizes[me])
    ends_X = jnp.cumsum(plan.counts_PPE[:, me].reshape(-1))
    run_R = jnp.searchsorted(ends_X, r * rows + jnp.arange(rows), side="right", method="compare_all").astype(jnp.int32)
    return _Route(
        plan.place_NC,  # rows that are not sent come back as zeros
        jnp.where(jnp.arange(A) < sent_PP[me].sum(), plan.order_A, A),
        jnp.where(run_R < ends_X.shape[0], run_R % E, E),
        lambda x: carry_ragged(axes, rows, x, sending, returning),
        lambda y: carry_ragged(axes, A, y, returning, sending),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def carry_ragged(axes: tuple[str, ...], size: int, rows: Array, there: tuple, home: tuple) -> Array:
    """Send `rows` into a buffer of `size` rows, which is zero where nothing arrives.

    `there` holds the input offsets, send sizes, output offsets and receive sizes of `jax.lax.ragged_all_to_all`; `home`
    holds those of the opposite direction, which the gradient takes.
    """
    out = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
    return jax.lax.ragged_all_to_all(rows, out, *there, axis_name=axes)


def _carry_ragged_forward(axes, size, rows, there, home):
    return carry_ragged(axes, size, rows, there, home), (there, home, rows.shape[0])


def _carry_ragged_backward(axes, size, saved, dout):
    there, home, rows = saved
    return carry_ragged(axes, rows, dout, home, there), None, None


carry_ragged.defvjp(_carry_ragged_forward, _carry_ragged_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rounds(step: Callable, needed: Array, plan: Any, inputs: tuple) -> Array:
    """Return the sum of step(r, plan, *inputs) over r < max(needed, 1). The residuals of the first round are kept for
    the backward pass, which recomputes the later rounds."""
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
