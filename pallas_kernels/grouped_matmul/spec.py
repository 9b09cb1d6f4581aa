"""The static arguments of a grouped matmul: its operation and its tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

Activation = Callable[..., Array]  # takes one array [M, F] per gate: f(h) or f(gate, up)
Shaped = Array | jax.ShapeDtypeStruct  # where only shape and dtype matter


@dataclass(frozen=True)
class Tiles:
    """Tile sizes. None: the kernel chooses for the shapes."""

    m: int | None = None  # rows
    n: int | None = None  # columns of the output
    k: int | None = None  # elements of the contraction

    def validate(self) -> None:
        """Raise ValueError if a size is not a power of two of at least 8."""
        for name, size in vars(self).items():
            if size is not None and (size < 8 or size & (size - 1)):
                raise ValueError(f"tiles.{name} = {size}: must be a power of two, at least 8, or None for the default")


@dataclass(frozen=True)
class Spec:
    """The static arguments of a call."""

    transpose: bool = False  # rhs is [E, N, K]
    activation: Activation | None = None  # applied to the gates; None: the matmul alone, with one gate
    tiles: Tiles = Tiles()
    interpret: Any = False  # a bool, or the parameters of an interpreter


def sum_dtype(dtype) -> jax.numpy.dtype:
    """Return the dtype in which products are summed: float32, or float64 for float64."""
    return jax.numpy.promote_types(dtype, jax.numpy.float32)
