"""The calls that tests, check and benchmark share: each feature alone and some together, small enough for an
interpreter.

Shapes: M rows, E groups, K contraction, G gates, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.grouped_matmul import grouped_glu, grouped_matmul


def swiglu(gate: Array, up: Array) -> Array:
    """Return the SwiGLU activation of a gate and its product."""
    return jax.nn.silu(gate) * up


def one_and_square(h: Array) -> Array:
    """Return an activation that is not zero at zero, which exposes rows of no group that are not set to zero."""
    return 1.0 + jnp.square(jax.nn.relu(h))


@dataclass(frozen=True)
class Case:
    """A call of `grouped_matmul`, or of `grouped_glu` if G is set."""

    name: str
    sizes: tuple[int, ...]
    K: int = 64
    N: int = 64
    G: int | None = None
    after: int = 0  # rows after the last group
    dtype: str = "float32"
    weights: str | None = None  # dtype of quantized weights; None: `dtype`
    transpose: bool = False

    @property
    def M(self) -> int:
        """Rows."""
        return sum(self.sizes) + self.after

    def arguments(self, seed: int = 0) -> dict[str, Array]:
        """Return lhs [M, K], rhs, sizes [E] and, for quantized weights, scale, as JAX arrays. Products are about 1."""
        r = np.random.default_rng(seed)
        E, quantized = len(self.sizes), self.weights is not None
        shape = (
            (E, self.N, self.K)
            if self.transpose
            else (E, self.K, self.N)
            if self.G is None
            else (E, self.K, self.G, self.N)
        )
        rhs = r.normal(size=shape) * (30.0 if quantized else self.K**-0.5)
        rhs = rhs.clip(-127, 127).round() if self.weights == "int8" else rhs
        made: dict[str, Any] = {
            "lhs": jnp.asarray(r.normal(size=(self.M, self.K)), self.dtype),
            "rhs": jnp.asarray(rhs, self.weights or self.dtype),
            "sizes": jnp.asarray(self.sizes, jnp.int32),
        }
        if quantized:
            columns = (E, self.N) if self.G is None else (E, self.G, self.N)
            made["scale"] = jnp.asarray(r.uniform(0.5, 1.5, size=columns) * self.K**-0.5 / 30, jnp.float32)
        return made

    def call(self, lhs: Array, rhs: Array, sizes: Array, scale: Array | None = None, **how: Any) -> Array:
        """Make the call on `arguments`. `how`: tiles, implementation, interpret."""
        if self.G is None:
            return grouped_matmul(lhs, rhs, sizes, scale_EN=scale, transpose=self.transpose, **how)
        return grouped_glu(lhs, rhs, sizes, swiglu if self.G == 2 else one_and_square, scale_EGN=scale, **how)


UNEVEN = (37, 0, 5, 70, 1, 0, 29)

CASES = (
    Case("aligned", (64, 32, 32, 64)),
    Case("unaligned", UNEVEN),
    Case("empty_at_the_ends", (0, 0, 50, 0, 45, 0)),
    Case("all_empty", (0, 0, 0), after=20),
    Case("one_group", (77,)),
    Case("all_in_one_of_many", (0, 0, 0, 90, 0, 0, 0, 0)),
    Case("one_row_each", (1,) * 24),
    Case("fewer_rows_than_groups", (0, 1, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0)),
    Case("256_groups", tuple(int(n) for n in np.random.default_rng(0).integers(0, 4, 256)), K=32, N=16),
    Case("rows_after", UNEVEN, after=21),
    Case("odd_sides", UNEVEN, K=41, N=27),
    Case("smaller_than_a_tile", (3, 2), K=5, N=3),
    Case("transpose", UNEVEN, K=48, N=80, after=9, transpose=True),
    Case("transpose_odd", UNEVEN, K=41, N=27, transpose=True),
    Case("glu", UNEVEN, G=2),
    Case("glu_rows_after", UNEVEN, G=2, K=41, N=27, after=21),
    Case("plain_activation", UNEVEN, G=1, after=21),
    Case("int8", UNEVEN, weights="int8", after=9),
    Case("int8_transpose", UNEVEN, weights="int8", K=40, N=24, transpose=True),
    Case("int8_glu", UNEVEN, G=2, weights="int8", dtype="bfloat16", after=9),
    Case("float8_e4m3fn", UNEVEN, weights="float8_e4m3fn"),
    Case("float8_e5m2", UNEVEN, weights="float8_e5m2"),
    Case("float8_e4m3fn_glu", UNEVEN, G=2, weights="float8_e4m3fn", dtype="bfloat16"),
    Case("bfloat16", UNEVEN, dtype="bfloat16"),
    Case("bfloat16_glu", UNEVEN, G=2, dtype="bfloat16", after=21),
    Case("bfloat16_transpose", UNEVEN, dtype="bfloat16", transpose=True),
    Case("float16", UNEVEN, dtype="float16"),
    Case("float16_glu", UNEVEN, G=2, dtype="float16"),
)
