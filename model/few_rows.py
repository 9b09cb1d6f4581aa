"""Products of a few rows with a large matrix on CPUs, as in decoding.

Reading the matrix is most of the work. XLA's CPU backend reads it once for one row, but from two rows on it first
copies the whole matrix into another order, which costs more than the product. Products of slices avoid the copy.

Shapes: R rows, K contraction, N columns, S slices of the contraction, B slices of the columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.target import target

ROWS = range(2, 9)  # measured: no gain from 16 rows on
SLICE = 32  # entries of a slice of the contraction
TALL_SLICE = 256  # columns of a slice of a matrix that is stored transposed
LEAST_ENTRIES = 2**18  # a smaller matrix stays in the cache, where the copy costs less than the slices


def few_rows(rows: int, w: Array) -> bool:
    """Return whether the products of this module are the faster ones for `rows` rows and the matrix `w`."""
    return rows in ROWS and w.size >= LEAST_ENTRIES and w.dtype == jnp.float32 and target()[0] == "cpu"


def multiply(x_RK: Float[Array, "R K"], w_KN: Float[Array, "K N"]) -> Float[Array, "R N"]:
    """Return x @ w as a sum over slices of the contraction, or x @ w itself if K is not a multiple of SLICE."""
    (R, K), N = x_RK.shape, w_KN.shape[1]
    if K % SLICE:
        return x_RK @ w_KN
    x_SRk = x_RK.reshape(R, K // SLICE, SLICE).transpose(1, 0, 2)
    return jax.lax.batch_matmul(x_SRk, w_KN.reshape(K // SLICE, SLICE, N)).sum(0)


def multiply_transposed(x_RK: Float[Array, "R K"], w_NK: Float[Array, "N K"]) -> Float[Array, "R N"]:
    """Return x @ w.T by slices of the rows of w, as left factors, or x @ w.T itself if N is not a multiple of
    TALL_SLICE."""
    (R, K), N = x_RK.shape, w_NK.shape[0]
    if N % TALL_SLICE:
        return x_RK @ w_NK.T
    w_BnK = w_NK.reshape(N // TALL_SLICE, TALL_SLICE, K)
    x_BKR = jnp.broadcast_to(x_RK.T, (N // TALL_SLICE, K, R))
    return jax.lax.batch_matmul(w_BnK, x_BKR).reshape(N, R).T
