"""Capacity of experts: which choices fit into an expert's buffer, and in which row.

Shapes: B batch, T time, E experts, C choices of a token.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from sharding.rules import no_mesh


def positions_in_experts(
    indices_BTC: Int[Array, "B T C"], num_experts: int, capacity: int | Array
) -> tuple[Int[Array, "B T C"], Int[Array, "B T C"]]:
    """Return (indices, position of each choice among the choices of its expert in its sequence). A choice at position
    `capacity` or later is dropped: its index becomes E. Ignore the position of a choice with index E.

    Earlier tokens come first, so no choice depends on later tokens. (GShard serves all first choices before the second
    ones, which lets later tokens push out second choices of earlier tokens.) A token's choices must be distinct.
    Choices with index E take no position. Memory is O(B T (C + E)). On a mesh, a sharded sequence is gathered first.
    """
    if no_mesh():
        return _positions(indices_BTC, num_experts, capacity)
    spec = jax.typeof(indices_BTC).sharding.spec
    gathered = P(spec[0], None, None)  # only the indices are gathered: a few integers per token
    local = jax.shard_map(
        partial(_positions, num_experts=num_experts, capacity=capacity),
        in_specs=gathered,
        out_specs=(gathered, gathered),
    )
    kept_BTC, position_BTC = local(jax.sharding.reshard(indices_BTC, gathered))
    return jax.sharding.reshard(kept_BTC, spec), jax.sharding.reshard(position_BTC, spec)


def _positions(indices_BTC: Array, num_experts: int, capacity: int | Array) -> tuple[Array, Array]:
    E = num_experts
    chosen_BTE = (indices_BTC[..., None] == jnp.arange(E)).sum(2, dtype=jnp.int32)  # XLA compares and sums in one pass
    before_BTE = jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE
    position_BTC = jnp.take_along_axis(before_BTE, jnp.minimum(indices_BTC, E - 1), axis=2)
    return jnp.where(position_BTC < capacity, indices_BTC, E), position_BTC
