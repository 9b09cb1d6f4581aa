"""The TPU's forward kernel: for each tile of columns, the visits of tpu_walk.py.

If a tile holds all of K, a group's weights stay in VMEM while the kernel visits its tiles of rows. A visit multiplies
only the parts of its tile of rows that contain the group's rows (see tpu_tiles.py), and writes only those rows; the
tile of the result stays in VMEM from one group to the next. Rows of no group are removed by selection, not by
multiplication with zero, so NaN in them does not spread.

Shapes: M rows, E groups, K contraction, N columns, G gates; suffixes m, n, k: a tile of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul import tpu_walk
from pallas_kernels.grouped_matmul.spec import Spec
from pallas_kernels.grouped_matmul.tpu_tiles import ROWS, Cut
from pallas_kernels.grouped_matmul.tpu_walk import GROUP, START, STOP, TILE, word


def widen(x: Array, dtype) -> Array:
    """Return 8-bit weights in the dtype of the rows, exactly, through float32, to which the vector units convert."""
    return x if x.dtype == dtype else x.astype(jnp.float32).astype(dtype)


def for_parts(cut: Cut, start, stop, do) -> None:
    """Call do(first row, rows, whether it is the first) for adjacent parts of the tile that together contain rows start
    to stop. Each size of cut.parts() is used at most once. Makes no call if there are no rows."""
    parts = cut.parts()
    least = parts[0]
    begin = lax.div(start, ROWS) * ROWS
    # The number of smallest parts that contain the rows; its bits select the parts.
    count = lax.div(stop - begin + least - 1, least) * (stop > start).astype(jnp.int32)
    begin = jnp.minimum(begin, cut.m - count * least)
    for size in reversed(parts):
        bit = size // least
        done = lax.div(count, 2 * bit) * 2 * bit
        at = pl.multiple_of(begin + done * least, ROWS)
        here = lax.rem(lax.div(count, bit), 2) == 1

        @pl.when(here)
        def _(at=at, size=size, done=done):
            do(at, size, done == 0)


def for_pieces(cut: Cut, do) -> None:
    """Call do(first column, columns) for each piece of a tile of columns, in a loop, then for the remainder."""
    count, left = divmod(cut.n, cut.piece)
    if count == 1:
        do(0, cut.piece)
    else:
        lax.fori_loop(0, count, lambda i, _: do(pl.multiple_of(i * cut.piece, cut.piece), cut.piece), None)
    if left:
        do(count * cut.piece, left)


def inside(at, size: int, start, stop) -> Array:
    """Return which of the `size` rows from `at` on belong to the group, [size, 1]."""
    rows = at + lax.broadcasted_iota(jnp.int32, (size, 1), 0)
    return (rows >= start) & (rows < stop)


def _kernel(spec: Spec, cut: Cut, G: int, pieces: int, names: tuple[str, ...], words_ref, lhs_ref, *refs) -> None:
    """Run one grid step. Grid (tiles of columns, visits, pieces of K)."""
    rhs_refs, rest = refs[:G], dict(zip(names, refs[G:], strict=True))
    out_ref, products_ref, acc_ref = rest["out"], rest.get("products"), rest.get("acc")
    visit, k = pl.program_id(1), pl.program_id(2)
    start, stop = word(words_ref, START, visit), word(words_ref, STOP, visit)
    precision = lax.Precision.HIGHEST if lhs_ref.dtype == jnp.float32 else None
    contract = (((1,), (1 if spec.transpose else 0,)), ((), ()))

    @pl.when((k == 0) & tpu_walk.changes(words_ref, TILE, visit) & (stop - start < cut.m))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)
        if products_ref is not None:
            products_ref[...] = jnp.zeros_like(products_ref)

    def store(ref, place, in_group, new) -> None:
        ref[place] = jnp.where(in_group, new, ref[place].astype(jnp.float32)).astype(ref.dtype)

    def write(at, size, column, columns, products) -> None:
        rows, place = pl.ds(at, size), pl.ds(column, columns)
        in_group = inside(at, size, start, stop)
        if "scale0" in rest:
            products = [h * rest[f"scale{g}"][:, place] for g, h in enumerate(products)]
        if products_ref is not None:
            for g, h in enumerate(products):
                store(products_ref, (g, rows, place), in_group, h)
        store(out_ref, (rows, place), in_group, products[0] if spec.activation is None else spec.activation(*products))

    def multiply(at, size, _) -> None:
        def piece(column, columns):
            rows, place = pl.ds(at, size), pl.ds(column, columns)
            products = []
            for g, rhs_ref in enumerate(rhs_refs):
                weights = widen(rhs_ref[place, :] if spec.transpose else rhs_ref[:, place], lhs_ref.dtype)
                h = lax.dot_general(
                    lhs_ref[rows, :], weights, contract, precision=precision, preferred_element_type=jnp.float32
                )
                if acc_ref is not None:
                    h += jnp.where(k == 0, 0.0, acc_ref[g, rows, place])
                    acc_ref[g, rows, place] = h
                products.append(h)
            if acc_ref is None:
                write(at, size, column, columns, products)

        for_pieces(cut, piece)

    def finish(at, size, _) -> None:
        def piece(column, columns):
            write(at, size, column, columns, [acc_ref[g, pl.ds(at, size), pl.ds(column, columns)] for g in range(G)])

        for_pieces(cut, piece)

    for_parts(cut, start, stop, multiply)
    if acc_ref is not None:
        pl.when(k == pieces - 1)(lambda: for_parts(cut, start, stop, finish))


def forward_call(
    spec: Spec, cut: Cut, lhs_MK: Array, rhs: Array, scale_X1N: Array | None, words: Array, visits: Array,
    G: int, N: int, keep: bool, moved: int,
) -> Sequence[Array]:  # fmt: skip
    """Return [out [M, N]] or, if `keep`, [out, products [G, M, N]], in the dtype of lhs.

    rhs: [E, K, G N'] or [E, N', K], where N' >= N is a multiple of cut.n if G > 1. scale: [E G, 1, N'], float32. K is a
    multiple of cut.k."""
    M, K = lhs_MK.shape
    columns = rhs.shape[1 if spec.transpose else 2]
    tiles_n, pieces = -(-(columns // G) // cut.n), K // cut.k
    tile = lambda n, v, k, words: (word(words, TILE, v), n)

    def rhs_spec(g: int):
        at = lambda n, v, k, words: (word(words, GROUP, v), k, g * tiles_n + n)
        if spec.transpose:
            return pl.BlockSpec((None, cut.n, cut.k), lambda n, v, k, words: (word(words, GROUP, v), n, k))
        return pl.BlockSpec((None, cut.k, cut.n), at)

    arrays = [lhs_MK, *[rhs] * G]
    in_specs = [
        pl.BlockSpec((cut.m, cut.k), lambda n, v, k, words: (word(words, TILE, v), k)),
        *map(rhs_spec, range(G)),
    ]
    names = []
    if scale_X1N is not None:
        for g in range(G):
            in_specs.append(
                pl.BlockSpec((None, 1, cut.n), lambda n, v, k, words, g=g: (word(words, GROUP, v) * G + g, 0, n))
            )
        arrays += [scale_X1N] * G
        names += [f"scale{g}" for g in range(G)]
    names.append("out")
    out_specs = [pl.BlockSpec((cut.m, cut.n), tile)]
    out_shape = [jax.ShapeDtypeStruct((M, N), lhs_MK.dtype)]
    if keep:
        names.append("products")
        out_specs.append(pl.BlockSpec((G, cut.m, cut.n), lambda *at: (0, *tile(*at))))
        out_shape.append(jax.ShapeDtypeStruct((G, M, N), lhs_MK.dtype))
    scratch = [pltpu.VMEM((G, cut.m, cut.n), jnp.float32)] if pieces > 1 else []
    names += ["acc"] * len(scratch)
    return pl.pallas_call(
        lambda *refs: _kernel(spec, cut, G, pieces, tuple(names), *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(tiles_n, visits, pieces),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        # Several groups revisit a tile of the result, so visits run in order. The cores of a device share the columns.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=cut.vmem
        ),
        cost_estimate=pl.CostEstimate(flops=2 * M * K * columns, transcendentals=0, bytes_accessed=moved),
        interpret=spec.interpret,
        name="grouped_matmul",
    )(words, *arrays)
