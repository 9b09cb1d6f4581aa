"""Experts with a fixed capacity: each has a buffer of `capacity` rows per sequence. One-hot matmuls (GShard, Lepikhin
et al. 2020, sec. 3.2) or gathers fill the buffers from the tokens and combine the results into them.

Empty rows are computed too: the cost depends on the capacity and not on the router, and all shapes are known at compile
time. On a mesh, buffers start on the devices of their sequence, are resharded so that experts lie over their mesh axes
(the all-to-all of GShard), multiplied, and resharded back.

Shapes: B batch, T time, D width, E experts, C choices of a token, P rows of a buffer, S = E * B * P, G 2 if gated else
1, F hidden width, N = B * T.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from model.experts import Biases, permute, unpermute
from model.mlp import activate
from sharding.manual import vary, varying_axes
from sharding.rules import ShardingRules, no_mesh, reshard

How = Literal["gather", "einsum"]


def buffered_experts(
    x_BTD: Float[Array, "B T D"],
    indices_BTC: Int[Array, "B T C"],
    weights_BTC: Float[Array, "B T C"],
    position_BTC: Int[Array, "B T C"],
    capacity: int,
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    kind: str,
    rules: ShardingRules,
    how: How,
    biases: Biases | None = None,
) -> Float[Array, "B T D"]:
    """Return the sum over choices c of weights[b, t, c] * MLP of expert indices[b, t, c] at x[b, t]; index E adds
    nothing.

    `position_BTC`: the row of each choice in its expert's buffer for the sequence, in [0, capacity) and unique there;
    ignored for index E (model/capacity.py). Gradients flow to x, weights, up, down and biases. With 'einsum' a
    non-finite token makes its whole sequence non-finite, since 0 * NaN is NaN; with 'gather' it affects itself alone.
    """
    E = up_EDGF.shape[0]
    fill = partial(_fill if how == "gather" else _fill_by_matmul, experts=E, capacity=capacity)
    combine = _combine if how == "gather" else _combine_by_matmul
    if no_mesh():
        buffer_EBPD = fill(x_BTD, indices_BTC, position_BTC)
        return combine(_mlp(buffer_EBPD, up_EDGF, down_EFD, biases, kind), weights_BTC, indices_BTC, position_BTC)

    x, indices, weights, position = (
        reshard(y, rules, "batch", None, None) for y in (x_BTD, indices_BTC, weights_BTC, position_BTC)
    )
    tokens, buffers = (
        rules.spec("activations", ("batch", None, None)),
        rules.spec("activations", (None, "batch", None, None)),
    )
    sharded_experts = _expert_spec(rules, capacity)
    buffer_EBPD = jax.shard_map(fill, in_specs=(tokens, tokens, tokens), out_specs=buffers)(x, indices, position)
    buffer_EBPD = jax.sharding.reshard(buffer_EBPD, sharded_experts)
    y_EBPD = _mlp(buffer_EBPD, up_EDGF, down_EFD, biases, kind, sharded_experts, rules)
    y_EBPD = jax.sharding.reshard(y_EBPD, buffers)
    out = jax.shard_map(combine, in_specs=(buffers, tokens, tokens, tokens), out_specs=tokens)(
        y_EBPD, weights, indices, position
    )
    return reshard(out, rules, "batch", "sequence", None)


def _expert_spec(rules: ShardingRules, capacity: int) -> PartitionSpec:
    """Return the layout of buffers [E, B, P, D] while experts compute: experts over their axes, sequences over the
    remaining batch axes, and rows over the sequence axes if those divide them (otherwise the devices of a sequence
    repeat each other's work)."""
    a, sizes = rules.activations, jax.sharding.get_abstract_mesh().shape
    batch = tuple(axis for axis in a.batch if axis not in a.expert)
    rows = tuple(axis for axis in a.sequence if axis not in a.expert)
    if capacity % math.prod(sizes[axis] for axis in rows):
        rows = ()
    return PartitionSpec(a.expert or None, batch or None, rows or None, None)


def _mlp(
    buffer_EBPD: Array, up_EDGF: Array, down_EFD: Array, biases: Biases | None, kind: str,
    spec: PartitionSpec | None = None, rules: ShardingRules | None = None,
) -> Array:  # fmt: skip
    """Apply each expert's MLP to its buffers. On a mesh they are sharded as `spec`."""
    E, B, P, D = buffer_EBPD.shape
    G, F = up_EDGF.shape[2:]
    if spec is None or rules is None:  # as matrices: faster on CPU
        h_EXGF = (buffer_EBPD.reshape(E, B * P, D) @ up_EDGF.reshape(E, D, G * F)).reshape(E, B * P, G, F)
        if biases is None:
            return (activate(kind, h_EXGF) @ down_EFD).reshape(E, B, P, D)
        h_EXF = activate(kind, h_EXGF + biases.up_EGF[:, None])
        return (h_EXF @ down_EFD + biases.down_ED[:, None]).reshape(E, B, P, D)
    dims = (((3,), (1,)), ((0,), (0,)))
    hidden = PartitionSpec(*spec[:3], None, rules.activations.mlp or None)
    h_EBPGF = jax.lax.dot_general(buffer_EBPD, up_EDGF, dims, out_sharding=hidden)
    if biases is None:
        return jax.lax.dot_general(activate(kind, h_EBPGF), down_EFD, dims, out_sharding=spec)
    h_EBPF = activate(kind, h_EBPGF + biases.up_EGF[:, None, None])
    return jax.lax.dot_general(h_EBPF, down_EFD, dims, out_sharding=spec) + biases.down_ED[:, None, None]


def _fill(x_BTD: Array, indices_BTC: Array, position_BTC: Array, *, experts: int, capacity: int) -> Array:
    """Return buffers [E, B, P, D] with each token in the rows of its choices and zeros elsewhere."""
    B, T, D = x_BTD.shape
    slot_NC, pair_S = _slots(indices_BTC, position_BTC, experts, capacity)
    return permute(x_BTD.reshape(B * T, D), slot_NC, pair_S).reshape(experts, B, capacity, D)


def _combine(y_EBPD: Array, weights_BTC: Array, indices_BTC: Array, position_BTC: Array) -> Array:
    """Return the weighted sum of each token's choices, [B, T, D]."""
    E, B, P, D = y_EBPD.shape
    slot_NC, pair_S = _slots(indices_BTC, position_BTC, E, P)
    weights_NC = weights_BTC.reshape(slot_NC.shape)
    return unpermute(y_EBPD.reshape(E * B * P, D), weights_NC, slot_NC, pair_S).reshape(*indices_BTC.shape[:2], D)


def _slots(indices_BTC: Array, position_BTC: Array, E: int, P: int) -> tuple[Array, Array]:
    """Return (slot [N, C] of each choice in [0, S), S for a choice without one; choice [S] of each slot in [0, N * C),
    N * C for an empty slot)."""
    B, T, C = indices_BTC.shape
    slots, pairs = E * B * P, B * T * C
    row_B11 = jnp.arange(B, dtype=jnp.int32)[:, None, None]
    taken = (indices_BTC >= 0) & (indices_BTC < E) & (position_BTC < P)
    slot_NC = (
        jnp.where(taken, (indices_BTC * B + row_B11) * P + position_BTC, slots).reshape(B * T, C).astype(jnp.int32)
    )
    empty_S = vary(jnp.full(slots, pairs, jnp.int32), varying_axes(slot_NC))
    pair_S = empty_S.at[slot_NC.reshape(-1)].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")
    return slot_NC, pair_S


def _one_hots(indices_BTC: Array, position_BTC: Array, E: int, P: int, dtype) -> tuple[Array, Array]:
    return jax.nn.one_hot(indices_BTC, E, dtype=dtype), jax.nn.one_hot(position_BTC, P, dtype=dtype)


def _fill_by_matmul(x_BTD: Array, indices_BTC: Array, position_BTC: Array, *, experts: int, capacity: int) -> Array:
    """Do the same as `_fill`, with GShard's mask [B, T, E, P]."""
    expert_BTCE, position_BTCP = _one_hots(indices_BTC, position_BTC, experts, capacity, x_BTD.dtype)
    mask_BTEP = jnp.einsum("btce,btcp->btep", expert_BTCE, position_BTCP)
    return jnp.einsum("btep,btd->ebpd", mask_BTEP, x_BTD)


def _combine_by_matmul(y_EBPD: Array, weights_BTC: Array, indices_BTC: Array, position_BTC: Array) -> Array:
    """Do the same as `_combine`, with GShard's combine weights [B, T, E, P]."""
    E, _, P, _ = y_EBPD.shape
    expert_BTCE, position_BTCP = _one_hots(indices_BTC, position_BTC, E, P, weights_BTC.dtype)
    combine_BTEP = jnp.einsum("btce,btcp->btep", expert_BTCE * weights_BTC[..., None], position_BTCP)
    return jnp.einsum("btep,ebpd->btd", combine_BTEP.astype(y_EBPD.dtype), y_EBPD)
