"""Flash attention backward for Hopper: one kernel for dq, one for dk and dv. Without atomics, the result is
deterministic.

In both, a block owns 128 rows, 64 in each of two compute warpgroups, and loops over the tiles of the other side, which
a third warpgroup copies by TMA into a ring in shared memory. Weights are recomputed from lse. A step starts the
products for the logits and for dp together, then all that accumulate, so it waits for the tensor cores only twice.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension, V head dimension of the values;
Q queries and J keys of a tile.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.flash_attention import hopper_parts as parts
from pallas_kernels.flash_attention.hopper_parts import LOG2E, ROWS, TILE, TRANSFORMS, WARPGROUPS
from pallas_kernels.flash_attention.mask import MASKED, tile_kinds
from pallas_kernels.flash_attention.spec import Extra, Spec

STEP = 64  # rows of the other side per step, so that sums and products fit in 240 registers per thread


def slots_of(H: int, V: int) -> int:
    """Return the slots of the ring, in either kernel."""
    fixed = 2 * TILE * (H + V) + 4096  # bytes of the rows that a block owns, of barriers and of reductions
    return min(4, (parts.SHARED_MEMORY - fixed) // (2 * STEP * (H + V) + 8 * STEP))


def backward(spec: Spec, q_BTNH, k_BSKH, v_BSKV, extra: Extra, lse_BNT, delta_BNT, dout_BTNV):
    """See spec.py."""
    B, T, N, H = q_BTNH.shape
    _, S, K, V = v_BSKV.shape
    half, slots, mask = q_BTNH.dtype, slots_of(H, V), spec.mask
    own = lambda width: plgpu.SMEM((WARPGROUPS, ROWS, width), half, transforms=TRANSFORMS)
    ring = lambda width: plgpu.SMEM((slots, STEP, width), half, transforms=TRANSFORMS)
    numbers = plgpu.SMEM((slots, STEP), jnp.float32)
    barriers = {
        "own_ready": plgpu.Barrier(num_arrivals=2, num_barriers=WARPGROUPS),
        "done": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
    }
    ready = lambda copies: plgpu.Barrier(num_arrivals=copies, num_barriers=slots)

    def inputs(T_padded: int, S_padded: int, kinds) -> dict[str, Array]:
        return {
            "q": parts.pad(q_BTNH, 1, T_padded), "dout": parts.pad(dout_BTNV.astype(half), 1, T_padded),
            "lse": parts.pad(lse_BNT * LOG2E, 2, T_padded, -MASKED), "delta": parts.pad(delta_BNT, 2, T_padded),
            "k": parts.pad(k_BSKH, 1, S_padded), "v": parts.pad(v_BSKV, 1, S_padded),
            **parts.schedule(kinds), **parts.side_arrays(spec, extra, T_padded, S_padded),
        }  # fmt: skip

    T_padded, S_padded = parts.round_up(T, TILE), parts.round_up(S, STEP)
    arrays = inputs(T_padded, S_padded, tile_kinds(mask, extra.data, T, S, TILE, STEP))
    scratch = {"q": own(H), "dout": own(V), "k": ring(H), "v": ring(V), "ready": ready(2), **barriers}
    out_types = {"dq": jax.ShapeDtypeStruct(arrays["q"].shape, half)}
    grid = {"head": N, "tile": T_padded // TILE, "batch": B}
    (dq,) = parts.launch(partial(_dq_block, spec, S, extra.data.offset), spec, grid, arrays, out_types, scratch)

    T_padded, S_padded = parts.round_up(T, STEP), parts.round_up(S, TILE)
    arrays = inputs(T_padded, S_padded, tile_kinds(mask, extra.data, T, S, STEP, TILE).swapaxes(2, 3))
    scratch = {
        "k": own(H),
        "v": own(V),
        "q": ring(H),
        "dout": ring(V),
        "lse": numbers,
        "delta": numbers,
        "ready": ready(4),
        **barriers,
    }
    out_types = {name: jax.ShapeDtypeStruct(arrays[name[1:]].shape, half) for name in ("dk", "dv")}
    grid = {"head": K, "tile": S_padded // TILE, "batch": B}
    dk, dv = parts.launch(partial(_dkv_block, spec, S, extra.data.offset), spec, grid, arrays, out_types, scratch)
    return dq[:, :T], dk[:, :S], dv[:, :S], None


def _specialize(compute, copy) -> None:
    """Run `compute` in two warpgroups and `copy` in the third."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(parts.COMPUTE_REGISTERS, action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(parts.COPY_REGISTERS, action="decrease")
        copy()


def _copy_own(memory, shared, names, rows, warpgroup) -> None:
    """Copy the two matrices that a warpgroup owns into shared memory."""
    for name in names:
        plgpu.copy_gmem_to_smem(memory[name].at[rows], shared[name].at[warpgroup], shared["own_ready"].at[warpgroup])
    plgpu.barrier_wait(shared["own_ready"].at[warpgroup])


def _store(memory, tiles, half) -> None:
    """Write tiles to device memory. Each is (name, tile in registers, its shared memory, its rows in the output)."""
    for _, tile, smem, _ in tiles:
        smem[...] = tile.astype(half)
    plgpu.commit_smem()
    for name, _, smem, rows in tiles:
        plgpu.copy_smem_to_gmem(smem, memory[name].at[rows])
    plgpu.wait_smem_to_gmem(0)


def _gradients(spec: Spec, s, dp, number, slope, kept, factor: float):
    """Return (weights after dropout, gradient with respect to scale * q.k) of a tile.

    `number` returns the tile of lse (in base 2) or of delta. Each is loaded where it is used, since registers cannot
    hold both at once."""
    p = jnp.exp2(s * factor - number("lse"))
    used = p
    if kept is not None:
        used, dp = (jnp.where(kept, x * (1.0 / (1.0 - spec.dropout)), 0.0) for x in (p, dp))
    ds = p * (dp - number("delta"))
    return used, ds if slope is None else ds * slope


def _dq_block(spec: Spec, S: int, offset, memory: parts.Refs, shared: parts.Refs) -> None:
    """Compute dq for 128 queries of one head of one row."""
    batch, head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    tiles, interpret = memory["order"].shape[2], spec.interpret
    (slots, _, H), half = shared["k"].shape, shared["k"].dtype
    if spec.mask.causal:
        tile = tiles - 1 - tile  # longest first
    full, some, visit = parts.visits(memory, batch, head, tile)

    def copy():
        kv_head = lax.div(head, jnp.int32(memory["q"].shape[2] // memory["k"].shape[2]))

        def fill(step, _):
            slot = lax.rem(step, jnp.int32(slots))
            where = (batch, pl.ds(visit(step) * STEP, STEP), kv_head)
            pl.when(step >= slots)(partial(plgpu.barrier_wait, shared["done"].at[slot]))
            for name in ("k", "v"):
                plgpu.copy_gmem_to_smem(memory[name].at[where], shared[name].at[slot], shared["ready"].at[slot])

        lax.fori_loop(0, some, fill, None)
        parts.drain(some, shared["done"])

    def compute(warpgroup):
        shape, factor = (ROWS, STEP), parts.factor_of(spec, memory)
        q_first = tile * TILE + warpgroup * ROWS
        rows = (batch, pl.ds(q_first, ROWS), head)
        _copy_own(memory, shared, ("q", "dout"), rows, warpgroup)
        q_smem, dout_smem = shared["q"].at[warpgroup], shared["dout"].at[warpgroup]
        numbers = (batch, head, pl.ds(q_first, ROWS))
        columns = {name: parts.vector(memory[name], numbers, 0, interpret) for name in ("lse", "delta")}
        number = lambda name: parts.broadcast(columns[name], shape, 0)

        def visit_tile(step, dq_QH, partial_tile: bool):
            slot = lax.rem(step, jnp.int32(slots))
            plgpu.barrier_wait(shared["ready"].at[slot])
            k_smem, v_smem = shared["k"].at[slot], shared["v"].at[slot]
            s_QJ, dp_QJ = parts.products([(q_smem, k_smem), (dout_smem, v_smem)], interpret)
            firsts = lambda: (q_first, visit(step) * STEP)
            s_QJ, slope, kept = parts.logits(spec, S, offset, memory, batch, head, s_QJ, firsts, 0, partial_tile)
            _, ds_QJ = _gradients(spec, s_QJ, dp_QJ, number, slope, kept, factor)
            (dq_QH,) = parts.accumulate([(dq_QH, ds_QJ.astype(half), k_smem)], interpret)
            plgpu.barrier_arrive(shared["done"].at[slot])
            return dq_QH

        dq_QH = lax.fori_loop(0, full, partial(visit_tile, partial_tile=False), parts.zeros((ROWS, H), interpret))
        dq_QH = lax.fori_loop(full, some, partial(visit_tile, partial_tile=True), dq_QH)
        _store(memory, [("dq", dq_QH * spec.scale, q_smem, rows)], half)

    _specialize(compute, copy)


def _dkv_block(spec: Spec, S: int, offset, memory: parts.Refs, shared: parts.Refs) -> None:
    """Compute dk and dv for 128 keys of one key/value head of one row, over all query heads of its group."""
    batch, kv_head, tile = (lax.axis_index(name) for name in ("batch", "head", "tile"))
    group, interpret = memory["q"].shape[2] // memory["k"].shape[2], spec.interpret
    slots, half = shared["q"].shape[0], shared["q"].dtype

    def copy():
        def fill_head(g, done):
            head = kv_head * group + g
            _, some, visit = parts.visits(memory, batch, head, tile)

            def fill(step, _):
                slot, rows = lax.rem(done + step, jnp.int32(slots)), pl.ds(visit(step) * STEP, STEP)
                pl.when(done + step >= slots)(partial(plgpu.barrier_wait, shared["done"].at[slot]))
                for name in ("q", "dout", "lse", "delta"):
                    where = (batch, rows, head) if name in ("q", "dout") else (batch, head, rows)
                    plgpu.copy_gmem_to_smem(memory[name].at[where], shared[name].at[slot], shared["ready"].at[slot])

            lax.fori_loop(0, some, fill, None)
            return done + some

        parts.drain(lax.fori_loop(0, group, fill_head, jnp.int32(0)), shared["done"])

    def compute(warpgroup):
        shape, factor = (ROWS, STEP), parts.factor_of(spec, memory)
        k_first = tile * TILE + warpgroup * ROWS
        rows = (batch, pl.ds(k_first, ROWS), kv_head)
        _copy_own(memory, shared, ("k", "v"), rows, warpgroup)
        k_smem, v_smem = shared["k"].at[warpgroup], shared["v"].at[warpgroup]

        def visit_head(g, carry):
            dk_JH, dv_JV, done = carry
            head = kv_head * group + g
            full, some, visit = parts.visits(memory, batch, head, tile)

            def visit_tile(step, carry, partial_tile: bool):
                dk_JH, dv_JV = carry
                slot = lax.rem(done + step, jnp.int32(slots))
                plgpu.barrier_wait(shared["ready"].at[slot])
                q_smem, dout_smem = shared["q"].at[slot], shared["dout"].at[slot]
                s_JQ, dp_JQ = parts.products([(k_smem, q_smem), (v_smem, dout_smem)], interpret)
                firsts = lambda: (visit(step) * STEP, k_first)
                s_JQ, slope, kept = parts.logits(spec, S, offset, memory, batch, head, s_JQ, firsts, 1, partial_tile)
                number = lambda name: parts.broadcast(parts.vector(shared[name].at[slot], ..., 1, interpret), shape, 1)
                used_JQ, ds_JQ = _gradients(spec, s_JQ, dp_JQ, number, slope, kept, factor)
                terms = [(dv_JV, used_JQ.astype(half), dout_smem), (dk_JH, ds_JQ.astype(half), q_smem)]
                dv_JV, dk_JH = parts.accumulate(terms, interpret)
                plgpu.barrier_arrive(shared["done"].at[slot])
                return dk_JH, dv_JV

            sums = lax.fori_loop(0, full, partial(visit_tile, partial_tile=False), (dk_JH, dv_JV))
            sums = lax.fori_loop(full, some, partial(visit_tile, partial_tile=True), sums)
            return *sums, done + some

        widths = shared["k"].shape[2], shared["v"].shape[2]
        carry = *(parts.zeros((ROWS, width), interpret) for width in widths), jnp.int32(0)
        dk_JH, dv_JV, _ = lax.fori_loop(0, group, visit_head, carry)
        _store(memory, [("dk", dk_JH * spec.scale, k_smem, rows), ("dv", dv_JV, v_smem, rows)], half)

    _specialize(compute, copy)
