"""Grouped matmul on GPUs through Pallas' Triton lowering: Ampere and later.

Forward: each group's rows are cut into tiles that start where the group starts, so that the work is sum(ceil(size /
tile)) visits, none for an empty group; XLA lists them from the sizes, and one program takes one visit and one tile of
columns. The grid is the most visits that any sizes can ask for; what is left over ends at once. Nothing of E times the
size is made. Weight gradient: one program for each tile of each group's matrix, which goes over the group's rows; no
atomics, so the result is the same each time. jax 0.12 warns that this lowering is deprecated. An activation must be of
what the lowering knows (exp, tanh, logistic, max, products and the like; not erf).

Any M, K and N, and any sizes, by masks; the rows that masks stop are not read. Where K or N is no multiple of 8,
addresses are not aligned to 16 bytes and loads are narrow.

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

LEAST_TILE, MOST_GATES = 16, 8


class Sizes(NamedTuple):
    """A kernel's tile, warps, and stages of its loop's pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def unsupported(spec: Spec, lhs: Shaped, rhs: Shaped, scale: Shaped | None) -> str | None:
    """Why the call cannot run here, or None."""
    if target()[0] not in ("gpu", "cuda") and not spec.interpret:
        return f"needs a GPU, not a {target()[0]}; interpret=True runs it there, slowly"
    if lhs.dtype == jnp.float64:
        return "float64 has no kernel; implementation='xla' takes it"
    for name, size in vars(spec.tiles).items():
        if size is not None and size < LEAST_TILE:
            return f"tiles.{name} = {size}: a matrix product in Triton takes {LEAST_TILE} at least"
    if rhs.ndim == 4 and rhs.shape[2] > MOST_GATES:
        return f"{rhs.shape[2]} gates: at most {MOST_GATES}, whose sums fit in a GPU's registers"
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        # Pallas counts in signed 32 bits up to 2**32 bytes, whatever the size of an element.
        if 2**31 < x.size and x.size * x.dtype.itemsize <= 2**32:
            return f"{name} of {x.size} elements of 8 bits: between 2**31 and 2**32 their addresses overflow"
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
    """int32 [V, 3]: (group, first row, row after the last) of each tile of rows, in order; first the groups', then, as
    group E, those of the rows after the last group, then empty ones. V is the most that any sizes can ask for."""
    E = sizes_E.shape[0]
    ends_X = jnp.append(jnp.minimum(jnp.cumsum(sizes_E), M), M).astype(jnp.int32)  # of E groups and of what is left
    starts_X = jnp.pad(ends_X[:-1], (1, 0))
    last_X = jnp.cumsum((ends_X - starts_X + tile - 1) // tile)
    first_X = jnp.pad(last_X[:-1], (1, 0))
    visit_V = jnp.arange(most_visits(M, E, tile), dtype=jnp.int32)
    group_V = (visit_V[:, None] >= last_X).sum(1, dtype=jnp.int32)
    at_V = jnp.minimum(group_V, E)
    start_V = jnp.minimum(starts_X[at_V] + (visit_V - first_X[at_V]) * tile, M)
    return jnp.stack([at_V, start_V, jnp.minimum(start_V + tile, ends_X[at_V])], 1)


def most_visits(M: int, E: int, tile: int) -> int:
    """sum(ceil(size / tile)) where as many as can be of E groups and the rest have one row more than whole tiles."""
    filled = min(E + 1, M)
    return (M + filled * (tile - 1)) // tile


def tile_sizes(direction: str, spec: Spec, M: int, E: int, K: int, N: int, G: int, dtype: Any) -> Sizes:
    """The tile of 'forward' or of 'weights_gradient', where spec.tiles leaves it open.

    Forward: rows as many as a group has on average, as a power of two from 16 to 128 (a group wastes half a tile); 128
    columns over all gates; 64 of the contraction. Weight gradient: 128 x 128 of the matrix, 64 rows a step, less where
    groups are smaller. float32, of twice the bytes and three passes, takes half as much; so does the contraction where
    K or N leaves addresses unaligned. Chosen without a GPU, by Triton's compiler and ptxas 13 for compute capabilities
    8.0 and 9.0 (some for 8.6): nothing spills, at most 96 KiB of shared memory (the least that GPUs have is 99),
    products on wgmma for 9.0. 128 x 256 tiles, or four warps instead of eight, spill 12 to 300 bytes a thread, the
    weight gradient for 8.0 12.5 KB.
    """
    wide = jnp.dtype(dtype).itemsize == 4
    rows = max(LEAST_TILE, 1 << (max(M // E, 1).bit_length() - 1))
    if direction == "forward":
        m, n, k = (
            min(rows, 64 if wide else 128),
            (64 if wide else 128) // pl.next_power_of_2(G),
            32 if wide or K % 8 or N % 8 else 64,
        )
    else:
        m, n, k = min(rows, 32 if wide else 64), 64 if wide else 128, 64 if wide else 128
    fit = lambda size, length: max(LEAST_TILE, min(size, pl.next_power_of_2(length)))
    t = spec.tiles
    m, n, k = t.m or m, t.n or fit(n, N), t.k or fit(k, K)
    sums = m * n * G if direction == "forward" else k * n
    return Sizes(m, n, k, warps=8 if sums > 64 * 128 else 4, stages=2 if wide else 3)
