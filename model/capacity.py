"""Experts with a bounded number of places: which of the choices find one.

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
    """(indices, place of each choice among those of its expert in its sequence). What comes at place `capacity` or
    later is
    dropped: its index becomes E. The place of a choice with index E means nothing.

    Earlier tokens are served first, and so no choice depends on later tokens. (GShard serves all first choices before
    the second ones, by which later tokens push out the second choices of earlier ones.) A token's choices are distinct;
    what goes nowhere takes no place. Memory is of the order of B T (C + E). Under a mesh a sequence that is spread is
    gathered first.
    """
    if no_mesh():
        return _positions(indices_BTC, num_experts, capacity)
    spec = jax.typeof(indices_BTC).sharding.spec
    whole = P(spec[0], None, None)  # of the indices alone: a few integers a token
    local = jax.shard_map(
        partial(_positions, num_experts=num_experts, capacity=capacity), in_specs=whole, out_specs=(whole, whole)
    )
    kept_BTC, position_BTC = local(jax.sharding.reshard(indices_BTC, whole))
    return jax.sharding.reshard(kept_BTC, spec), jax.sharding.reshard(position_BTC, spec)


def _positions(indices_BTC: Array, num_experts: int, capacity: int | Array) -> tuple[Array, Array]:
    E = num_experts
    chosen_BTE = (indices_BTC[..., None] == jnp.arange(E)).sum(2, dtype=jnp.int32)  # compared and summed in one pass
    before_BTE = jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE
    position_BTC = jnp.take_along_axis(before_BTE, jnp.minimum(indices_BTC, E - 1), axis=2)
    return jnp.where(position_BTC < capacity, indices_BTC, E), position_BTC
