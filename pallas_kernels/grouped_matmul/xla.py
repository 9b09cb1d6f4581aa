"""The grouped matmul in plain JAX, for CPUs: a loop over the groups that have rows, with inner loops over blocks of
their rows.

A group is divided into as many large blocks as fit, then into smaller ones, so that little is computed beyond its end.
The last blocks of a group may reach beyond its end (or, at the end of the rows, start before its first row); their
results for other rows are not written. So groups need no alignment, no row is copied elsewhere, and a group without
rows is not read.

Shapes: M rows, E groups, K contraction, X = G * N gates by columns, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul.spec import Shaped, Spec, sum_dtype

BLOCKS = (256, 64, 16)  # rows; a matmul of 16 rows still reaches more than half of the FLOP/s of a large one
Carry = TypeVar("Carry")


def unsupported(spec: Spec, lhs: Shaped, rhs: Shaped, scale: Shaped | None) -> str | None:
    """Return the reason why this implementation cannot run a call, or None."""
    for name in ("n", "k"):
        if getattr(spec.tiles, name) is not None:
            return f"tiles.{name} = {getattr(spec.tiles, name)}: xla divides only rows; set tiles.m instead"
    return "interpret = True: only Pallas kernels can be interpreted" if spec.interpret else None


def forward(
    spec: Spec, lhs_MK: Array, rhs_EKGN: Array, scale_EGN: Array | None, sizes_E: Array, keep: bool
) -> tuple[Array, Array | None]:
    """Return (out [M, N], products [M, G, N] if `keep` and there is an activation, else None), in the dtype of lhs."""
    wide, dtype, M = sum_dtype(lhs_MK.dtype), lhs_MK.dtype, lhs_MK.shape[0]
    E, G = rhs_EKGN.shape[0], 1 if spec.transpose else rhs_EKGN.shape[2]
    rhs = rhs_EKGN if spec.transpose else rhs_EKGN.reshape(E, rhs_EKGN.shape[1], -1)
    dims = (((1,), (1 if spec.transpose else 0,)), ((), ()))
    X = rhs.shape[1 if spec.transpose else 2]
    keep = keep and spec.activation is not None

    def product(lhs_RK: Array, rhs_KX: Array, scale_X: Array | None) -> tuple[Array, ...]:
        h_RX = jax.lax.dot_general(lhs_RK.astype(wide), rhs_KX, dims, precision=jax.lax.Precision.HIGHEST)
        h_RX = h_RX if scale_X is None else h_RX * scale_X
        if spec.activation is None:
            return (h_RX.astype(dtype),)
        out_RN = spec.activation(*jnp.split(h_RX, G, axis=1)).astype(dtype)
        return (out_RN, h_RX.astype(dtype)) if keep else (out_RN,)

    def group(e: Array, start: Array, size: Array, outs: tuple[Array, ...]) -> tuple[Array, ...]:
        rhs_KX = jax.lax.dynamic_index_in_dim(rhs, e, keepdims=False).astype(wide)
        scale_X = None if scale_EGN is None else jax.lax.dynamic_index_in_dim(scale_EGN, e, keepdims=False).reshape(-1)

        def block(first: Array, rows: int, inside_R1: Array | None, outs: tuple[Array, ...]) -> tuple[Array, ...]:
            new = product(jax.lax.dynamic_slice_in_dim(lhs_MK, first, rows), rhs_KX, scale_X)
            if inside_R1 is not None:
                old = (jax.lax.dynamic_slice_in_dim(out, first, rows) for out in outs)
                new = tuple(jnp.where(inside_R1, n, o) for n, o in zip(new, old, strict=True))
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(out, n, first, 0) for out, n in zip(outs, new, strict=True)
            )

        return _blocks(_cuts(M, E, spec.tiles.m), start, size, M, block, outs)

    columns = (X // G, X) if keep else (X // G,)
    empty = tuple(jnp.zeros((M, n), dtype) for n in columns)
    outs = _groups(sizes_E, M, group, empty)
    return outs[0], outs[1].reshape(M, G, -1) if keep else None


def weights_gradient(spec: Spec, lhs_MK: Array, dout_MN: Array, sizes_E: Array) -> Array:
    """Return lhs^T dout of each group, [E, K, N] float32; zero for an empty group."""
    wide, (M, K), E, N = sum_dtype(lhs_MK.dtype), lhs_MK.shape, sizes_E.shape[0], dout_MN.shape[1]

    def group(e: Array, start: Array, size: Array, drhs_EKN: Array) -> Array:
        def block(first: Array, rows: int, inside_R1: Array | None, drhs_KN: Array) -> Array:
            parts = (jax.lax.dynamic_slice_in_dim(y, first, rows).astype(wide) for y in (lhs_MK, dout_MN))
            if inside_R1 is not None:  # mask both operands, because 0 * NaN is NaN
                parts = (jnp.where(inside_R1, y, 0) for y in parts)
            lhs_RK, dout_RN = parts
            # Transpose the smaller side in memory: XLA's CPU matmul contracts first dimensions at half of its rate
            # (128 x 512: 40 % faster with the transpose; 256 x 128: no gain).
            lhs_KR = jax.lax.optimization_barrier(lhs_RK.T) if K < N else lhs_RK.T
            return drhs_KN + jnp.matmul(lhs_KR, dout_RN, precision=jax.lax.Precision.HIGHEST)

        drhs_KN = _blocks(_cuts(M, E, spec.tiles.m), start, size, M, block, jnp.zeros((K, N), wide))
        return jax.lax.dynamic_update_index_in_dim(drhs_EKN, drhs_KN, e, 0)

    return _groups(sizes_E, M, group, jnp.zeros((E, K, N), wide))


def _cuts(M: int, E: int, largest: int | None) -> tuple[int, ...]:
    """Return the rows of the blocks, descending, none above M. `largest` is tiles.m; smaller blocks take the remainder.

    If `largest` is None and groups have few rows on average, as in decoding, return only that number (the next power of
    two, or M), since each additional loop over blocks copies the group's weights."""
    rows = [size for size in BLOCKS if size < largest] + [largest] if largest else BLOCKS
    average = min(1 << (-(-M // E) - 1).bit_length(), M)
    if largest is None and average < min(rows):
        return (average,)
    return tuple(sorted({min(size, M) for size in rows}, reverse=True))


def _groups(sizes_E: Array, M: int, group: Callable[[Array, Array, Array, Carry], Carry], carry: Carry) -> Carry:
    """Run `group(e, start, size, carry)` for the groups that have rows; in decoding, most have none."""
    sizes_E = jnp.asarray(sizes_E)  # a loop counter cannot index a NumPy array
    starts_E = jnp.cumsum(sizes_E) - sizes_E
    (filled_E,) = jnp.nonzero(sizes_E, size=min(M, sizes_E.shape[0]), fill_value=0)

    def step(i: Array, carry: Carry) -> Carry:
        e = filled_E[i]
        return group(e, starts_E[e], sizes_E[e], carry)

    return jax.lax.fori_loop(0, (sizes_E > 0).sum(dtype=jnp.int32), step, carry)


def _blocks(
    cuts: tuple[int, ...],
    start: Array,
    size: Array,
    M: int,
    block: Callable[[Array, int, Array | None, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Run `block(first, rows, inside [rows, 1], carry)` over a group's rows. `inside` is None if all rows are the
    group's."""
    end = start + size
    for rows in cuts[:-1]:
        count = (end - start) // rows
        carry = jax.lax.fori_loop(0, count, lambda i, c, s=start, r=rows: block(s + i * r, r, None, c), carry)
        start = start + count * rows
    rows = cuts[-1]

    def last(i: Array, carry: Carry) -> Carry:
        wanted = start + i * rows
        first = jnp.minimum(wanted, M - rows)
        row_R1 = first + jnp.arange(rows)[:, None]
        return block(first, rows, (row_R1 >= wanted) & (row_R1 < end), carry)

    return jax.lax.fori_loop(0, -(-(end - start) // rows), last, carry)
