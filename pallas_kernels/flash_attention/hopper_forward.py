"""Flash attention forward for Hopper: two compute warpgroups, 64 queries each, and one that copies.

The copy warpgroup loads tiles of keys and values by TMA into a ring in shared memory, and reuses a slot once both
compute warpgroups have released it. These alternate (Shah et al. 2024, section 3.1): while one uses the tensor cores,
the other computes its softmax, so that neither unit idles. hopper.py lists what has been tested.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension, V head dimension of the values;
Q queries of a warpgroup, J keys of a tile.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.flash_attention import hopper_parts as parts
from pallas_kernels.flash_attention.hopper_parts import LOG2E, ROWS, START, TILE, TRANSFORMS, WARPGROUPS
from pallas_kernels.flash_attention.mask import MASKED, tile_kinds
from pallas_kernels.flash_attention.spec import Extra, Spec


def plan(H: int, V: int, S: int, block_k: int | None, tile_k: int | None) -> tuple[int, int] | None:
    """Return (keys per tile, slots of the ring), or None if nothing fits in memory and divides `block_k`, the keys per
    block of the mask.

    A tile has 128 keys if two slots fit, else 64. The accumulators [64, V] and [64, keys] share 240 registers per
    thread.
    """
    # Bytes of queries, outputs and lse, and of barriers and reductions.
    fixed = 2 * TILE * (H + (V if V != H else 0)) + 4 * TILE + 4096
    for keys in (tile_k,) if tile_k else (128, 64) if S > 64 else (64,):
        slots = min(4, (parts.SHARED_MEMORY - fixed) // (2 * keys * (H + V)))
        if slots >= 2 and keys % 64 == 0 and keys + V <= 320 and (block_k or keys) % keys == 0:
            return keys, slots
    return None


def forward(spec: Spec, q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, extra: Extra) -> tuple[Array, Array]:
    """See spec.py."""
    B, T, N, H = q_BTNH.shape
    S, V, half = k_BSKH.shape[1], v_BSKV.shape[3], q_BTNH.dtype
    planned = plan(H, V, S, spec.mask.block_shape and spec.mask.block_shape[1], spec.tiles.k)
    assert planned is not None, "`unsupported` refuses such a call"
    tile_k, slots = planned
    T_padded, S_padded = parts.round_up(T, TILE), parts.round_up(S, tile_k)
    arrays = {
        "q": parts.pad(q_BTNH, 1, T_padded), "k": parts.pad(k_BSKH, 1, S_padded), "v": parts.pad(v_BSKV, 1, S_padded),
        **parts.schedule(tile_kinds(spec.mask, extra.data, T, S, TILE, tile_k)),
        **parts.side_arrays(spec, extra, T_padded, S_padded),
    }  # fmt: skip
    if extra.sinks_N is not None:
        arrays["sinks"] = extra.sinks_N
    ring = lambda width: plgpu.SMEM((slots, tile_k, width), half, transforms=TRANSFORMS)
    own = lambda width: plgpu.SMEM((WARPGROUPS, ROWS, width), half, transforms=TRANSFORMS)
    scratch = {
        "q": own(H), "k": ring(H), "v": ring(V), "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_ready": plgpu.Barrier(num_barriers=slots), "v_ready": plgpu.Barrier(num_barriers=slots),
        "k_done": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
        "v_done": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
        "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }  # fmt: skip
    if H != V:
        scratch["out"] = own(V)
    out_types = {
        "out": jax.ShapeDtypeStruct((B, T_padded, N, V), half),
        "lse": jax.ShapeDtypeStruct((B, N, T_padded), jnp.float32),
    }
    grid = {"head": N, "tile": T_padded // TILE, "batch": B}
    out, lse = parts.launch(partial(_block, spec, S, extra.data.offset), spec, grid, arrays, out_types, scratch)
    return out[:, :T], lse[:, :, :T]


def _block(spec: Spec, S: int, offset, memory: parts.Refs, shared: parts.Refs) -> None:
    """Compute 128 queries of one head of one row."""
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    tile, tiles = lax.axis_index("tile"), memory["order"].shape[2]
    if spec.mask.causal:
        tile = tiles - 1 - tile  # longest first, so that short ones fill the gaps at the end
    full, some, visit = parts.visits(memory, batch, head, tile)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(parts.COMPUTE_REGISTERS, action="increase")
        _compute(spec, S, offset, memory, shared, (batch, head, tile, warpgroup), full, some, visit)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(parts.COPY_REGISTERS, action="decrease")
        _copy(memory, shared, batch, head, some, visit)


def _copy(memory: parts.Refs, shared: parts.Refs, batch, head, some, visit) -> None:
    """Fill the ring with one tile after another."""
    slots, tile_k, _ = shared["k"].shape
    kv_head = lax.div(head, jnp.int32(memory["q"].shape[2] // memory["k"].shape[2]))

    def fill(step, _):
        slot = lax.rem(step, jnp.int32(slots))
        where = (batch, pl.ds(visit(step) * tile_k, tile_k), kv_head)
        for name in ("k", "v"):
            pl.when(step >= slots)(partial(plgpu.barrier_wait, shared[f"{name}_done"].at[slot]))
            plgpu.copy_gmem_to_smem(memory[name].at[where], shared[name].at[slot], shared[f"{name}_ready"].at[slot])

    lax.fori_loop(0, some, fill, None)
    parts.drain(some, shared["k_done"], shared["v_done"])


def _compute(spec: Spec, S: int, offset, memory: parts.Refs, shared: parts.Refs, place, full, some, visit) -> None:
    """Run the online softmax of a warpgroup's 64 queries over the tiles of the schedule."""
    batch, head, tile, warpgroup = place
    interpret, (slots, tile_k, V), half = spec.interpret, shared["v"].shape, shared["v"].dtype
    shape = (ROWS, tile_k)
    q_first = tile * TILE + warpgroup * ROWS
    queries = (batch, pl.ds(q_first, ROWS), head)
    q_smem = shared["q"].at[warpgroup]
    factor = parts.factor_of(spec, memory)

    plgpu.copy_gmem_to_smem(memory["q"].at[queries], q_smem, shared["q_ready"].at[warpgroup])
    plgpu.barrier_wait(shared["q_ready"].at[warpgroup])

    def turn():
        """Hand the tensor cores to the other warpgroup and wait to get them back."""
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["turn"])

    def visit_tile(step, carry, partial_tile: bool):
        acc_QV, top_Q, total_Q = carry
        slot = lax.rem(step, jnp.int32(slots))
        plgpu.barrier_wait(shared["k_ready"].at[slot])
        (s_QJ,) = parts.products([(q_smem, shared["k"].at[slot])], interpret, meanwhile=turn)
        plgpu.barrier_arrive(shared["k_done"].at[slot])
        firsts = lambda: (q_first, visit(step) * tile_k)
        s_QJ, _, kept = parts.logits(spec, S, offset, memory, batch, head, s_QJ, firsts, 0, partial_tile)
        new_Q = jnp.maximum(top_Q, s_QJ.max(axis=1) * factor)
        fade_Q = jnp.exp2(top_Q - new_Q)
        p_QJ = jnp.exp2(s_QJ * factor - parts.broadcast(new_Q, shape, 0))
        acc_QV = acc_QV * parts.broadcast(fade_Q, (ROWS, V), 0)
        total_Q = total_Q * fade_Q + p_QJ.sum(axis=1)
        if kept is not None:
            p_QJ = jnp.where(kept, p_QJ, 0.0)
        # Without this barrier the compiler may move the arithmetic into the other warpgroup's turn.
        acc_QV, total_Q, new_Q, p_QJ = lax.optimization_barrier((acc_QV, total_Q, new_Q, p_QJ.astype(half)))
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["v_ready"].at[slot])
        plgpu.barrier_wait(shared["turn"])
        (acc_QV,) = parts.accumulate([(acc_QV, p_QJ, shared["v"].at[slot])], interpret)
        plgpu.barrier_arrive(shared["v_done"].at[slot])
        return acc_QV, new_Q, total_Q

    column = lambda value: parts.placed(jnp.full((ROWS,), value, jnp.float32), 0, interpret)
    sinks = "sinks" in memory
    top = column(memory["sinks"][head] * LOG2E if sinks else START)
    carry = parts.zeros((ROWS, V), interpret), top, column(1.0 if sinks else 0.0)
    pl.when(warpgroup == 1)(turn)
    carry = lax.fori_loop(0, full, partial(visit_tile, partial_tile=False), carry)
    acc_QV, top_Q, total_Q = lax.fori_loop(full, some, partial(visit_tile, partial_tile=True), carry)
    pl.when(warpgroup == 0)(turn)

    has_keys_Q = total_Q > 0
    total_Q = jnp.where(has_keys_Q, total_Q, 1.0)
    out_smem, lse_smem = shared["out" if "out" in shared else "q"].at[warpgroup], shared["lse"].at[warpgroup]
    out_smem[...] = (acc_QV * parts.broadcast(1.0 / ((1.0 - spec.dropout) * total_Q), (ROWS, V), 0)).astype(half)
    lse_smem[...] = jnp.where(has_keys_Q, top_Q * math.log(2) + jnp.log(total_Q), MASKED)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, memory["out"].at[queries])
    plgpu.copy_smem_to_gmem(lse_smem, memory["lse"].at[batch, head, pl.ds(q_first, ROWS)])
    plgpu.wait_smem_to_gmem(0)
