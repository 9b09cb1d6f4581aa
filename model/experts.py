"""Dropless expert computation: sort the (token, choice) pairs by expert, multiply each run by its expert's weights,
put the results back and sum them by their routing weights. No capacity, no dropped token.

`implementation`: 'ragged' (`jax.lax.ragged_dot`, for accelerators), 'blocked' (each expert's run padded to whole blocks of
rows, a loop over just the blocks that are filled; for CPUs, where ragged_dot costs about twice as much), or 'dense' (every
expert on every token, the oracle).

Shapes: N tokens, C choices per token, E experts here, D width, G 2 if gated else 1, F hidden width, S slots: sorted pairs.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.mlp import activate
from sharding.manual import vary, varying_axes

Implementation = Literal["ragged", "blocked", "dense"]
BLOCK_ROWS = 192  # rows of a block: padding wastes half a block an expert, small blocks waste matmul efficiency


class Layout(NamedTuple):
    """Where each (token, choice) pair goes. Runs of experts are in order; each starts at a multiple of the block."""

    slot_NC: Int[Array, "N C"]  # slot of the pair; S (out of range) for pairs whose expert is not here
    pair_S: Int[Array, "S"]  # index in N * C of the pair in the slot; N * C (out of range) for padding
    sizes_E: Int[Array, "E"]  # pairs of each expert
    starts_E: Int[Array, "E"]  # first slot of each expert


def layout(indices_NC: Int[Array, "N C"], num_experts: int, block: int) -> Layout:
    """Sorts the pairs by expert, keeping the order of tokens. Experts outside [0, num_experts) are left out."""
    N, C = indices_NC.shape
    pairs = N * C
    here = (indices_NC >= 0) & (indices_NC < num_experts)
    expert_P = jnp.where(here, indices_NC, num_experts).reshape(-1)
    order_P = jnp.argsort(expert_P, stable=True)
    sizes_E = jnp.bincount(expert_P, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    padded_E = -(-sizes_E // block) * block
    starts_E = jnp.cumsum(padded_E) - padded_E
    slots = -(-(pairs + num_experts * (block - 1)) // block) * block
    shift_E = jnp.append(starts_E - (jnp.cumsum(sizes_E) - sizes_E), 0)
    sorted_expert_P = expert_P[order_P]
    slot_of_sorted_P = jnp.arange(pairs, dtype=jnp.int32) + shift_E[sorted_expert_P]
    slot_of_sorted_P = jnp.where(sorted_expert_P < num_experts, slot_of_sorted_P, slots)
    pair_S = jnp.full(slots, pairs, jnp.int32).at[slot_of_sorted_P].set(order_P.astype(jnp.int32), mode="drop")
    slot_P = jnp.zeros(pairs, jnp.int32).at[order_P].set(slot_of_sorted_P)
    return Layout(slot_P.reshape(N, C), pair_S, sizes_E, starts_E)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def spread(x_ND: Array, slot_NC: Array, pair_S: Array, choices: int) -> Array:
    """x_SD: each token's row in the slots of its pairs, zeros in padding. Both directions are gathers, never scatters."""
    return x_ND.at[pair_S // choices].get(mode="fill", fill_value=0)


def _spread_forward(x_ND, slot_NC, pair_S, choices):
    return spread(x_ND, slot_NC, pair_S, choices), slot_NC


def _spread_backward(choices, slot_NC, dx_SD):
    dx_ND = dx_SD.at[slot_NC].get(mode="fill", fill_value=0).sum(1)
    return dx_ND, None, None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def collect(y_SD: Array, weights_NC: Array, slot_NC: Array, pair_S: Array) -> Array:
    """y_ND: the weighted sum of each token's pairs; pairs that are not here count nothing."""
    y_NCD = y_SD.at[slot_NC].get(mode="fill", fill_value=0)
    return jnp.einsum("ncd,nc->nd", y_NCD, weights_NC.astype(y_SD.dtype))


def _collect_forward(y_SD, weights_NC, slot_NC, pair_S):
    return collect(y_SD, weights_NC, slot_NC, pair_S), (y_SD, weights_NC, slot_NC, pair_S)


def _collect_backward(saved, dy_ND):
    y_SD, weights_NC, slot_NC, pair_S = saved
    weight_S = weights_NC.reshape(-1).at[pair_S].get(mode="fill", fill_value=0).astype(dy_ND.dtype)
    dy_SD = dy_ND.at[pair_S // slot_NC.shape[1]].get(mode="fill", fill_value=0) * weight_S[:, None]
    y_NCD = y_SD.at[slot_NC].get(mode="fill", fill_value=0)
    dweights_NC = jnp.einsum("ncd,nd->nc", y_NCD, dy_ND, preferred_element_type=jnp.float32)
    return dy_SD, dweights_NC.astype(weights_NC.dtype), None, None


collect.defvjp(_collect_forward, _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blocked_ffn(x_SD, up_EDX, down_EFD, sizes_E, starts_E, kind: str, block: int):
    """The experts' MLP on sorted rows, block by block; X = G * F. Padding rows of filled blocks are computed, empty blocks
    are not."""
    return _blocked_forward(x_SD, up_EDX, down_EFD, sizes_E, starts_E, kind, block)[0]


def _hidden(kind: str, h_X: Array, F: int) -> Array:
    return activate(kind, h_X.reshape(*h_X.shape[:-1], h_X.shape[-1] // F, F))


def _blocked_forward(x_SD, up_EDX, down_EFD, sizes_E, starts_E, kind, block):
    F = down_EFD.shape[1]

    def expert(carry, scanned):
        e, size, start = scanned

        def run(carry):
            up_DX, down_FD = (jax.lax.dynamic_index_in_dim(w, e, keepdims=False) for w in (up_EDX, down_EFD))

            def rows(i, carry):
                y_SD, h_SX = carry
                first = start + i * block
                x = jax.lax.dynamic_slice_in_dim(x_SD, first, block)
                h = x @ up_DX
                y = _hidden(kind, h, F) @ down_FD
                y_SD = jax.lax.dynamic_update_slice_in_dim(y_SD, y, first, 0)
                return y_SD, jax.lax.dynamic_update_slice_in_dim(h_SX, h, first, 0)

            return jax.lax.fori_loop(0, -(-size // block), rows, carry)

        # An expert without tokens, as most are in decoding, is not read.
        return jax.lax.cond(size > 0, run, lambda carry: carry, carry), None

    S = x_SD.shape[0]
    carry = (jnp.zeros_like(x_SD), jnp.zeros((S, up_EDX.shape[2]), x_SD.dtype))
    carry = jax.tree.map(lambda c: vary(c, varying_axes(x_SD)), carry)
    (y_SD, h_SX), _ = jax.lax.scan(expert, carry, (jnp.arange(sizes_E.shape[0]), sizes_E, starts_E))
    return y_SD, (x_SD, h_SX, up_EDX, down_EFD, sizes_E, starts_E)


def _blocked_backward(kind, block, saved, dy_SD):
    x_SD, h_SX, up_EDX, down_EFD, sizes_E, starts_E = saved
    F = down_EFD.shape[1]

    def expert(dx_SD, scanned):
        up_DX, down_FD, size, start = scanned

        def rows(i, carry):
            dx_SD, dup_DX, ddown_FD = carry
            first = start + i * block
            x, h, dy = (jax.lax.dynamic_slice_in_dim(y, first, block) for y in (x_SD, h_SX, dy_SD))
            hidden, pull = jax.vjp(lambda h: _hidden(kind, h, F), h)
            (dh,) = pull(dy @ down_FD.T)
            dx_SD = jax.lax.dynamic_update_slice_in_dim(dx_SD, dh @ up_DX.T, first, 0)
            return dx_SD, dup_DX + x.T @ dh, ddown_FD + hidden.T @ dy

        zeros = (jnp.zeros_like(up_DX), jnp.zeros_like(down_FD))
        dx_SD, dup_DX, ddown_FD = jax.lax.fori_loop(0, -(-size // block), rows, (dx_SD, *zeros))
        return dx_SD, (dup_DX, ddown_FD)

    dx_SD, (dup_EDX, ddown_EFD) = jax.lax.scan(
        expert, jnp.zeros_like(x_SD), (up_EDX, down_EFD, sizes_E, starts_E)
    )
    none = np.zeros(sizes_E.shape, jax.dtypes.float0)
    return dx_SD, dup_EDX, ddown_EFD, none, none


blocked_ffn.defvjp(_blocked_forward, _blocked_backward)


def default_implementation() -> Implementation:
    """The faster of the dropless implementations on the backend at hand."""
    return "blocked" if jax.default_backend() == "cpu" else "ragged"


def expert_mlp(
    x_ND: Float[Array, "N D"],
    indices_NC: Int[Array, "N C"],
    weights_NC: Float[Array, "N C"],
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    kind: str,
    implementation: Implementation | None = None,
) -> Float[Array, "N D"]:
    """sum over choices c of weights[n, c] * MLP of expert indices[n, c] at x[n].

    Indices outside [0, E) belong to experts on other devices and add nothing. Gradients flow to x, weights, up and down.
    """
    implementation = implementation or default_implementation()
    E, D, G, F = up_EDGF.shape
    if implementation == "dense":
        h_ENGF = jnp.einsum("nd,edgf->engf", x_ND, up_EDGF)
        y_END = jnp.einsum("enf,efd->end", activate(kind, h_ENGF), down_EFD)
        gate_EN = (jax.nn.one_hot(indices_NC, E, axis=0) * weights_NC).sum(-1).astype(x_ND.dtype)
        return jnp.einsum("end,en->nd", y_END, gate_EN)
    pairs_per_expert = -(-indices_NC.size // E)
    block = min(BLOCK_ROWS, 1 << (pairs_per_expert - 1).bit_length()) if implementation == "blocked" else 1
    plan = layout(indices_NC, E, block)
    x_SD = spread(x_ND, plan.slot_NC, plan.pair_S, indices_NC.shape[1])
    up_EDX = up_EDGF.reshape(E, D, G * F)
    if implementation == "blocked":
        y_SD = blocked_ffn(x_SD, up_EDX, down_EFD, plan.sizes_E, plan.starts_E, kind, block)
    else:
        h_SX = jax.lax.ragged_dot(x_SD, up_EDX, plan.sizes_E)
        y_SD = jax.lax.ragged_dot(_hidden(kind, h_SX, F), down_EFD, plan.sizes_E)
    return collect(y_SD, weights_NC, plan.slot_NC, plan.pair_S)
