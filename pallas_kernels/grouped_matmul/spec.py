"""What a grouped matmul computes, and in which tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array

Activation = Callable[..., Array]  # of as many arrays [M, F] as there are gates: f(h) or f(gate, up)
Shaped = Array | jax.ShapeDtypeStruct  # for choices that go by shape and dtype alone


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tiles; None: the kernel's choice for the shapes."""

    m: int | None = None  # rows
    n: int | None = None  # columns of the output
    k: int | None = None  # of the contraction

    def validate(self) -> None:
        """Raises ValueError that names the field."""
        for name, size in vars(self).items():
            if size is not None and (size < 8 or size & (size - 1)):
                raise ValueError(f"tiles.{name} = {size}: a power of two of 8 or more, or None for the kernel's choice")


@dataclass(frozen=True)
class Spec:
    """The static part of a call."""

    transpose: bool = False  # rhs is [E, N, K]
    activation: Activation | None = None  # applied to the gates; None: the matmul alone, with one gate
    tiles: Tiles = Tiles()
    interpret: Any = False  # a bool, or the parameters of an interpreter


def sum_dtype(dtype) -> jax.numpy.dtype:
    """The dtype that products are summed in: float32, or float64 for float64."""
    return jax.numpy.promote_types(dtype, jax.numpy.float32)
