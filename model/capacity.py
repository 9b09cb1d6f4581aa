"""Experts with a bounded number of places: which of the choices find one.

Shapes: B batch, T time, E experts, C choices of a token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def places(
    indices_BTC: Int[Array, "B T C"], num_experts: int, capacity: int
) -> tuple[Int[Array, "B T C"], Int[Array, "B T C"]]:
    """(indices, place of each choice among those of its expert in its sequence). What comes at place `capacity` or later is
    dropped: its index becomes E.

    Earlier tokens are served first, and so no choice depends on later tokens. (GShard serves all first choices before the
    second ones, by which later tokens push out the second choices of earlier ones.) A token's choices are distinct.
    """
    E = num_experts
    chosen_BTE = jax.nn.one_hot(indices_BTC, E, dtype=jnp.int32).sum(2)
    before_BTE = jnp.cumsum(chosen_BTE, axis=1) - chosen_BTE
    place_BTC = jnp.take_along_axis(before_BTE, jnp.minimum(indices_BTC, E - 1), axis=2)
    return jnp.where(place_BTC < capacity, indices_BTC, E), place_BTC
