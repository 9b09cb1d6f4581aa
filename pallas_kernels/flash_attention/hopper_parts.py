"""What the Hopper kernels share: the schedule of tiles, the logits and the mask of a tile, and the few operations which
the interpreter of jax's Mosaic GPU lacks, with their stand-ins.

Shapes: B batch, N query heads, T queries, S keys; I tiles of queries, J tiles of keys. Tiles in registers are [queries,
keys] in the forward pass and for dq, [keys, queries] for dk and dv; `q_axis` says which.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.mask import EMPTY, FULL, MASKED, visible
from pallas_kernels.flash_attention.spec import Extra, Spec

LOG2E = math.log2(math.e)
ROWS = 64  # of a tile in one warpgroup: wgmma's M
WARPGROUPS = 2  # that compute; one more copies
TILE = ROWS * WARPGROUPS  # rows that a block owns: of queries, or of keys for dk and dv
SHARED_MEMORY = 227 * 1024  # bytes a block may have on Hopper
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # a thread; 128 * (2 * 240 + 24) of the 65,536 there are
START = -1e15  # running maximum before any key: below every logit, above MASKED, so that exp2(MASKED - START) is 0

# 16-bit matrices in shared memory as wgmma and TMA want them.
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# jax 0.10 asks for an index, 0.12 takes none.
LOAD_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()

Refs = dict[str, Any]


def schedule(kinds_BNIJ: np.ndarray | Array) -> dict[str, Int[Array, "..."]]:
    """For each tile of queries the tiles of keys to visit; with the last axes swapped, the other way round.

    order [B|1, N|1, I, J]: FULL tiles first, then PARTIAL ones, each kind in its own order, then what is never read.
    full, some [B|1, N|1, I]: how many of `order` are FULL, and how many are not EMPTY. Masks are applied from `full` on
    only, and EMPTY tiles are neither loaded nor counted, so that the kernels' loops hold no branch. All int32.
    """
    xp = np if isinstance(kinds_BNIJ, np.ndarray) else jnp
    arrays = {
        "order": xp.argsort(FULL - kinds_BNIJ, axis=-1, stable=True),
        "full": (kinds_BNIJ == FULL).sum(-1),
        "some": (kinds_BNIJ != EMPTY).sum(-1),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


def visits(memory: Refs, batch, head, tile):
    """(full, some, function of a step that gives the tile to visit) of one tile, from `schedule`'s arrays."""
    counts = memory["full"].shape
    row = (batch if counts[0] > 1 else 0, head if counts[1] > 1 else 0, tile)
    return memory["full"][row], memory["some"][row], lambda step: memory["order"][(*row, step)]


def side_arrays(spec: Spec, extra: Extra, T_padded: int, S_padded: int) -> dict[str, Array]:
    """The arrays that masks and logits ask for, by name, padded along the sequence; int32, but for float32 `alibi`."""
    data = extra.data
    found = {
        "q_segments": (data.q_segments_BT, T_padded),
        "k_segments": (data.k_segments_BS, S_padded),
        "q_positions": (data.q_positions_BT if spec.mask.strided else None, T_padded),
        "k_positions": (data.k_positions_BS if spec.mask.strided else None, S_padded),
        "k_prefix": (data.prefix_BS, S_padded),
    }
    arrays = {name: pad(x.astype(jnp.int32), 1, length) for name, (x, length) in found.items() if x is not None}
    if data.offset is not None and not isinstance(data.offset, int):
        arrays["offset"] = data.offset
    if extra.alibi_N is not None:
        arrays["alibi"] = extra.alibi_N
    if extra.seed is not None:
        arrays["seed"] = extra.seed.reshape(1)
    return arrays


def pad(x: Array, axis: int, length: int, value: float = 0) -> Array:
    """x with `value` behind along `axis`; a copy only where it is not `length` long yet."""
    if x.shape[axis] == length:
        return x
    widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def up(length: int, tile: int) -> int:
    """`length` rounded up to whole tiles."""
    return -(-length // tile) * tile


# What the interpreter lacks. Everything else of the kernels runs in it as it stands.


def interpreter(interpret: bool) -> Any:
    """What `plgpu.kernel` takes as `interpret`: jax's Mosaic GPU interpreter with memory that starts as NaN, or
    None."""
    if not interpret:
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.12 on

    return InterpretGPUParams(uninitialized_memory="nan")


def vector(ref, index, axis: int, interpret: bool):
    """A vector from device or shared memory, laid out as axis `axis` of a tile that wgmma writes."""
    if interpret:
        return ref[index]
    # "optimized" would ask for one piece a thread; here a thread takes what it needs of the tile's rows or columns.
    return plgpu.load(ref.at[index], *LOAD_INDEX, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def placed(x, axis: int | None, interpret: bool):
    """x laid out as a tile that wgmma writes (None), or as axis `axis` of one."""
    if interpret:
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(1 - axis))


def products(pairs, interpret: bool, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
    """a @ b^T in float32 for each (a, b) in shared memory; `meanwhile` runs while the tensor cores work."""
    if interpret:
        rows_by_rows = (((1,), (1,)), ((), ()))
        results = [lax.dot_general(a[...], b[...], rows_by_rows, preferred_element_type=jnp.float32) for a, b in pairs]
        plgpu.commit_smem()  # wgmma reads as TMA writes, which loads do not: for the interpreter's search for races
        meanwhile()
        return results

    def body(*sums):
        for out, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(out, a, b.transpose((1, 0)))
        meanwhile()
        return [out[...] for out in sums]

    return pl.run_scoped(body, *(plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs))


def accumulate(terms, interpret: bool) -> tuple[Any, ...]:
    """sum + a @ b for each (sum, a, b): float32 sum and 16-bit a in registers, b in shared memory."""
    if interpret:
        results = tuple(total + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for total, a, b in terms)
        plgpu.commit_smem()
        return results

    def body(sums):
        for out, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(out, a, b)

    return pl.run_state(body)(tuple(plgpu.ACC.init(total) for total, _, _ in terms))


# Tiles in registers.


def spread(x, shape: tuple[int, int], axis: int):
    """A vector along `axis`, repeated to a tile."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def zeros(shape: tuple[int, int], interpret: bool):
    """A tile of float32 zeros, to accumulate into."""
    return placed(jnp.zeros(shape, jnp.float32), None, interpret)


def factor_of(spec: Spec, memory: Refs) -> float:
    """What `logits`' results are still to be multiplied by: 1 unless a logit is a positive multiple of q.k, where the
    product is left to be fused with the subtraction that follows."""
    plain = spec.softcap is None and "alibi" not in memory and spec.scale > 0
    return spec.scale * LOG2E if plain else 1.0


def logits(spec: Spec, S: int, offset, memory: Refs, batch, head, s, firsts: Callable, q_axis: int, partial: bool):
    """Masked logits from the products s = q.k of a tile: (log2(e) / `factor_of` times the logits, their derivative by
    scale * q.k or None for 1, which weights dropout keeps or None for all).

    `firsts` gives the index of the tile's first query and of its first key, and is called only where it matters;
    `partial`: whether the tile needs the mask. A pair unseen, or a key beyond S, gets MASKED. `offset`: that of the
    call where it is static.
    """
    axes = (q_axis, 1 - q_axis)
    first: tuple[Any, Any] = (None, None)  # None where nothing needs them
    indices: tuple[Any, Any] = (None, None)
    slots: tuple[Any, Any] = (None, None)
    if partial or spec.dropout or "alibi" in memory:
        first = firsts()
        place = lambda axis: placed(lax.broadcasted_iota(jnp.int32, s.shape, axis), None, spec.interpret)
        indices = place(axes[0]) + first[0], place(axes[1]) + first[1]
        slots = indices[0] + (memory["offset"][batch] if "offset" in memory else offset), indices[1]
    slope = None
    if spec.softcap is not None:
        # tanh from exp2: the hardware's own tanh has 11 bits, too few for logits of tens.
        bent = 1.0 - 2.0 / (1.0 + jnp.exp2(s * (2.0 * LOG2E * spec.scale / spec.softcap)))
        s, slope = bent * (spec.softcap * LOG2E), 1.0 - bent * bent
    elif factor_of(spec, memory) == 1.0:
        s = s * (spec.scale * LOG2E)
    if "alibi" in memory:
        s = s - jnp.abs(slots[0] - slots[1]).astype(jnp.float32) * (memory["alibi"][head] * LOG2E)
    if partial:

        def tile_of(name: str):
            if name not in memory:
                return None
            side = 0 if name.startswith("q_") else 1
            index = (batch, pl.ds(first[side], s.shape[axes[side]]))
            return spread(vector(memory[name], index, axes[side], spec.interpret), s.shape, axes[side])

        prefix = tile_of("k_prefix")
        seen = visible(
            spec.mask, *slots, tile_of("q_segments"), tile_of("k_segments"), tile_of("q_positions"),
            tile_of("k_positions"), None if prefix is None else prefix != 0,
        )  # fmt: skip
        if memory["k"].shape[1] > S:  # padded
            seen = indices[1] < S if seen is None else seen & (indices[1] < S)
        if seen is not None:
            s = jnp.where(seen, s, MASKED)
    kept = keep(memory["seed"][0], batch, head, *indices, spec.dropout) if spec.dropout else None
    return s, slope, kept


# Launching.


def launch(block, spec: Spec, grid: dict[str, int], arrays: dict[str, Array], out_types: dict[str, Any], scratch: Refs):
    """`block(memory, shared)` for each point of the grid, in three warpgroups; a list of the outputs. `memory` holds
    the inputs and outputs by name, `shared` the scratch."""

    def body(*refs):
        names = [*arrays, *out_types]
        memory = dict(zip(names, refs, strict=False))
        block(memory, dict(zip(scratch, refs[len(names) :], strict=True)))

    return plgpu.kernel(
        body,
        out_type=tuple(out_types.values()),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=tuple(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter(spec.interpret),
    )(*arrays.values())


def drain(steps, *done) -> None:
    """Waits for the last arrivals at rings of barriers that were not waited for while filling: who waits on a barrier
    must see each of its phases."""
    slots = done[0].shape[0]

    def wait(step, _):
        for barrier in done:
            plgpu.barrier_wait(barrier.at[lax.rem(step, jnp.int32(slots))])

    lax.fori_loop(jnp.maximum(steps - slots, 0), steps, wait, None)
