"""Inside shard_map an array's type says over which mesh axes its values vary; these read and widen that."""

from __future__ import annotations

import jax
from jaxtyping import Array


def varying_axes(x: Array) -> frozenset[str]:
    """Mesh axes over which `x` differs between devices; empty outside shard_map."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(x: Array, axes: frozenset[str]) -> Array:
    """`x` typed as varying over `axes` too. Its gradient is then summed over the axes that were added."""
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
