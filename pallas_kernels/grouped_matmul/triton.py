"""Grouped matmul on GPUs through Pallas' Triton lowering: Ampere and later.

Forward: each group's rows are divided into tiles that start where the group starts, so the work is sum(ceil(size /
tile)) visits, and none for an empty group. XLA lists the visits from the sizes, and one program computes one visit and
one tile of columns. The grid has the most visits that any sizes can need; surplus programs exit at once. No array of E
times the rows is made. Weight gradient: one program for each tile of each group's matrix, which loops over the group's
rows. Without atomics, the result is deterministic. jax 0.12 warns that this lowering is deprecated. An activation may
use only operations that the lowering supports (exp, tanh, logistic, max, products and the like; not erf).

M, K, N and the sizes may have any values, thanks to masks. Where K or N is not a multiple of 8, addresses are not
aligned to 16 bytes and loads are narrow.

Shapes: M rows, E groups, K contraction, G gates, N columns, V visits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.grouped_matmul import triton_kernels as kernels
from pallas_kernels.grouped_matmul.spec import Shaped, Spec
from pallas_kernels.target import target

MIN_TILE, MAX_GATES = 16, 8


class Sizes(NamedTuple):
    """A kernel's tile, its warps, and the stages of its loop's pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def unsupported(spec: Spec, lhs: Shaped, rhs: Shaped, scale: Shaped | None) -> str | None:
    """Return the reason why the kernels cannot run a call, or None."""
    if target()[0] not in ("gpu", "cuda") and not spec.interpret:
        return f"needs a GPU, not a {target()[0]}; interpret=True runs it there, slowly"
    if lhs.dtype == jnp.float64:
        return "float64 is not supported; use implementation='xla'"
    for name, size in vars(spec.tiles).items():
        if size is not None and size < MIN_TILE:
            return f"tiles.{name} = {size}: must be at least {MIN_TILE}, for Triton's matrix products"
    if rhs.ndim == 4 and rhs.shape[2] > MAX_GATES:
        return f"{rhs.shape[2]} gates: at most {MAX_GATES}, so that their sums fit in a GPU's registers"
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        # Pallas indexes arrays of up to 2**32 bytes with signed 32 bits, whatever the size of an element.
        if 2**31 < x.size and x.size * x.dtype.itemsize <= 2**32:
            return f"{name} of {x.size} 8-bit elements: between 2**31 and 2**32 elements their indices overflow"
    return None


def forward(
    spec: Spec, lhs_MK: Array, rhs: Array, scale_EGN: Array | None, sizes_E: Array, keep: bool
) -> tuple[Array, Array | None]:
    """See reference.py."""
    M, K = lhs_MK.shape
    E, G, N = rhs.shape[0], 1 if spec.transpose else rhs.shape[2], rhs.shape[1 if spec.transpose else 3]
    s = tile_sizes("forward", spec, M, E, K, N, G, lhs_MK.dtype)
    quantized = rhs.dtype.name if rhs.dtype != lhs_MK.dtype else None
    if quantized is not None and quantized != "int8":
        rhs = jax.lax.bitcast_convert_type(rhs, jnp.int8)
    p = kernels.Plan(spec, M, E, K, G, N, s.m, s.k, s.n, quantized)
    inputs = {"visits": visits(sizes_E, M, s.m), "lhs": lhs_MK, "rhs": rhs}
    if scale_EGN is not None:
        inputs["scale"] = scale_EGN
    outputs = [jax.ShapeDtypeStruct((M, N), lhs_MK.dtype)]
    if keep and spec.activation is not None:
        outputs.append(jax.ShapeDtypeStruct((M, G, N), lhs_MK.dtype))
    grid = (inputs["visits"].shape[0] * pl.cdiv(N, s.n),)
    out, *products = _call(kernels.forward, p, s, grid, inputs, outputs)
    return out, products[0] if products else None


def weights_gradient(spec: Spec, lhs_MK: Array, dout_MN: Array, sizes_E: Array) -> Array:
    """See reference.py."""
    (M, K), N, E = lhs_MK.shape, dout_MN.shape[1], sizes_E.shape[0]
    s = tile_sizes("weights_gradient", spec, M, E, K, N, 1, lhs_MK.dtype)
    p = kernels.Plan(spec, M, E, K, 1, N, s.m, s.k, s.n)
    bounds = jnp.minimum(jnp.pad(jnp.cumsum(sizes_E), (1, 0)), M).astype(jnp.int32)
    inputs = {"bounds": bounds, "lhs": lhs_MK, "dout": dout_MN}
    grid = (pl.cdiv(K, s.k) * pl.cdiv(N, s.n), E)
    (out,) = _call(kernels.weights_gradient, p, s, grid, inputs, [jax.ShapeDtypeStruct((E, K, N), jnp.float32)])
    return out


def _call(
    kernel: Any, p: kernels.Plan, s: Sizes, grid: tuple[int, ...], inputs: dict[str, Array], outputs: list[Any]
) -> Sequence[Array]:
    anywhere = pl.no_block_spec
    return pl.pallas_call(
        partial(kernel, p),
        grid=grid,
        in_specs=[{name: anywhere for name in inputs}],
        out_specs=[anywhere] * len(outputs),
        out_shape=outputs,
        interpret=p.spec.interpret,
        compiler_params=plgpu.CompilerParams(num_warps=s.warps, num_stages=s.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * p.M * p.K * p.G * p.N,
            transcendentals=0 if p.spec.activation is None else p.M * p.N,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs.values(), *outputs)),
        ),
        name=f"grouped_matmul_{kernel.__name__}",
    )(inputs)


def visits(sizes_E: Array, M: int, tile: int) -> Array:
    """Return (group, first row, row after the last) of each tile of rows, int32 [V, 3].

    The groups' tiles come first, in order, then tiles of the rows after the last group, as group E, then empty ones. V
    is the most visits that any sizes can need."""
    E = sizes_E.shape[0]
    ends_X = jnp.append(jnp.minimum(jnp.cumsum(sizes_E), M), M).astype(jnp.int32)  # of E groups and the remaining rows
    starts_X = jnp.pad(ends_X[:-1], (1, 0))
    last_X = jnp.cumsum((ends_X - starts_X + tile - 1) // tile)
    first_X = jnp.pad(last_X[:-1], (1, 0))
    visit_V = jnp.arange(max_visits(M, E, tile), dtype=jnp.int32)
    group_V = (visit_V[:, None] >= last_X).sum(1, dtype=jnp.int32)
    at_V = jnp.minimum(group_V, E)
    start_V = jnp.minimum(starts_X[at_V] + (visit_V - first_X[at_V]) * tile, M)
    return jnp.stack([at_V, start_V, jnp.minimum(start_V + tile, ends_X[at_V])], 1)


def max_visits(M: int, E: int, tile: int) -> int:
    """Return the largest sum(ceil(size / tile)) of any sizes: as many as possible of the E groups and the remaining
    rows have one row more than whole tiles."""
    filled = min(E + 1, M)
    return (M + filled * (tile - 1)) // tile


def tile_sizes(direction: str, spec: Spec, M: int, E: int, K: int, N: int, G: int, dtype: Any) -> Sizes:
    """Return the tile of 'forward' or of 'weights_gradient', with the sizes that spec.tiles does not set.

    Forward: rows as in an average group, as a power of two from 16 to 128 (a group wastes half a tile on average); 128
    columns over all gates; 64 elements of the contraction. Weight gradient: 128 x 128 elements of the matrix and 64
    rows per step, fewer if groups are smaller. float32, with twice the bytes and three passes, gets half of these
    sizes; so does the contraction if K or N leaves addresses unaligned.

    The sizes were chosen without a GPU, by Triton's compiler and ptxas 13 for compute capabilities 8.0 and 9.0 (some
    for 8.6): nothing spills, shared memory is at most 96 KiB (supported GPUs have at least 99), and products use wgmma
    for 9.0. With 128 x 256 tiles, or four warps instead of eight, 12 to 300 bytes per thread spill, and 12.5 KB in the
    weight gradient for 8.0.
    """
    wide = jnp.dtype(dtype).itemsize == 4
    rows = max(MIN_TILE, 1 << (max(M // E, 1).bit_length() - 1))
    if direction == "forward":
        m, n, k = (
            min(rows, 64 if wide else 128),
            (64 if wide else 128) // pl.next_power_of_2(G),
            32 if wide or K % 8 or N % 8 else 64,
        )
    else:
        m, n, k = min(rows, 32 if wide else 64), 64 if wide else 128, 64 if wide else 128
    fit = lambda size, length: max(MIN_TILE, min(size, pl.next_power_of_2(length)))
    t = spec.tiles
    m, n, k = t.m or m, t.n or fit(n, N), t.k or fit(k, K)
    sums = m * n * G if direction == "forward" else k * n
    return Sizes(m, n, k, warps=8 if sums > 64 * 128 else 4, stages=2 if wide else 3)
