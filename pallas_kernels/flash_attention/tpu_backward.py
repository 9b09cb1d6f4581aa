"""The TPU's backward kernel: gradients of queries, keys and values in one pass, five matrix multiplications per tile.

The list of tiles is ordered by keys, so dk and dv stay in VMEM until they are complete, summed over the query heads of
a group. A tile of dq is visited once for each tile of keys. It is stored in HBM in float32; each visit fetches it, adds
to it and writes it back while the kernel computes the next tile (two buffers; if two visits in a row have the same tile
of dq, the second takes it from the buffer). So memory stays O(T), whereas a copy of dq for each tile of keys would take
O(T S / tile).

Keys are in the sublanes and queries in the lanes, so log-sum-exp and delta are rows, as in memory.

Shapes: B batch, T queries, S keys (both padded to tiles), N query heads, K key/value heads, G = N / K, H head
dimension, V head dimension of the values; suffixes q, k: a tile or piece of queries or keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_pairs
from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.tpu_forward import (
    LOG2E,
    TRANSPOSED_RHS,
    UNSEEN,
    Job,
    positions,
    visible_in,
    when_kind,
    word_at,
)
from pallas_kernels.flash_attention.tpu_tiles import LANES

TRANSPOSED_LHS = (((0,), (0,)), ((), ()))
VISITS, LAST_VISITED, PENDING = 0, 1, 2  # indices into the kernel's state words; one PENDING word per buffer


def backward_kernel(job: Job, names: tuple[str, ...], count: int, kv_heads: int, *refs) -> None:
    """Run one grid step. Grid (B, K, P, heads of the group that share the list's entries)."""
    words_ref, numbers_ref = refs[:2]
    inputs = dict(zip(names, refs[2:], strict=False))
    dq_hbm, dk_ref, dv_ref, dk_acc, dv_acc, part_ref, buffer_ref, state_ref, read_sem, write_sems = refs[
        2 + len(names) :
    ]
    q_ref, k_ref, v_ref, do_ref = (inputs[name] for name in ("q", "k", "v", "do"))
    lse_ref, delta_ref = inputs["lse"], inputs["delta"]
    spec, cut = job.spec, job.cut
    scale = job.scale_before_max
    assert scale is not None  # only the forward kernel scales after the maximum
    row, kv_head, number, shared = (pl.program_id(axis) for axis in range(4))
    word = word_at(job, words_ref, row, kv_head, number, count, kv_heads)
    n = kv_head * job.group + tpu_pairs.head(word) + shared

    @pl.when((number == 0) & (shared == 0))
    def _():
        state_ref[VISITS] = 0
        state_ref[LAST_VISITED] = -1
        state_ref[PENDING] = 0
        state_ref[PENDING + 1] = 0

    @pl.when((tpu_pairs.flag(word, 0) == 1) & (shared == 0))
    def _():
        dk_acc[...] = jnp.zeros(dk_acc.shape, jnp.float32)
        dv_acc[...] = jnp.zeros(dv_acc.shape, jnp.float32)

    def piece_of_work(piece, masked: bool):
        q0, q1, k0, k1 = piece
        dot = lambda a, b, dims: lax.dot_general(
            a, b, dims, preferred_element_type=jnp.float32, precision=job.precision
        )
        q_qH, do_qV, k_kH = q_ref[q0:q1, :], do_ref[q0:q1, :], k_ref[k0:k1, :]
        s_kq = dot(k_kH, q_qH, TRANSPOSED_RHS) * scale
        if spec.softcap is not None:
            t_kq = jnp.tanh(s_kq)
            s_kq = t_kq * (spec.softcap * LOG2E)
        if masked or "alibi" in inputs or spec.dropout:
            q_index, k_index, offset = positions(job, numbers_ref, row, word, s_kq.shape, q0, k0, 1)
        if "alibi" in inputs:
            s_kq = s_kq - inputs["alibi"][n] * jnp.abs(q_index + offset - k_index).astype(jnp.float32)
        if masked:
            repeats = (q1 - q0) // LANES
            ints = {name: inputs[name][:1, q0:q1] for name in names if name.startswith("q_")}
            ints |= {
                name: jnp.tile(inputs[name][k0:k1, :], (1, repeats))
                for name in names
                if name.startswith("k_") or name == "prefix"
            }
            visible_mask = visible_in(job, q_index, k_index, offset, ints)
            s_kq = s_kq if visible_mask is None else jnp.where(visible_mask, s_kq, UNSEEN)
        p_kq = jnp.exp2(s_kq - lse_ref[:, q0:q1])
        dp_kq = dot(v_ref[k0:k1, :], do_qV, TRANSPOSED_RHS)
        kept_kq = p_kq
        if spec.dropout:
            seed, first_row = numbers_ref[numbers_ref.shape[0] - 2], numbers_ref[numbers_ref.shape[0] - 1]
            keeps = keep(seed, first_row + row, n, q_index, k_index, spec.dropout)
            kept_kq, dp_kq = (jnp.where(keeps, x * (1.0 / (1.0 - spec.dropout)), 0.0) for x in (p_kq, dp_kq))
        dv_acc[k0:k1, :] += dot(kept_kq.astype(do_qV.dtype), do_qV, (((1,), (0,)), ((), ())))
        ds_kq = p_kq * (dp_kq - delta_ref[:, q0:q1])
        if spec.softcap is not None:
            ds_kq = ds_kq * (1.0 - t_kq * t_kq)
        ds_kq = ds_kq.astype(q_qH.dtype)
        dk_acc[k0:k1, :] += dot(ds_kq, q_qH, (((1,), (0,)), ((), ())))
        return dot(ds_kq, k_kH, TRANSPOSED_LHS)

    def tile(pieces, masked: bool):
        written = []
        for piece in pieces:
            part_qH = piece_of_work(piece, masked)
            if piece[:2] in written:
                part_ref[piece[0] : piece[1], :] += part_qH
            else:
                part_ref[piece[0] : piece[1], :] = part_qH
                written.append(piece[:2])
        done = 0
        for q0, q1 in [*sorted(written), (cut.q, cut.q)]:
            if done < q0:  # queries that see none of these keys
                part_ref[done:q0, :] = jnp.zeros((q0 - done, part_ref.shape[1]), jnp.float32)
            done = q1

    i = tpu_pairs.q_tile(word)
    visit = state_ref[VISITS]
    slot = lax.rem(visit, 2)
    fresh = tpu_pairs.flag(word, 2) == 1
    again = jnp.logical_not(fresh) & (state_ref[LAST_VISITED] == n * tpu_pairs.MAX_TILES + i)
    fetch = jnp.logical_not(fresh | again)
    at = dq_hbm.at[row, n, pl.ds(pl.multiple_of(i * cut.q, cut.q), cut.q), :]
    reading = pltpu.make_async_copy(at, buffer_ref.at[slot], read_sem)

    def writing(slot):
        return pltpu.make_async_copy(buffer_ref.at[slot], at, write_sems.at[slot])

    def settle(slot):
        @pl.when(state_ref[PENDING + slot] == 1)
        def _():
            writing(slot).wait()
            state_ref[PENDING + slot] = 0

    @pl.when(tpu_pairs.kind(word) != tpu_pairs.EMPTY)
    def _():
        settle(slot)
        pl.when(fetch)(reading.start)
        when_kind(job, word, numbers_ref[row], tile)

        @pl.when(fresh)
        def _():
            buffer_ref[slot] = part_ref[...]

        @pl.when(fetch)
        def _():
            reading.wait()
            buffer_ref[slot] += part_ref[...]

        @pl.when(again)
        def _():
            settle(1 - slot)  # two writes to the same tile would race
            buffer_ref[slot] = buffer_ref[1 - slot] + part_ref[...]

        writing(slot).start()
        state_ref[PENDING + slot] = 1
        state_ref[VISITS] = visit + 1
        state_ref[LAST_VISITED] = n * tpu_pairs.MAX_TILES + i

    @pl.when((tpu_pairs.flag(word, 1) == 1) & (shared == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_acc[...] * spec.scale).astype(dk_ref.dtype)
        dv_ref[...] = dv_acc[...].astype(dv_ref.dtype)

    @pl.when((number == count - 1) & (shared == pl.num_programs(3) - 1))
    def _():
        settle(0)
        settle(1)


def backward_call(job: Job, words, numbers, arrays: dict[str, jax.Array], B: int, N: int, K: int, interpret):
    """Return dq [B, N, T, H] float32, not yet multiplied by the scale, dk [B, K, S, H] and dv [B, K, S, V].

    `arrays`: q [B, N, T, H], k, v [B, K, S, H or V], do [B, N, T, V]; lse (times log2(e)), delta [B, N, 1, T] float32;
    q_segments, q_positions [B, 8, T]; k_segments, k_positions, prefix [B, S, 128], int32; alibi [N], times log2(e)."""
    cut, (_, C, P) = job.cut, words.shape
    T, H = arrays["q"].shape[2:]
    S, V = arrays["v"].shape[2:]
    dtype = arrays["q"].dtype
    kv_heads = K if C > 1 else 1
    shared = 1 if job.heads_differ else job.group
    entry = lambda b, c, p, words: word_at(job, words, b, c, p, P, kv_heads)

    def q_of(b, c, p, g, words, _):
        word = entry(b, c, p, words)
        return b, c * job.group + tpu_pairs.head(word) + g, tpu_pairs.q_tile(word), 0

    def row_of(b, c, p, g, words, numbers):
        b, n, i, _ = q_of(b, c, p, g, words, numbers)
        return b, n, 0, i

    k_of = lambda b, c, p, g, words, _: (b, c, tpu_pairs.k_tile(entry(b, c, p, words)), 0)
    spec_of = {
        "q": lambda: pl.BlockSpec((None, None, cut.q, H), q_of),
        "do": lambda: pl.BlockSpec((None, None, cut.q, V), q_of),
        "k": lambda: pl.BlockSpec((None, None, cut.k, H), k_of),
        "v": lambda: pl.BlockSpec((None, None, cut.k, V), k_of),
        "lse": lambda: pl.BlockSpec((None, None, 1, cut.q), row_of),
        "delta": lambda: pl.BlockSpec((None, None, 1, cut.q), row_of),
        "alibi": lambda: pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    q_int = lambda b, c, p, g, words, _: (b, 0, tpu_pairs.q_tile(entry(b, c, p, words)))
    k_int = lambda b, c, p, g, words, _: (b, tpu_pairs.k_tile(entry(b, c, p, words)), 0)
    for name in ("q_segments", "q_positions"):
        spec_of[name] = lambda: pl.BlockSpec((None, 8, cut.q), q_int)
    for name in ("k_segments", "k_positions", "prefix"):
        spec_of[name] = lambda: pl.BlockSpec((None, cut.k, LANES), k_int)
    names = tuple(arrays)
    pairs = B * K * P * shared * cut.q * cut.k
    traffic = B * K * P * shared * cut.q * ((H + V) * dtype.itemsize + 8 * H) + 2 * B * K * S * (H + V) * dtype.itemsize
    return pl.pallas_call(
        lambda *refs: backward_kernel(job, names, P, kv_heads, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, K, P, shared),
            in_specs=[spec_of[name]() for name in names],
            out_specs=[
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec((None, None, cut.k, H), k_of),
                pl.BlockSpec((None, None, cut.k, V), k_of),
            ],
            scratch_shapes=[
                pltpu.VMEM((cut.k, H), jnp.float32),
                pltpu.VMEM((cut.k, V), jnp.float32),
                pltpu.VMEM((cut.q, H), jnp.float32),
                pltpu.VMEM((2, cut.q, H), jnp.float32),
                pltpu.SMEM((4,), jnp.int32),
                pltpu.SemaphoreType.DMA,
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, N, T, H), jnp.float32),
            jax.ShapeDtypeStruct((B, K, S, H), dtype),
            jax.ShapeDtypeStruct((B, K, S, V), dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=cut.vmem
        ),
        cost_estimate=pl.CostEstimate(flops=2 * pairs * (3 * H + 2 * V), transcendentals=pairs, bytes_accessed=traffic),
        name="flash_attention_backward",
        interpret=interpret,
    )(words.reshape(-1), numbers, *arrays.values())
