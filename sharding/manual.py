"""Inside shard_map an array's type says over which mesh axes its values vary; these read and widen that."""

from __future__ import annotations

import math

import jax
from jaxtyping import Array


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which `x` differs between devices; empty outside shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Array, axes: frozenset[str]) -> Array:
    """`x` typed as varying over `axes` too. Its gradient is then summed over the axes that were added."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def gather_weight(w: Array, spread: tuple[tuple[str, ...], ...]) -> Array:
    """`w`, whose dimensions are spread over these mesh axes (`ShardingRules.gathered`), whole. Its gradient is
    reduce-scattered:
    a weight that is gathered outside of shard_map has its gradient all-reduced, and cut afterwards."""
    for dimension, axes in enumerate(spread):
        if axes and jax.lax.axis_size(axes) > 1:
            # As a stack of matrices: of [E, D, G, F] along D, XLA:TPU all-reduces the whole gradient and cuts it.
            rest = w.shape[dimension + 1 :]
            matrices = w.reshape(*w.shape[: dimension + 1], math.prod(rest))
            whole = jax.lax.all_gather(matrices, axes, axis=dimension, tiled=True)
            w = whole.reshape(*whole.shape[: dimension + 1], *rest)
    return w
