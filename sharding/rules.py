"""Logical axes to mesh axes: the one place that decides how weights and activations are laid out.

A weight or an activation names the logical meaning of each of its dimensions ('embed', 'heads', 'batch', ...);
`ShardingRules` maps those names to axes of the device mesh, apart for weights (how they are stored) and for activations
(how they are computed with). A weight at use is resharded from the first layout to the second, which is FSDP's
all-gather; its gradient takes the opposite way, which is the reduce-scatter.

With no mesh set (`jax.sharding.get_abstract_mesh().empty`) every function here does nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from sharding.config import LOGICAL_AXES, MESH_AXES, AxisRules, ShardingRules

__all__ = [
    "LOGICAL_AXES",
    "MESH_AXES",
    "AxisRules",
    "ShardingRules",
    "activation_spec",
    "no_mesh",
    "reshard",
    "weight_spec",
]


def no_mesh() -> bool:
    """True where no device mesh is set: one device, nothing to lay out."""
    return jax.sharding.get_abstract_mesh().empty


def weight_spec(rules: ShardingRules, *axes: str | None) -> P | None:
    """The `out_sharding` of a weight's initializer; None with no mesh."""
    return None if no_mesh() else rules.spec("weights", axes)


def activation_spec(rules: ShardingRules, *axes: str | None) -> P | None:
    """The `out_sharding` of an operation that makes an activation; None with no mesh."""
    return None if no_mesh() else rules.spec("activations", axes)


def reshard(x: jax.Array | np.ndarray, rules: ShardingRules, *axes: str | None) -> jax.Array:
    """`x` laid out as an activation of logical `axes`. For a weight: gathered over the axes it is only stored on."""
    return jnp.asarray(x) if no_mesh() else jax.sharding.reshard(x, rules.spec("activations", axes))
