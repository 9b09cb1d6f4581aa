"""Flash attention forward for Hopper: two warpgroups that compute, 64 queries each, and one that copies.

The copying warpgroup brings tiles of keys and values through TMA into a ring in shared memory and waits, slot by slot, for
both others to be done with it. The computing ones take turns (Shah et al. 2024, section 3.1: while one has the tensor cores,
the other has its softmax), so that neither unit idles. Never run on a GPU by us: see hopper.py.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension, V that of the values; Q = 64 queries of
a warpgroup, J keys of a tile.
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
from pallas_kernels.flash_attention.hopper_parts import LOG2E, ROWS, START, TRANSFORMS, WARPGROUPS
from pallas_kernels.flash_attention.mask import MASKED, tile_kinds
from pallas_kernels.flash_attention.spec import Extra, Spec

TILE_Q = ROWS * WARPGROUPS
SHARED_MEMORY = 227 * 1024  # bytes a block may have on Hopper
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40  # a thread; 128 * (2 * 232 + 40) of the 65,536 there are


def plan(H: int, V: int, S: int, block: tuple[int, int] | None, tile_k: int | None) -> tuple[int, int] | None:
    """(keys a tile, slots in the ring) for 16-bit inputs; None where nothing legal fits.

    By choice 128 keys where two slots fit, else 64; the accumulators [64, V] and [64, keys] share 232 registers.
    """
    fixed = 2 * TILE_Q * (H + (V if V != H else 0)) + 4 * TILE_Q + 4096  # queries, outputs, lse; barriers, reductions
    for keys in (tile_k,) if tile_k else (128, 64):
        slots = min(4, (SHARED_MEMORY - fixed) // (2 * keys * (H + V)))
        divides = block is None or (block[0] % TILE_Q == 0 and block[1] % keys == 0)
        if slots >= 2 and divides and keys % 64 == 0 and keys + V <= 320 and (tile_k or keys == 64 or S > 64):
            return keys, slots
    return None


def forward(spec: Spec, q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, extra: Extra) -> tuple[Array, Array]:
    """See spec.py."""
    B, T, N, H = q_BTNH.shape
    S, V = k_BSKH.shape[1], v_BSKV.shape[3]
    planned = plan(H, V, S, spec.mask.block_shape, spec.tiles.k)
    assert planned is not None, "hopper.unsupported lets no such call through"
    tile_k, slots = planned
    I, T_padded, S_padded = -(-T // TILE_Q), -(-T // TILE_Q) * TILE_Q, -(-S // tile_k) * tile_k
    order, full, some = parts.schedule(tile_kinds(spec.mask, extra.data, T, S, TILE_Q, tile_k))
    sides = parts.side_arrays(spec, extra, T_padded, S_padded)
    if extra.sinks_N is not None:
        sides["sinks"] = extra.sinks_N
    arrays = {
        "q": parts.pad_sequence(q_BTNH, T_padded),
        "k": parts.pad_sequence(k_BSKH, S_padded),
        "v": parts.pad_sequence(v_BSKV, S_padded),
        "order": order, "full": full, "some": some, **sides,
    }  # fmt: skip
    half = q_BTNH.dtype
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
    body = partial(_kernel, spec, S, extra.data.offset, slots, tuple(arrays), tuple(scratch))
    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, T_padded, N, V), half),
            jax.ShapeDtypeStruct((B, N, T_padded), jnp.float32),
        ),
        grid=(N, I, B),
        grid_names=("head", "tile", "batch"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=tuple(scratch.values()),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=parts.interpreter(spec.interpret),
    )(*arrays.values())
    return out[:, :T], lse[:, :, :T]


def _kernel(spec: Spec, S: int, offset, slots: int, names: tuple[str, ...], scratch_names: tuple[str, ...], *refs):
    """One block: 128 queries of one head of one row."""
    memory = dict(zip(names, refs, strict=False))
    out_BTNV, lse_BNT = refs[len(names) : len(names) + 2]
    shared = dict(zip(scratch_names, refs[len(names) + 2 :], strict=True))
    batch, head, warpgroup = lax.axis_index("batch"), lax.axis_index("head"), lax.axis_index("warpgroup")
    I = memory["order"].shape[2]
    # The last tiles of a causal mask are the longest, so they start first.
    tile = I - 1 - lax.axis_index("tile") if spec.mask.causal else lax.axis_index("tile")
    row = (*parts.pick(memory["full"], batch, head), tile)
    full, some = memory["full"][row], memory["some"][row]
    visit = lambda step: memory["order"][(*row, step)]

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        _compute(spec, S, offset, slots, memory, shared, batch, head, warpgroup, tile, full, some, visit, out_BTNV, lse_BNT)

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        group = memory["q"].shape[2] // memory["k"].shape[2]
        _copy(memory, shared, slots, batch, lax.div(head, jnp.int32(group)), some, visit)


def _copy(memory, shared, slots: int, batch, kv_head, some, visit):
    """Fills the ring, tile after tile."""
    tile_k = shared["k"].shape[1]

    def fill(step, _):
        slot = lax.rem(step, jnp.int32(slots))
        where = (batch, pl.ds(visit(step) * tile_k, tile_k), kv_head)
        for name in ("k", "v"):
            pl.when(step >= slots)(lambda name=name: plgpu.barrier_wait(shared[f"{name}_done"].at[slot]))
            plgpu.copy_gmem_to_smem(memory[name].at[where], shared[name].at[slot], shared[f"{name}_ready"].at[slot])

    lax.fori_loop(0, some, fill, None)

    def drain(step, _):
        # Every phase of a barrier must be seen by who waits on it, the last ones too.
        slot = lax.rem(step, jnp.int32(slots))
        for name in ("k", "v"):
            plgpu.barrier_wait(shared[f"{name}_done"].at[slot])

    lax.fori_loop(jnp.maximum(some - slots, 0), some, drain, None)


def _compute(
    spec, S, offset, slots, memory, shared, batch, head, warpgroup, tile, full, some, visit, out_BTNV, lse_BNT
):  # fmt: skip
    """The online softmax of 64 queries over the tiles of the schedule."""
    interpret = spec.interpret
    tile_k, V, half = shared["k"].shape[1], shared["v"].shape[2], shared["q"].dtype
    shape = (ROWS, tile_k)
    q_first = tile * TILE_Q + warpgroup * ROWS
    queries = (batch, pl.ds(q_first, ROWS), head)
    q_smem = shared["q"].at[warpgroup]
    plain = parts.is_plain(spec, memory)
    factor = spec.scale * LOG2E if plain else 1.0
    q_offset = parts.offset_of(offset, memory, batch)

    plgpu.copy_gmem_to_smem(memory["q"].at[queries], q_smem, shared["q_ready"].at[warpgroup])
    plgpu.barrier_wait(shared["q_ready"].at[warpgroup])

    def turn():
        """Tells the other warpgroup that its turn has come, and waits for one's own."""
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["turn"])

    def step_of(step, carry, partial_: bool):
        acc_QV, top_Q, total_Q = carry
        slot = lax.rem(step, jnp.int32(slots))
        plgpu.barrier_wait(shared["k_ready"].at[slot])
        s_QJ = parts.product(q_smem, shared["k"].at[slot], interpret, meanwhile=turn)
        plgpu.barrier_arrive(shared["k_done"].at[slot])
        if partial_ or spec.dropout or "alibi" in memory:
            k_first = visit(step) * tile_k
            q_index, k_index = (first + parts.iota(shape, axis, interpret) for axis, first in enumerate((q_first, k_first)))
            pair = (q_index + q_offset, k_index)
        else:
            k_first, q_index, k_index, pair = None, None, None, (None, None)
        if not plain:
            s_QJ, _ = parts.logits_base2(spec, memory, s_QJ, pair, head)
        if partial_:
            firsts = (q_first, k_first)
            s_QJ = parts.masked(parts.seen_pairs(spec, S, memory, batch, firsts, pair, shape, 0, interpret), s_QJ)
        new_Q = jnp.maximum(top_Q, s_QJ.max(axis=1) * factor)
        fade_Q = jnp.exp2(top_Q - new_Q)
        p_QJ = jnp.exp2(s_QJ * factor - parts.spread(new_Q, shape, 0))
        acc_QV = acc_QV * parts.spread(fade_Q, (ROWS, V), 0)
        total_Q = total_Q * fade_Q + p_QJ.sum(axis=1)
        if spec.dropout:
            p_QJ = jnp.where(parts.kept_pairs(spec, memory, batch, head, (q_index, k_index)), p_QJ, 0.0)
        p_half = p_QJ.astype(half)
        # Without the barrier the compiler may move this arithmetic behind the other warpgroup's turn.
        acc_QV, total_Q, new_Q, p_half = lax.optimization_barrier((acc_QV, total_Q, new_Q, p_half))
        plgpu.barrier_arrive(shared["turn"])
        plgpu.barrier_wait(shared["v_ready"].at[slot])
        plgpu.barrier_wait(shared["turn"])
        acc_QV = parts.accumulate(acc_QV, p_half, shared["v"].at[slot], interpret)
        plgpu.barrier_arrive(shared["v_done"].at[slot])
        return acc_QV, new_Q, total_Q

    vector = lambda value: parts.placed(jnp.full((ROWS,), value, jnp.float32), 0, interpret)
    sinks = "sinks" in memory
    top = vector(memory["sinks"][head] * LOG2E if sinks else START)
    carry = parts.placed(jnp.zeros((ROWS, V), jnp.float32), None, interpret), top, vector(1.0 if sinks else 0.0)
    pl.when(warpgroup == 1)(turn)
    carry = lax.fori_loop(0, full, partial(step_of, partial_=False), carry)
    acc_QV, top_Q, total_Q = lax.fori_loop(full, some, partial(step_of, partial_=True), carry)
    pl.when(warpgroup == 0)(turn)

    sees_Q = total_Q > 0
    lse_Q = jnp.where(sees_Q, top_Q * math.log(2) + jnp.log(jnp.where(sees_Q, total_Q, 1.0)), MASKED)
    share_Q = 1.0 / ((1.0 - spec.dropout) * jnp.where(sees_Q, total_Q, 1.0))
    out_smem = shared.get("out", shared["q"]).at[warpgroup]
    out_smem[...] = (acc_QV * parts.spread(share_Q, (ROWS, V), 0)).astype(half)
    lse_smem = shared["lse"].at[warpgroup]
    lse_smem[...] = lse_Q
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(out_smem, out_BTNV.at[queries])
    plgpu.copy_smem_to_gmem(lse_smem, lse_BNT.at[batch, head, pl.ds(q_first, ROWS)])
    plgpu.wait_smem_to_gmem(0)
