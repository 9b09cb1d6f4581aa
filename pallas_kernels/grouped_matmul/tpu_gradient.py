"""The TPU kernel of the weights' gradient: lhs^T dout over the rows of each group, summed in the tile of the result.

If the group does not fill its tile of rows, a visit takes the parts of the tile that contain its rows, and selects
zeros for other rows of both operands, since those may hold NaN. An empty group is visited once, to write zeros.

Shapes: M rows, E groups, K rows of the result, N columns; suffixes m, n, k: a tile of them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul import tpu_walk
from pallas_kernels.grouped_matmul.tpu_forward import for_parts, for_pieces, inside
from pallas_kernels.grouped_matmul.tpu_tiles import Cut
from pallas_kernels.grouped_matmul.tpu_walk import GROUP, START, STOP, TILE, word

OVER_ROWS = (((0,), (0,)), ((), ()))


def _kernel(cut: Cut, words_ref, lhs_ref, dout_ref, out_ref) -> None:
    """Run one grid step. Grid (tiles of K, tiles of N, visits)."""
    visit = pl.program_id(2)
    start, stop = word(words_ref, START, visit), word(words_ref, STOP, visit)
    fresh = tpu_walk.changes(words_ref, GROUP, visit)
    precision = lax.Precision.HIGHEST if lhs_ref.dtype == jnp.float32 else None

    @pl.when(stop == start)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    def multiply(at, size, in_group, first) -> None:
        rows = pl.ds(at, size)
        masked = lambda x: x if in_group is None else jnp.where(in_group, x.astype(jnp.float32), 0.0).astype(x.dtype)

        def piece(column, columns):
            place = pl.ds(column, columns)
            part = lax.dot_general(
                masked(lhs_ref[rows, :]), masked(dout_ref[rows, place]), OVER_ROWS, precision=precision,
                preferred_element_type=jnp.float32,
            )  # fmt: skip
            out_ref[:, place] = part + jnp.where(fresh & first, 0.0, out_ref[:, place])

        for_pieces(cut, piece)

    is_full = stop - start == cut.m
    pl.when(is_full)(lambda: multiply(0, cut.m, None, True))

    @pl.when(jnp.logical_not(is_full))
    def _():
        for_parts(cut, start, stop, lambda at, size, first: multiply(at, size, inside(at, size, start, stop), first))


def gradient_call(
    cut: Cut, lhs_MK: Array, dout_MN: Array, words: Array, visits: Array, E: int, interpret, moved: int
) -> Array:
    """Return the gradient of the weights, [E, K, N] float32."""
    (M, K), N = lhs_MK.shape, dout_MN.shape[1]
    return pl.pallas_call(
        lambda *refs: _kernel(cut, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(-(-K // cut.k), -(-N // cut.n), visits),
            in_specs=[
                pl.BlockSpec((cut.m, cut.k), lambda k, n, v, words: (word(words, TILE, v), k)),
                pl.BlockSpec((cut.m, cut.n), lambda k, n, v, words: (word(words, TILE, v), n)),
            ],
            out_specs=pl.BlockSpec((None, cut.k, cut.n), lambda k, n, v, words: (word(words, GROUP, v), k, n)),
        ),
        out_shape=jax.ShapeDtypeStruct((E, K, N), jnp.float32),
        # All visits of a group add to the same tile of the result, so they run in order.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=cut.vmem
        ),
        cost_estimate=pl.CostEstimate(flops=2 * M * K * N, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name="grouped_matmul_gradient",
    )(words, lhs_MK, dout_MN)
