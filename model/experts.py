"""Dropless expert computation: sort the (token, choice) pairs by expert, multiply each run by its expert's weights
(pallas_kernels/grouped_matmul), move the results back and sum them with their routing weights. There is no capacity,
and no token is dropped.

Biases are added to the products of a grouped matmul, since none of its kernels takes them. The hidden products are then
written to memory before the activation; without biases they are not.

Shapes: N tokens, C choices per token, E experts of this device, D width, G 2 if gated else 1, F hidden width, S = N * C
slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.mlp import ACTIVATIONS, activate
from pallas_kernels.grouped_matmul import grouped_glu, grouped_matmul

UNROLLED = 8  # up to this many choices the sum is unrolled: one pass over memory, 2.5 times as fast on CPU


class Biases(NamedTuple):
    """Biases of experts, in the dtype of computation."""

    up_EGF: Float[Array, "E G F"]  # on the hidden products, before the activation
    down_ED: Float[Array, "E D"]


class Layout(NamedTuple):
    """The slot of each (token, choice) pair. Runs of experts are in order; pairs of experts on other devices come
    last."""

    slot_NC: Int[Array, "N C"]  # slot of the pair
    pair_S: Int[Array, "S"]  # index in [0, N * C) of the pair in the slot
    sizes_E: Int[Array, "E"]  # pairs of each expert


def layout(indices_NC: Int[Array, "N C"], num_experts: int) -> Layout:
    """Sort the pairs by expert, keeping the order of tokens. Experts outside [0, num_experts) come last."""
    E, S = num_experts, indices_NC.size
    here = (indices_NC >= 0) & (indices_NC < E)
    expert_S = jnp.where(here, indices_NC, E).reshape(-1).astype(jnp.int32)
    number_S = jnp.arange(S, dtype=jnp.int32)
    if (E + 1) * S < 2**31:  # expert and pair in one integer: XLA's CPU sort is four times as fast without a payload
        pair_S = jax.lax.sort(expert_S * S + number_S, is_stable=False) % S
    else:
        pair_S = jnp.argsort(expert_S, stable=True).astype(jnp.int32)
    slot_S = jnp.zeros_like(pair_S).at[pair_S].set(number_S, unique_indices=True)
    sizes_E = jnp.bincount(expert_S, length=E + 1)[:E].astype(jnp.int32)
    return Layout(slot_S.reshape(indices_NC.shape), pair_S, sizes_E)


def _rows(x_ND: Array, index: Array) -> Array:
    return x_ND.at[index].get(mode="fill", fill_value=0)


def _sum(y_SD: Array, slot_NC: Array, weights_NC: Array | None) -> Array:
    """Return the sum over c of y[slot[n, c]] (times weights[n, c]), computed in float32 or wider, in y's dtype."""
    wide, C = jnp.promote_types(y_SD.dtype, jnp.float32), slot_NC.shape[1]
    if C > UNROLLED:
        y_NCD = _rows(y_SD, slot_NC)
        if weights_NC is None:
            return y_NCD.sum(1, dtype=wide).astype(y_SD.dtype)
        return jnp.einsum("ncd,nc->nd", y_NCD, weights_NC, preferred_element_type=wide).astype(y_SD.dtype)
    total = jnp.zeros((), wide)
    for c in range(C):
        y_ND = _rows(y_SD, slot_NC[:, c]).astype(wide)
        total = total + (y_ND if weights_NC is None else y_ND * weights_NC[:, c, None])
    return total.astype(y_SD.dtype)


@jax.custom_vjp
def permute(x_ND: Array, slot_NC: Array, pair_S: Array) -> Array:
    """Return x_SD: each token's row in the slots of its pairs, and zero in empty slots, whose pair is N * C. A pair
    with slot S has no slot. Forward and backward are gathers, never scatters."""
    return _rows(x_ND, pair_S // slot_NC.shape[1])


def _permute_forward(x_ND, slot_NC, pair_S):
    return permute(x_ND, slot_NC, pair_S), slot_NC


def _permute_backward(slot_NC, dx_SD):
    return _sum(dx_SD, slot_NC, None), None, None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def unpermute(y_SD: Array, weights_NC: Array, slot_NC: Array, pair_S: Array) -> Array:
    """Return y_ND: the weighted sum over each token's pairs that have a slot."""
    return _sum(y_SD, slot_NC, weights_NC)


def _unpermute_forward(y_SD, weights_NC, slot_NC, pair_S):
    return unpermute(y_SD, weights_NC, slot_NC, pair_S), (y_SD, weights_NC, slot_NC, pair_S)


def _unpermute_backward(saved, dy_ND):
    y_SD, weights_NC, slot_NC, pair_S = saved
    weight_S = _rows(weights_NC.reshape(-1), pair_S)
    dy_SD = (_rows(dy_ND, pair_S // slot_NC.shape[1]) * weight_S[:, None]).astype(y_SD.dtype)
    dweights_NC = jnp.einsum("ncd,nd->nc", _rows(y_SD, slot_NC), dy_ND, preferred_element_type=jnp.float32)
    return dy_SD, dweights_NC.astype(weights_NC.dtype), None, None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def expert_mlp(
    x_ND: Float[Array, "N D"],
    indices_NC: Int[Array, "N C"],
    weights_NC: Float[Array, "N C"],
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    kind: str,
    implementation: str | None = None,
    biases: Biases | None = None,
) -> Float[Array, "N D"]:
    """Return the sum over choices c of weights[n, c] * MLP of expert indices[n, c] at x[n].

    Indices outside [0, E) belong to experts on other devices and add nothing. Gradients flow to x, weights, up, down
    and biases. `implementation`: that of the grouped matmul (None: the best for the backend), or 'dense', which runs
    every expert on every token as an oracle.
    """
    if implementation == "dense":
        return every_expert(x_ND, indices_NC, weights_NC, up_EDGF, down_EFD, kind, biases)
    plan = layout(indices_NC, up_EDGF.shape[0])
    x_SD = permute(x_ND, plan.slot_NC, plan.pair_S)
    y_SD = grouped_mlp(x_SD, plan.sizes_E, up_EDGF, down_EFD, kind, implementation, biases)
    return unpermute(y_SD, weights_NC, plan.slot_NC, plan.pair_S)


def grouped_mlp(
    x_SD: Float[Array, "S D"],
    sizes_E: Int[Array, "E"],
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    kind: str,
    implementation: str | None = None,
    biases: Biases | None = None,
) -> Float[Array, "S D"]:
    """Apply each expert's MLP to its run of rows, starting with expert 0. Rows after the last run give zeros."""
    if biases is not None:
        (S, _), (E, D, G, F) = x_SD.shape, up_EDGF.shape
        run_SE = _runs(sizes_E, S).astype(x_SD.dtype)
        h_SX = grouped_matmul(x_SD, up_EDGF.reshape(E, D, G * F), sizes_E, implementation=implementation)
        h_SX = h_SX + _bias_rows(run_SE, biases.up_EGF.reshape(E, G * F))
        h_SF = activate(kind, h_SX.reshape(S, G, F)).astype(x_SD.dtype)
        y_SD = grouped_matmul(h_SF, down_EFD, sizes_E, implementation=implementation)
        return (y_SD + _bias_rows(run_SE, biases.down_ED)).astype(x_SD.dtype)
    h_SF = grouped_glu(x_SD, up_EDGF, sizes_E, ACTIVATIONS[kind], implementation=implementation)
    return grouped_matmul(h_SF, down_EFD, sizes_E, implementation=implementation)


def _runs(sizes_E: Array, S: int) -> Array:
    """Return [S, E]: whether the row is in the expert's run."""
    end_E, row_S1 = jnp.cumsum(sizes_E), jnp.arange(S)[:, None]
    return (row_S1 >= end_E - sizes_E) & (row_S1 < end_E)


def _bias_rows(run_SE: Array, bias_EX: Array) -> Array:
    """Return each row's bias, or zero for a row of no expert, in float32 or wider.

    This is a matmul, because the gradient of a gather would scatter into few distinct rows, and accelerators add such
    updates one after the other and in the dtype of the bias.
    """
    wide = jnp.promote_types(bias_EX.dtype, jnp.float32)
    return jnp.dot(run_SE, bias_EX, precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)


def every_expert(
    x_ND: Float[Array, "N D"],
    indices_NC: Int[Array, "N C"],
    weights_NC: Float[Array, "N C"],
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    kind: str,
    biases: Biases | None = None,
) -> Float[Array, "N D"]:
    """Do the same as `expert_mlp` by running every expert on every token: simple, at E / C times the FLOPs."""
    h_ENGF = jnp.einsum("nd,edgf->engf", x_ND, up_EDGF)
    if biases is not None:
        h_ENGF = h_ENGF + biases.up_EGF[:, None]
    y_END = jnp.einsum("enf,efd->end", activate(kind, h_ENGF), down_EFD)
    if biases is not None:
        y_END = y_END + biases.down_ED[:, None]
    gate_EN = (jax.nn.one_hot(indices_NC, up_EDGF.shape[0], axis=0) * weights_NC).sum(-1).astype(x_ND.dtype)
    return jnp.einsum("end,en->nd", y_END, gate_EN)
