"""The bodies of the Triton kernels: one tile of a group's rows against a tile of its matrix's columns, and one tile of
a group's weight gradient.

Every ref is a whole array; programs find their tile of it. Rows of a tile beyond its group are read, where there are
any, and not written: a row of a product depends on no other row. The weight gradient sums over rows, and masks them.

Shapes: M rows, E groups, K contraction, G gates, N columns; m, k, n: those of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.grouped_matmul.spec import Spec

BAND = 8  # tiles of rows that go over the columns together, so that what they read stays in the second-level cache


@dataclass(frozen=True)
class Plan:
    """What is compiled into a kernel, beside the shapes of its refs."""

    spec: Spec
    M: int
    E: int
    K: int
    G: int
    N: int
    m: int
    k: int
    n: int
    quantized: str | None = None  # the dtype of weights that come as the bits of 8-bit numbers


def forward(p: Plan, refs: dict[str, Any], out_ref, products_ref=None) -> None:
    """One visit and one tile of columns: out, and the G products where they are asked for.

    A visit is (group, first row, row after the last); in group E, of rows that belong to none, zeros are written.
    """
    visits = refs["visits"].shape[0]
    visit, column = band(pl.program_id(0), visits, pl.cdiv(p.N, p.n))
    group, start, end = (refs["visits"][visit, i] for i in range(3))
    expert = jnp.minimum(group, p.E - 1)
    rows = start + lax.iota(jnp.int32, p.m)
    inside = rows < end
    read = jnp.minimum(rows, p.M - 1)[:, None]
    columns = column * p.n + lax.iota(jnp.int32, p.n)
    real = columns < p.N if p.N % p.n else None

    def step(i, sums, masked=False):
        inner = i * p.k + lax.iota(jnp.int32, p.k)
        known = inner < p.K if masked else None
        lhs = _load(refs["lhs"].at[read, inner[None, :]], None if known is None else known[None, :])
        added = []
        for g, total in enumerate(sums):
            if p.spec.transpose:
                at, axis, mask = refs["rhs"].at[expert, columns[:, None], inner[None, :]], 1, _both(real, known)
            else:
                at, axis, mask = refs["rhs"].at[expert, inner[:, None], g, columns[None, :]], 0, _both(known, real)
            rhs = widen(_load(at, mask), p.quantized, lhs.dtype)
            added.append(total + _dot(p, lhs, rhs, 1, axis))
        return tuple(added)

    sums = tuple(jnp.zeros((p.m, p.n), jnp.float32) for _ in range(p.G))
    steps = jnp.where(group < p.E, jnp.int32(p.K // p.k), jnp.int32(0))
    sums = lax.fori_loop(0, steps, step, sums)
    if p.K % p.k:
        sums = step(p.K // p.k, sums, masked=True)
    if "scale" in refs:
        of_gate = lambda g: _load(refs["scale"].at[expert, g, columns], real)[None, :]
        sums = tuple(total * of_gate(g) for g, total in enumerate(sums))
    sums = tuple(jnp.where(group < p.E, total, 0.0) for total in sums)
    mask = _both(inside, real)
    if products_ref is not None:
        for g, total in enumerate(sums):
            plgpu.store(
                products_ref.at[rows[:, None], g, columns[None, :]], total.astype(products_ref.dtype), mask=mask
            )
    out = sums[0]
    if p.spec.activation is not None:
        out = jnp.where(group < p.E, p.spec.activation(*sums), 0.0)  # of zeros it need not be zero
    plgpu.store(out_ref.at[rows[:, None], columns[None, :]], out.astype(out_ref.dtype), mask=mask)


def weights_gradient(p: Plan, refs: dict[str, Any], out_ref) -> None:
    """One tile of one group's lhs^T dout, [K, N], over all of its rows; zeros of an empty group. p.k and p.n are the
    tile, p.m the rows of a step."""
    group = pl.program_id(1)
    k_tile, n_tile = band(pl.program_id(0), pl.cdiv(p.K, p.k), pl.cdiv(p.N, p.n))
    start, end = refs["bounds"][group], refs["bounds"][group + 1]
    inner, columns = k_tile * p.k + lax.iota(jnp.int32, p.k), n_tile * p.n + lax.iota(jnp.int32, p.n)
    known = inner < p.K if p.K % p.k else None
    real = columns < p.N if p.N % p.n else None

    def step(i, total, masked):
        rows = start + i * p.m + lax.iota(jnp.int32, p.m)
        inside = rows < end if masked else None
        lhs = _load(refs["lhs"].at[rows[:, None], inner[None, :]], _both(inside, known))
        dout = _load(refs["dout"].at[rows[:, None], columns[None, :]], _both(inside, real))
        return total + _dot(p, lhs, dout, 0, 0)

    whole = lax.div(end - start, jnp.int32(p.m))
    total = lax.fori_loop(0, whole, lambda i, total: step(i, total, False), jnp.zeros((p.k, p.n), jnp.float32))
    total = lax.fori_loop(whole, pl.cdiv(end - start, p.m), lambda i, total: step(i, total, True), total)
    plgpu.store(out_ref.at[group, inner[:, None], columns[None, :]], total, mask=_both(known, real))


def band(program, rows: int, columns: int) -> tuple[Any, Any]:
    """(row, column) of a program: BAND rows go over all columns before the next ones do."""
    before = lax.div(program, jnp.int32(BAND * columns))
    first = before * BAND
    height = jnp.minimum(rows - first, BAND)
    inside = program - first * columns
    column = lax.div(inside, height)
    return first + inside - column * height, column


def widen(x, quantized: str | None, dtype):
    """Weights in the dtype of the product. float8 comes as int8 bits, and is read by integer operations: conversions of
    float8_e4m3fn exist from compute capability 8.9 on, these on every GPU."""
    if quantized is None or quantized == "int8":
        return x.astype(dtype)
    bits = x.astype(jnp.int32)
    if quantized == "float8_e5m2":  # the upper byte of a float16
        return lax.bitcast_convert_type((bits << 8).astype(jnp.int16), jnp.float16).astype(dtype)
    magnitude = bits & 0x7F  # exponents of 4 bits, biased by 7 where float16 has 15; what is subnormal there is so here
    half = lax.bitcast_convert_type((((bits & 0x80) << 8) | (magnitude << 7)).astype(jnp.int16), jnp.float16)
    wide = half.astype(jnp.float32) * 256.0
    return jnp.where(magnitude == 0x7F, jnp.nan, wide).astype(dtype)


def _both(rows, columns):
    """The mask [r, c] of what both admit; None: all."""
    if rows is None or columns is None:
        return columns[None, :] if rows is None and columns is not None else None if rows is None else rows[:, None]
    return rows[:, None] & columns[None, :]


def _load(at, mask):
    return plgpu.load(at, mask=mask, other=None if mask is None else jnp.zeros((), at.dtype))


def _dot(p: Plan, a, b, a_axis: int, b_axis: int):
    """A matrix product summed in float32 over an axis of each. float32 takes three passes of TF32 on the tensor cores,
    which err by about 1e-6, not 1e-3 as one would; the interpreter knows no TF32."""
    three = lax.Precision.HIGHEST if p.spec.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=three if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
