"""How weights are born and how they are used.

Each weight is made on one line that reads: shape, logical axes, standard deviation. Stored in float32 and sharded as
`rules.weights` says; at use cast to the dtype of computation and laid out as `rules.activations` says.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray

from sharding.rules import ShardingRules, activation_spec, no_mesh, reshard, weight_spec

nnx.set_graph_mode(False)  # modules are plain pytrees: no object identity, no mutation under transformations

Axes = tuple[str | None, ...]


def normal(key: PRNGKeyArray, shape: tuple[int, ...], axes: Axes, std: float, rules: ShardingRules) -> nnx.Param:
    """A float32 weight drawn from N(0, std^2); its values do not depend on its sharding."""
    spec = weight_spec(rules, *axes)
    return nnx.Param(jax.random.normal(key, shape, jnp.float32, out_sharding=spec) * std)


def constant(shape: tuple[int, ...], axes: Axes, value: float, rules: ShardingRules) -> nnx.Param:
    """A float32 weight of equal values (norm scales, biases, sinks)."""
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=weight_spec(rules, *axes)))


def use(param: nnx.Param, axes: Axes, dtype: jnp.dtype, rules: ShardingRules) -> Array:
    """The weight as it enters a computation. The cast comes first: half the bytes are gathered."""
    w = param[...].astype(dtype)
    if no_mesh():
        return w
    # One dimension after the other: of a gather along two at once XLA makes an all-reduce, which sends twice as much.
    layouts = list(rules.spec("weights", axes)), list(rules.spec("activations", axes))
    stored, used = (
        [part if isinstance(part, tuple) else (part,) if part else () for part in layout] for layout in layouts
    )
    if all(more[: len(part)] == part for more, part in zip(stored, used, strict=True)):
        for dimension in reversed(range(len(axes))):
            w = jax.sharding.reshard(w, P(*layouts[0][:dimension], *layouts[1][dimension:]))
        return w
    return reshard(w, rules, *axes)


def matmul(
    x: Array, w: Array, contract: int, axes: Axes, rules: ShardingRules, precision: jax.lax.Precision | None = None
) -> Array:
    """Contracts the last `contract` dimensions of `x` with the first of `w`; the result has the logical `axes`.

    `precision`: accelerators round the factors of a float32 product to bfloat16 (TPU) or TF32 (GPU) unless it is
    HIGHEST. Without a mesh both are reshaped to matrices first: XLA's CPU matmul is 20 % faster so.
    """
    lead, kept = x.shape[: x.ndim - contract], w.shape[contract:]
    if no_mesh():
        inner = math.prod(w.shape[:contract])
        return jnp.matmul(x.reshape(-1, inner), w.reshape(inner, -1), precision=precision).reshape(*lead, *kept)
    dims = ((tuple(range(x.ndim - contract, x.ndim)), tuple(range(contract))), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, out_sharding=activation_spec(rules, *axes))
