"""The bodies of the Triton kernels: one tile of a group's rows against a tile of its matrix's columns, and one tile of
a group's weight gradient.

Every ref is a whole array, in which a program finds its tile. The forward kernel reads rows of a tile beyond its group
but does not write them, since a row of a product depends on no other row. The weight gradient sums over rows, so it
masks them.

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

BAND = 8  # tiles of rows that go over the columns together, so that their inputs stay in the L2 cache


@dataclass(frozen=True)
class Plan:
    """The static arguments of a kernel, other than the shapes of its refs."""

    spec: Spec
    M: int
    E: int
    K: int
    G: int
    N: int
    m: int
    k: int
    n: int
    quantized: str | None = None  # the dtype of 8-bit weights, which the kernel reads as int8 bits


def forward(p: Plan, refs: dict[str, Any], out_ref, products_ref=None) -> None:
    """Compute out, and the G products if requested, for one visit and one tile of columns.

    A visit is (group, first row, row after the last). Group E holds the rows that belong to no group and gets zeros.
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
        out = jnp.where(group < p.E, p.spec.activation(*sums), 0.0)  # the activation of zeros may not be zero
    plgpu.store(out_ref.at[rows[:, None], columns[None, :]], out.astype(out_ref.dtype), mask=mask)


def weights_gradient(p: Plan, refs: dict[str, Any], out_ref) -> None:
    """Compute one tile of one group's lhs^T dout, [K, N], over all of its rows; zeros for an empty group. p.k and p.n
    are the tile, p.m the rows per step."""
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
    """Return the (row, column) of a program. BAND rows go over all columns before the next rows do."""
    before = lax.div(program, jnp.int32(BAND * columns))
    first = before * BAND
    height = jnp.minimum(rows - first, BAND)
    inside = program - first * columns
    column = lax.div(inside, height)
    return first + inside - column * height, column


def widen(x, quantized: str | None, dtype):
    """Return weights in the dtype of the product. float8 weights come as int8 bits and are converted by integer
    operations, which work on every GPU; the hardware converts float8_e4m3fn only from compute capability 8.9 on."""
    if quantized is None or quantized == "int8":
        return x.astype(dtype)
    bits = x.astype(jnp.int32)
    if quantized == "float8_e5m2":  # the upper byte of a float16
        return lax.bitcast_convert_type((bits << 8).astype(jnp.int16), jnp.float16).astype(dtype)
    magnitude = bits & 0x7F  # the 4-bit exponent has bias 7, float16's has 15; subnormals stay subnormal
    half = lax.bitcast_convert_type((((bits & 0x80) << 8) | (magnitude << 7)).astype(jnp.int16), jnp.float16)
    wide = half.astype(jnp.float32) * 256.0
    return jnp.where(magnitude == 0x7F, jnp.nan, wide).astype(dtype)


def _both(rows, columns):
    """Return the mask [r, c] of elements that both masks admit, or None for all."""
    if rows is None or columns is None:
        return columns[None, :] if rows is None and columns is not None else None if rows is None else rows[:, None]
    return rows[:, None] & columns[None, :]


def _load(at, mask):
    return plgpu.load(at, mask=mask, other=None if mask is None else jnp.zeros((), at.dtype))


def _dot(p: Plan, a, b, a_axis: int, b_axis: int):
    """Return a matrix product summed in float32 over one axis of each operand.

    float32 inputs take three passes of TF32 on the tensor cores, with an error of about 1e-6, where one pass would err
    by 1e-3. The interpreter has no TF32."""
    three = lax.Precision.HIGHEST if p.spec.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.dot_general(
        a, b, (((a_axis,), (b_axis,)), ((), ())), precision=three if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
