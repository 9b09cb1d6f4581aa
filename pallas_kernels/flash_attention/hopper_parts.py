"""Parts that the Hopper kernels share: the schedule of tiles, a tile's logits and mask, and stand-ins for the few
operations that jax's Mosaic GPU interpreter lacks.

Shapes: B batch, N query heads, T queries, S keys; I tiles of queries, J tiles of keys. Tiles in registers are [queries,
keys] in the forward pass and for dq, and [keys, queries] for dk and dv; `q_axis` is the axis of the queries.
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
ROWS = 64  # rows of a tile in one warpgroup: wgmma's M
WARPGROUPS = 2  # compute warpgroups; one more copies
TILE = ROWS * WARPGROUPS  # rows that a block owns: queries, or keys for dk and dv
SHARED_MEMORY = 227 * 1024  # bytes per block on Hopper
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # per thread; a block uses 128 * (2 * 240 + 24) of 65,536
START = -1e15  # running maximum before any key: below every logit, above MASKED, so that exp2(MASKED - START) is 0

# The layout of 16-bit matrices in shared memory that wgmma and TMA require.
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# jax 0.10 requires an index, jax 0.12 takes none.
LOAD_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()

Refs = dict[str, Any]


def schedule(kinds_BNIJ: np.ndarray | Array) -> dict[str, Int[Array, "..."]]:
    """Return the tiles of keys to visit for each tile of queries, or the reverse if the last axes are swapped.

    order [B|1, N|1, I, J]: FULL tiles first, then PARTIAL ones, both in ascending order, then entries that are never
    read. full, some [B|1, N|1, I]: how many of `order` are FULL, and how many are not EMPTY. All int32. A kernel masks
    only the tiles after the first `full` and skips EMPTY ones, so its loops need no branch.
    """
    xp = np if isinstance(kinds_BNIJ, np.ndarray) else jnp
    arrays = {
        "order": xp.argsort(FULL - kinds_BNIJ, axis=-1, stable=True),
        "full": (kinds_BNIJ == FULL).sum(-1),
        "some": (kinds_BNIJ != EMPTY).sum(-1),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


def visits(memory: Refs, batch, head, tile):
    """Return (full, some, function from a step to the tile to visit) of one tile, from `schedule`'s arrays."""
    counts = memory["full"].shape
    row = (batch if counts[0] > 1 else 0, head if counts[1] > 1 else 0, tile)
    return memory["full"][row], memory["some"][row], lambda step: memory["order"][(*row, step)]


def side_arrays(spec: Spec, extra: Extra, T_padded: int, S_padded: int) -> dict[str, Array]:
    """Return the arrays that masks and logits need, by name, padded along the sequence; int32, but float32 `alibi`."""
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
    """Return x padded with `value` to `length` along `axis`. Copies only if x is shorter."""
    if x.shape[axis] == length:
        return x
    widths = [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def round_up(length: int, tile: int) -> int:
    """Return `length` rounded up to whole tiles."""
    return -(-length // tile) * tile


# Operations that the interpreter lacks, with stand-ins. It runs everything else in the kernels unchanged.


def interpreter(interpret: bool) -> Any:
    """Return the `interpret` argument of `plgpu.kernel`: jax's Mosaic GPU interpreter with memory that starts as NaN,
    or None."""
    if not interpret:
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public from jax 0.12 on

    return InterpretGPUParams(uninitialized_memory="nan")


def vector(ref, index, axis: int, interpret: bool):
    """Load a vector from device or shared memory, laid out like axis `axis` of a tile that wgmma writes."""
    if interpret:
        return ref[index]
    # "optimized" would require one piece per thread; here a thread loads all that its rows or columns of the tile need.
    return plgpu.load(ref.at[index], *LOAD_INDEX, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def placed(x, axis: int | None, interpret: bool):
    """Return x laid out like a tile that wgmma writes (None), or like axis `axis` of one."""
    if interpret:
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(1 - axis))


def products(pairs, interpret: bool, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
    """Return a @ b^T in float32 for each (a, b) in shared memory. `meanwhile` runs while the tensor cores work."""
    if interpret:
        rows_by_rows = (((1,), (1,)), ((), ()))
        results = [lax.dot_general(a[...], b[...], rows_by_rows, preferred_element_type=jnp.float32) for a, b in pairs]
        # wgmma reads through the async proxy, like TMA. These loads do not, so the race detector needs this commit.
        plgpu.commit_smem()
        meanwhile()
        return results

    def body(*sums):
        for out, (a, b) in zip(sums, pairs, strict=True):
            plgpu.wgmma(out, a, b.transpose((1, 0)))
        meanwhile()
        return [out[...] for out in sums]

    return pl.run_scoped(body, *(plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32) for a, b in pairs))


def accumulate(terms, interpret: bool) -> tuple[Any, ...]:
    """Return sum + a @ b for each (sum, a, b): float32 sum and 16-bit a in registers, b in shared memory."""
    if interpret:
        results = tuple(total + jnp.dot(a, b[...], preferred_element_type=jnp.float32) for total, a, b in terms)
        plgpu.commit_smem()
        return results

    def body(sums):
        for out, (_, a, b) in zip(sums, terms, strict=True):
            plgpu.wgmma(out, a, b)

    return pl.run_state(body)(tuple(plgpu.ACC.init(total) for total, _, _ in terms))


# Tiles in registers.


def broadcast(x, shape: tuple[int, int], axis: int):
    """Return a vector along `axis`, broadcast to a tile."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def zeros(shape: tuple[int, int], interpret: bool):
    """Return a tile of float32 zeros to accumulate into."""
    return placed(jnp.zeros(shape, jnp.float32), None, interpret)


def factor_of(spec: Spec, memory: Refs) -> float:
    """Return the factor that the results of `logits` still lack. It is 1 unless a logit is a positive multiple of q.k;
    then the caller fuses the multiplication with the subtraction that follows."""
    plain = spec.softcap is None and "alibi" not in memory and spec.scale > 0
    return spec.scale * LOG2E if plain else 1.0


def logits(spec: Spec, S: int, offset, memory: Refs, batch, head, s, firsts: Callable, q_axis: int, partial: bool):
    """Return masked logits from the products s = q.k of a tile: (log2(e) / `factor_of` times the logits, their
    derivative with respect to scale * q.k or None for 1, the weights that dropout keeps or None for all).

    `firsts` returns the index of the tile's first query and of its first key; it is called only if needed. `partial`:
    whether the tile needs the mask. Unseen pairs and keys beyond S get MASKED. `offset`: the call's offset if static.
    """
    axes = (q_axis, 1 - q_axis)
    first: tuple[Any, Any] = (None, None)  # None if nothing needs them
    indices: tuple[Any, Any] = (None, None)
    slots: tuple[Any, Any] = (None, None)
    if partial or spec.dropout or "alibi" in memory:
        first = firsts()
        place = lambda axis: placed(lax.broadcasted_iota(jnp.int32, s.shape, axis), None, spec.interpret)
        indices = place(axes[0]) + first[0], place(axes[1]) + first[1]
        slots = indices[0] + (memory["offset"][batch] if "offset" in memory else offset), indices[1]
    slope = None
    if spec.softcap is not None:
        # tanh from exp2, because the hardware's tanh has 11 bits, too few for logits of tens.
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
            return broadcast(vector(memory[name], index, axes[side], spec.interpret), s.shape, axes[side])

        prefix = tile_of("k_prefix")
        visible_mask = visible(
            spec.mask, *slots, tile_of("q_segments"), tile_of("k_segments"), tile_of("q_positions"),
            tile_of("k_positions"), None if prefix is None else prefix != 0,
        )  # fmt: skip
        if memory["k"].shape[1] > S:  # padded
            visible_mask = indices[1] < S if visible_mask is None else visible_mask & (indices[1] < S)
        if visible_mask is not None:
            s = jnp.where(visible_mask, s, MASKED)
    kept = keep(memory["seed"][0], batch, head, *indices, spec.dropout) if spec.dropout else None
    return s, slope, kept


# Launching.


def launch(block, spec: Spec, grid: dict[str, int], arrays: dict[str, Array], out_types: dict[str, Any], scratch: Refs):
    """Run `block(memory, shared)` for each point of the grid, in three warpgroups, and return the list of outputs.
    `memory` holds the inputs and outputs by name, `shared` the scratch."""

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
    """Wait for the last arrivals at rings of barriers, for which filling did not wait. A thread that waits on a barrier
    must observe each of its phases."""
    slots = done[0].shape[0]

    def wait(step, _):
        for barrier in done:
            plgpu.barrier_wait(barrier.at[lax.rem(step, jnp.int32(slots))])

    lax.fori_loop(jnp.maximum(steps - slots, 0), steps, wait, None)
