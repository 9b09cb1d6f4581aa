"""Helpers for code inside shard_map: varying mesh axes, and collectives that avoid an unsafe reduce-scatter.

Between processes, XLA:CPU communicates with Gloo, whose reduce-scatter overwrites a buffer that it may still be sending
(jax-ml/jax#40830). From about one megabyte on, a process receives wrong sums, which differ between runs. In that case
`sum_scatter` and the gradient of `all_gather` use an all-reduce and a slice instead.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def varying_axes(x: Array | np.ndarray) -> frozenset[str]:
    """Return the mesh axes over which `x` differs between devices; empty outside shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Array | np.ndarray, axes: frozenset[str]) -> Array:
    """Return `x` typed as varying over `axes` too. Its gradient is then summed over the added axes."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else jnp.asarray(x)


def reduce_scatter_is_safe() -> bool:
    """Return whether reduce-scatter gives correct sums on this backend: it does not between processes on CPUs."""
    return jax.default_backend() != "cpu" or jax.process_count() == 1


def all_gather(x: Array, axes: tuple[str, ...], dimension: int) -> Array:
    """Return the slices of `x` on all devices of `axes`, concatenated. The gradient is summed and scattered."""
    if reduce_scatter_is_safe() or not jnp.issubdtype(x.dtype, jnp.inexact):
        return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)
    return gather_without_reduce_scatter(x, axes, dimension)


def sum_scatter(x: Array, axes: tuple[str, ...], dimension: int) -> Array:
    """Return this device's slice of the sum of `x` over the devices of `axes`."""
    if reduce_scatter_is_safe():
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
    return sum_and_cut(x, axes, dimension)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_without_reduce_scatter(x: Array, axes: tuple[str, ...], dimension: int) -> Array:
    return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)


def _gather_forward(x: Array, axes: tuple[str, ...], dimension: int) -> tuple[Array, None]:
    return gather_without_reduce_scatter(x, axes, dimension), None


def _gather_backward(axes: tuple[str, ...], dimension: int, _: None, gradient: Array) -> tuple[Array]:
    return (sum_and_cut(gradient, axes, dimension),)


gather_without_reduce_scatter.defvjp(_gather_forward, _gather_backward)


def sum_and_cut(x: Array, axes: tuple[str, ...], dimension: int) -> Array:
    """Return the result of `jax.lax.psum_scatter`, computed with an all-reduce and a slice."""
    size = x.shape[dimension] // jax.lax.axis_size(axes)
    return jax.lax.dynamic_slice_in_dim(jax.lax.psum(x, axes), jax.lax.axis_index(axes) * size, size, dimension)


def gather_weight(w: Array, spread: tuple[tuple[str, ...], ...]) -> Array:
    """Return `w` gathered along its dimensions, which are sharded over the mesh axes `spread` (from
    `ShardingRules.gathered`). Its gradient is reduce-scattered. A weight gathered outside shard_map would have its
    gradient all-reduced and then sliced.
    """
    for dimension, axes in enumerate(spread):
        if axes and jax.lax.axis_size(axes) > 1:
            # Reshape to a stack of matrices: for [E, D, G, F] along D, XLA:TPU would all-reduce the gradient and slice
            # it.
            rest = w.shape[dimension + 1 :]
            matrices = w.reshape(*w.shape[: dimension + 1], math.prod(rest))
            gathered = all_gather(matrices, axes, dimension)
            w = gathered.reshape(*gathered.shape[: dimension + 1], *rest)
    return w
