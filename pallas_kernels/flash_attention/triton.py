"""Flash attention on GPUs (Ampere and later) through Pallas' Triton lowering.

Forward: one program for each tile of queries of each head, which loops over the tiles of keys that it sees. Backward:
the same for dq; for dk and dv, one program for each tile of keys of each key/value head, which loops over the query
heads and the tiles of queries that see it. Without atomics, the result is deterministic. EMPTY tiles are not visited,
and FULL tiles are computed without a mask. jax 0.12 warns that this lowering is deprecated.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension, V head dimension of the values;
I tiles of queries, J tiles of keys.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.flash_attention import triton_kernels as kernels
from pallas_kernels.flash_attention.mask import EMPTY, FULL, PARTIAL, tile_kinds
from pallas_kernels.flash_attention.spec import Extra, Shaped, Spec

MIN_TILE, MAX_COLUMNS = 16, 256


def unsupported(spec: Spec, q: Shaped, k: Shaped, v: Shaped, extra: Extra) -> str | None:
    """Return the reason why the kernels cannot run a call, or None."""
    if extra.bias_BNTS is not None:
        return (
            "bias_BNTS is not supported: the bias and its gradient take O(T S) memory. Use implementation='xla', or "
            "alibi_N, which the kernel computes"
        )
    if q.dtype == jnp.float64:
        return "float64 is not supported; use implementation='xla'"
    if max(q.shape[-1], v.shape[-1]) > MAX_COLUMNS:
        return f"head dimensions {q.shape[-1]} and {v.shape[-1]}: at most {MAX_COLUMNS} fit in a GPU's registers"
    for name in ("q", "k", "q_dkv", "k_dkv", "q_dq", "k_dq"):
        size, block = getattr(spec.tiles, name), _block(spec, name)
        if size is not None and (size < MIN_TILE or size & (size - 1)):
            return f"tiles.{name} = {size}: must be a power of two of at least {MIN_TILE}, or None"
        if block is not None and block % (size or MIN_TILE):
            return (
                f"mask.block_shape = {spec.mask.block_shape}: tiles are powers of two of at least {MIN_TILE}, and "
                f"tiles.{name} = {size or MIN_TILE} does not divide {block}"
            )
    return None


def forward(spec: Spec, q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, extra: Extra) -> tuple[Array, Array]:
    """See spec.py."""
    call = _Call("forward", spec, q_BTNH, k_BSKH, v_BSKV, extra)
    B, T, N, _ = q_BTNH.shape
    outputs = {"out": ((B, T, N, v_BSKV.shape[3]), q_BTNH.dtype), "lse": ((B, N, T), jnp.float32)}
    return call.run(kernels.forward, {}, outputs)


def backward(spec: Spec, q_BTNH, k_BSKH, v_BSKV, extra: Extra, lse_BNT, delta_BNT, dout_BTNV):
    """See spec.py."""
    given = {"dout": dout_BTNV, "lse": lse_BNT, "delta": delta_BNT}
    dkv = _Call("dkv", spec, q_BTNH, k_BSKH, v_BSKV, extra)
    dk, dv = dkv.run(kernels.dkv, given, {"dk": (k_BSKH.shape, k_BSKH.dtype), "dv": (v_BSKV.shape, v_BSKV.dtype)})
    dq = _Call("dq", spec, q_BTNH, k_BSKH, v_BSKV, extra)
    (dq,) = dq.run(kernels.dq, given, {"dq": (q_BTNH.shape, q_BTNH.dtype)})
    return dq, dk, dv, None


# (queries per tile, keys per tile, warps, stages of the loop's pipeline) for 16-bit inputs, by the larger head
# dimension, up to 64, 128 and 256. Chosen without a GPU, from ptxas' output for compute capabilities 8.0 and 9.0: the
# largest tiles that keep the accumulators in registers and fit in 99 KiB of shared memory, the least of any supported
# GPU (8.6, 8.9, 12.0).
SIZES = {
    "forward": {64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "dkv": {64: (64, 128, 8, 2), 128: (64, 64, 8, 2), 256: (32, 32, 8, 2)},
    "dq": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (32, 32, 4, 2)},
}
# For float32, which takes twice the bytes, and whose products in three passes keep both halves of each operand.
SIZES_FLOAT32 = {
    "forward": {64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 4, 2)},
    "dkv": {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 8, 2)},
    "dq": {64: (32, 32, 4, 2), 128: (32, 32, 8, 2), 256: (16, 16, 4, 2)},
}
# The widest part of a head dimension in one operand, by bytes per element. With 256 for float32, registers spill.
MAX_PART = {2: 256, 4: 64}


class _Call:
    """The arrays, block specs and plan of one kernel."""

    def __init__(self, direction: str, spec: Spec, q: Array, k: Array, v: Array, extra: Extra):
        data, mask = extra.data, spec.mask
        B, T, N, H = q.shape
        _, S, K, V = v.shape
        self.grid_of_keys = direction == "dkv"
        tile_q, tile_k, self.warps, self.stages = sizes(direction, spec, T, S, max(H, V), q.dtype)
        kinds_BNIJ = tile_kinds(mask, data, T, S, tile_q, tile_k)
        static = isinstance(kinds_BNIJ, np.ndarray)
        xp = np if static else jnp
        if self.grid_of_keys:
            if T % tile_q:  # the last tile reaches beyond T, so its queries need a mask
                whole = xp.arange(kinds_BNIJ.shape[2]) < T // tile_q
                kinds_BNIJ = xp.where(whole[:, None], kinds_BNIJ, kinds_BNIJ.clip(max=PARTIAL))
            kinds_BNIJ = kinds_BNIJ.swapaxes(2, 3)
        in_ranges = mask.strided is None and all(part is None for part in data[1:])
        walk = list_tiles(kinds_BNIJ, in_ranges)
        self.plan = kernels.Plan(
            spec, T, S, N, K, H, V, tile_q, tile_k, MAX_PART[q.dtype.itemsize],
            offset=data.offset if isinstance(data.offset, int) else None,
            ranges=in_ranges,
            any_full=not static or bool((kinds_BNIJ == FULL).any()),
            any_partial=not static or bool((kinds_BNIJ == PARTIAL).any()),
        )  # fmt: skip
        self.grid = (kinds_BNIJ.shape[2], K if self.grid_of_keys else N, B)
        worked = (kinds_BNIJ != EMPTY).mean() if static else 0.5 if mask.causal else 1.0
        self.pairs = round(float(worked) * B * N * T * S)
        self.arrays = {
            "walk": walk, "q": q, "k": k, "v": v, "q_segments": data.q_segments_BT, "k_segments": data.k_segments_BS,
            "q_positions": data.q_positions_BT if mask.strided else None,
            "k_positions": data.k_positions_BS if mask.strided else None,
            "k_prefix": None if data.prefix_BS is None else data.prefix_BS.astype(jnp.int32),
            "offset": None if isinstance(data.offset, int) else data.offset,
            "alibi": extra.alibi_N, "sinks": extra.sinks_N if direction == "forward" else None,
            "seed": None if extra.seed is None else extra.seed.reshape(1),
        }  # fmt: skip

    def run(self, kernel: Any, given: dict[str, Array], outputs: dict[str, tuple[tuple[int, ...], Any]]):
        """Run `kernel` over the grid and return the list of `outputs`."""
        arrays = {name: x for name, x in (self.arrays | given).items() if x is not None}
        shapes = {name: x.shape for name, x in arrays.items()} | {name: shape for name, (shape, _) in outputs.items()}
        specs = {name: self._spec(name, shape) for name, shape in shapes.items()}
        p, dots = self.plan, {kernels.forward: (1, 1), kernels.dq: (2, 1), kernels.dkv: (2, 2)}[kernel]
        results = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs.values()]
        return pl.pallas_call(
            partial(kernel, p),
            grid=self.grid,
            in_specs=[{name: specs[name] for name in arrays}],
            out_specs=[specs[name] for name in outputs],
            out_shape=results,
            interpret=p.spec.interpret,
            compiler_params=plgpu.CompilerParams(num_warps=self.warps, num_stages=self.stages),
            cost_estimate=pl.CostEstimate(
                flops=2 * self.pairs * (dots[0] * p.H + dots[1] * p.V),
                transcendentals=self.pairs * (1 if p.spec.softcap is None else 2),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays.values(), *results)),
            ),
            name=f"flash_attention_{kernel.__name__}",
        )(arrays)

    def _spec(self, name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
        """Return an array's block spec: a program gets one whole row of the batch and reads the part it needs; of
        `walk` it gets only its own tile's line."""
        p = self.plan
        if name == "walk":
            lines, axis = (shape[0] > 1), self.grid[0]
            reverse = p.heavy_last and not self.grid_of_keys
            index = lambda i, n, b: (b if lines else 0, 0, axis - 1 - i if reverse else i, 0)
            return pl.BlockSpec((None, shape[1], None, shape[3]), index)
        if len(shape) == 1:
            by_row = name == "offset"
            return pl.BlockSpec((1,) if by_row else shape, lambda i, n, b: (b if by_row else 0,))
        up = lambda n, to: -(-n // to) * to
        block: tuple[int | None, ...]
        whole_q, whole_k = up(p.T, p.tile_q), up(p.S, p.tile_k)
        if name in ("lse", "delta"):
            block = (None, p.N, whole_q)
        elif len(shape) == 2:
            block = (None, whole_q if name.startswith("q_") else whole_k)
        else:
            rows = whole_q if name in ("q", "dout", "out", "dq") else whole_k
            block = (None, rows, shape[2], up(shape[3], kernels.MIN_PART))
        return pl.BlockSpec(block, lambda i, n, b: (b,) + (0,) * (len(block) - 1))


def sizes(direction: str, spec: Spec, T: int, S: int, columns: int, dtype: Any) -> tuple[int, int, int, int]:
    """Return (queries per tile, keys per tile, warps, stages) of 'forward', 'dkv' or 'dq'."""
    table = SIZES_FLOAT32 if jnp.dtype(dtype).itemsize == 4 else SIZES
    row = table[direction][next(limit for limit in (64, 128, 256) if columns <= limit)]
    wanted, (warps, stages) = list(row[:2]), row[2:]
    suffix = "" if direction == "forward" else f"_{direction}"
    for n, (side, length) in enumerate((("q", T), ("k", S))):
        given, block = getattr(spec.tiles, side + suffix), _block(spec, side)
        fitting = min(wanted[n], max(MIN_TILE, pl.next_power_of_2(length)), (block and block & -block) or MAX_COLUMNS)
        wanted[n] = given or fitting
    return wanted[0], wanted[1], warps, stages


def _block(spec: Spec, name: str) -> int | None:
    """Return the queries or keys per block of the mask, for a tile size of that name, or None."""
    shape = spec.mask.block_shape
    return None if shape is None else shape[name.startswith("k")]


def list_tiles(kinds_BNIJ: np.ndarray | Array, in_ranges: bool) -> np.ndarray | Array:
    """Return the tiles that each tile of queries (or, if the last axes are swapped, of keys) visits, int32 [B|1, N|1,
    I, W]: the number of FULL tiles, the number of PARTIAL ones, and then

    - if `in_ranges`, for masks that see one range of tiles with the FULL ones in the middle: the first tile, and the
      number of PARTIAL tiles before the FULL ones, so that the kernel finds its tiles by addition;
    - otherwise the indices of the tiles, FULL before PARTIAL.
    """
    xp = np if isinstance(kinds_BNIJ, np.ndarray) else jnp
    full, partial_ = kinds_BNIJ == FULL, kinds_BNIJ == PARTIAL
    counts = [full.sum(-1), partial_.sum(-1)]
    if in_ranges:
        start = (kinds_BNIJ != EMPTY).argmax(-1)
        left = xp.where(counts[0] > 0, full.argmax(-1) - start, counts[1])
        return xp.stack([*counts, start, left], -1).astype(xp.int32)
    order = xp.argsort(-kinds_BNIJ, axis=-1, stable=True)
    return xp.concatenate([xp.stack(counts, -1), order], -1).astype(xp.int32)
