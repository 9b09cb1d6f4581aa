"""Mapping of logical axes to mesh axes: the only place that decides how weights and activations are sharded.

Each dimension of a weight or an activation has a logical axis ('embed', 'heads', 'batch', ...). `ShardingRules` maps
logical axes to axes of the device mesh, separately for weights (as stored) and activations (as computed). Before use, a
weight is resharded from the first layout to the second, which is the all-gather of FSDP. Its gradient goes the opposite
way, which is the reduce-scatter.

Without a mesh (`jax.sharding.get_abstract_mesh().empty`) the functions here do nothing.
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
    """Return whether no device mesh is set, which means one device and no sharding."""
    return jax.sharding.get_abstract_mesh().empty


def weight_spec(rules: ShardingRules, *axes: str | None) -> P | None:
    """Return the `out_sharding` of a weight's initializer; None without a mesh."""
    return None if no_mesh() else rules.spec("weights", axes)


def activation_spec(rules: ShardingRules, *axes: str | None) -> P | None:
    """Return the `out_sharding` of an operation that creates an activation; None without a mesh."""
    return None if no_mesh() else rules.spec("activations", axes)


def reshard(x: jax.Array | np.ndarray, rules: ShardingRules, *axes: str | None) -> jax.Array:
    """Return `x` sharded as an activation of logical `axes`. A weight is gathered over the axes that only its storage
    uses."""
    return jnp.asarray(x) if no_mesh() else jax.sharding.reshard(x, rules.spec("activations", axes))
