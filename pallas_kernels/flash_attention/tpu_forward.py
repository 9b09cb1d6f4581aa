"""The TPU's forward kernel: one pass over the list of tiles from `tpu_pairs`, with an online softmax (Milakov and
Gimelshein 2018; Dao et al. 2022) in base 2.

It differs from the textbook in two ways. If the values leave columns of the matrix unit unused, columns of ones fill
them, so that p @ [v | 1] gives the row sums for free, already broadcast over the lanes. And a tile is divided into
pieces, and each piece's first matrix multiplication is issued before the softmax of the previous piece, so that the
compiler can overlap the two.

Shapes: B batch, T queries, S keys (both padded to tiles), N query heads, K key/value heads, G = N / K, H head
dimension, V head dimension of the values, W >= V columns of the accumulator; suffixes q, k: a tile or piece of queries
or keys, L: lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash_attention import tpu_pairs
from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.mask import FULL, MASKED, PARTIAL, visible
from pallas_kernels.flash_attention.spec import Spec
from pallas_kernels.flash_attention.tpu_tiles import LANES, Cut, round_up

LOG2E = float(np.log2(np.e))
UNSEEN = 2 * MASKED  # below the first running maximum, so that exp2(UNSEEN - it) is 0
TRANSPOSED_RHS = (((1,), (1,)), ((), ()))


@dataclass(frozen=True)
class Job:
    """The static arguments of a kernel."""

    spec: Spec
    cut: Cut
    S: int  # keys without padding; the rest of the last tile is padding
    V: int
    group: int  # G
    rows_differ: bool  # the list has separate entries for each row of the batch
    heads_differ: bool  # the list has separate entries for each head
    partial: bool  # this and the next three: see `tpu_pairs.Pairs`
    full: bool
    shifts: tuple[int, ...]
    only_shifts: bool
    # Exactly one of these is set: the scale times log2(e), or over the soft cap. It multiplies q k^T immediately or, if
    # it is positive and there is no soft cap, after the running maximum has been subtracted. The latter stores the
    # matrix unit's results once, not twice.
    scale_before_max: float | None
    scale_after_max: float | None
    ones: int  # columns of ones that the kernel appends to v, without those already in v
    sums: bool  # whether the accumulator's columns from V on hold the row sums
    precision: lax.Precision | None

    def padded(self) -> bool:
        """Return whether the last tile of keys contains padding."""
        return self.S % self.cut.k != 0


def positions(job: Job, numbers_ref, row, word, shape: tuple[int, ...], q_from: int, k_from: int, q_axis: int):
    """Return the indices of a piece's queries and keys, each broadcast to `shape`, and the slot of the call's first
    query."""
    q_index = tpu_pairs.q_tile(word) * job.cut.q + q_from + lax.broadcasted_iota(jnp.int32, shape, q_axis)
    k_index = tpu_pairs.k_tile(word) * job.cut.k + k_from + lax.broadcasted_iota(jnp.int32, shape, 1 - q_axis)
    return q_index, k_index, numbers_ref[row]


def visible_in(job: Job, q_index, k_index, offset, ints: dict) -> jax.Array | None:
    """Return the mask of a piece's visible pairs, or None if all are visible."""
    prefix = ints.get("prefix")
    visible_mask = visible(
        job.spec.mask, q_index + offset, k_index, ints.get("q_segments"), ints.get("k_segments"),
        ints.get("q_positions"), ints.get("k_positions"), None if prefix is None else prefix != 0,
    )  # fmt: skip
    if job.padded():
        there = k_index < job.S
        visible_mask = there if visible_mask is None else visible_mask & there
    return visible_mask


def when_kind(job: Job, word, offset, do) -> None:
    """Call do(pieces, masked) under the condition for each kind of entry; at most one condition holds."""
    cut, kind = job.cut, tpu_pairs.kind(word)
    steps = lambda shift: tpu_pairs.steps(job.spec.mask, shift, cut.q, cut.k, cut.sub_q, cut.sub_k, cut.edge)
    if job.full:
        pl.when(kind == FULL)(lambda: do(steps(None), False))
    if job.partial:
        shift = offset + tpu_pairs.q_tile(word) * cut.q - tpu_pairs.k_tile(word) * cut.k
        other = kind == PARTIAL
        for known in job.shifts:

            @pl.when((kind == PARTIAL) & (shift == known))
            def _(known=known):
                do(steps(known), True)

            other = other & (shift != known)
        if not job.only_shifts:
            pl.when(other)(lambda: do(steps(None), True))


def word_at(job: Job, words_ref, row, head, number, count: int, heads: int):
    """Return an entry of the list. `heads`: the number of heads in the list if heads differ."""
    place = number + count * (
        (head if job.heads_differ else 0) + (row * (heads if job.heads_differ else 1) if job.rows_differ else 0)
    )
    return words_ref[place]


def forward_kernel(job: Job, names: tuple[str, ...], count: int, heads: int, *refs) -> None:
    """Run one grid step. Grid (B, N, P). `names`: the inputs after the two scalar-prefetch arrays."""
    words_ref, numbers_ref = refs[:2]
    inputs = dict(zip(names, refs[2:], strict=False))
    out_ref, lse_ref, max_ref, sum_ref, acc_ref = refs[2 + len(names) :]
    q_ref, k_ref, v_ref = inputs["q"], inputs["k"], inputs["v"]
    spec, cut, V = job.spec, job.cut, job.V
    row, n, number = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    word = word_at(job, words_ref, row, n, number, count, heads)
    W = acc_ref.shape[1]

    @pl.when(tpu_pairs.flag(word, 0) == 1)
    def _():
        # A sink acts as a key with value zero that precedes all others.
        sink = inputs["sinks"][n] if "sinks" in inputs else None
        top = MASKED if sink is None else sink if job.scale_after_max is None else sink * (1.0 / job.scale_after_max)
        max_ref[...] = jnp.full(max_ref.shape, top, jnp.float32)
        sum_ref[...] = jnp.full(sum_ref.shape, 0.0 if sink is None else 1.0, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)
        if sink is not None and job.sums:
            column = lax.broadcasted_iota(jnp.int32, acc_ref.shape, 1)
            acc_ref[...] = (column >= V).astype(jnp.float32)

    def logits(piece):
        q0, q1, k0, k1 = piece
        k_kH = k_ref[k0:k1, :]
        s_qk = lax.dot_general(
            q_ref[q0:q1, :], k_kH, TRANSPOSED_RHS, preferred_element_type=jnp.float32, precision=job.precision
        )
        return s_qk if job.scale_before_max is None else s_qk * job.scale_before_max

    def weights(s_qk, piece, masked: bool):
        """Return exp2(logits - running maximum) and the factor that rescales the earlier sums."""
        q0, q1, k0, k1 = piece
        repeats = (k1 - k0) // LANES
        if spec.softcap is not None:
            s_qk = jnp.tanh(s_qk) * (spec.softcap * LOG2E)
        if masked or "alibi" in inputs or spec.dropout:
            q_index, k_index, offset = positions(job, numbers_ref, row, word, s_qk.shape, q0, k0, 0)
        if "alibi" in inputs:
            slope = inputs["alibi"][n] * (1.0 if job.scale_after_max is None else 1.0 / job.scale_after_max)
            s_qk = s_qk - slope * jnp.abs(q_index + offset - k_index).astype(jnp.float32)
        if masked:
            ints = {name: jnp.tile(inputs[name][q0:q1, :], (1, repeats)) for name in names if name.startswith("q_")}
            ints |= {name: inputs[name][:1, k0:k1] for name in names if name.startswith("k_") or name == "prefix"}
            visible_mask = visible_in(job, q_index, k_index, offset, ints)
            s_qk = s_qk if visible_mask is None else jnp.where(visible_mask, s_qk, UNSEEN)
        before_qL = max_ref[q0:q1, :]
        now_qL = jnp.maximum(before_qL, s_qk.max(-1)[:, None])
        max_ref[q0:q1, :] = now_qL
        power = lambda x: jnp.exp2(x if job.scale_after_max is None else x * job.scale_after_max)
        shrink_qL = power(before_qL - now_qL)
        p_qk = power(s_qk - jnp.tile(now_qL, (1, repeats)))
        if not job.sums:
            sum_ref[q0:q1, :] = sum_ref[q0:q1, :] * shrink_qL + p_qk.sum(-1)[:, None]
        if spec.dropout:
            seed = numbers_ref[numbers_ref.shape[0] - 2]
            first_row = numbers_ref[numbers_ref.shape[0] - 1]
            p_qk = jnp.where(keep(seed, first_row + row, n, q_index, k_index, spec.dropout), p_qk, 0.0)
        return p_qk.astype(v_ref.dtype), shrink_qL

    def add(p_qk, shrink_qL, piece):
        q0, q1, k0, k1 = piece
        v_kW = v_ref[k0:k1, :]
        if job.ones:
            v_kW = jnp.concatenate([v_kW, jnp.ones((k1 - k0, job.ones), v_kW.dtype)], 1)
        pv_qW = jnp.dot(p_qk, v_kW, preferred_element_type=jnp.float32, precision=job.precision)
        acc_ref[q0:q1, :] = acc_ref[q0:q1, :] * jnp.tile(shrink_qL, (1, W // LANES)) + pv_qW

    def tile(pieces, masked: bool):
        s, waiting = None, None
        for number, piece in enumerate(pieces):
            s = logits(piece) if s is None else s
            ahead = logits(pieces[number + 1]) if (cut.ahead or masked) and number + 1 < len(pieces) else None
            if waiting is not None:
                add(*waiting)
            waiting = (*weights(s, piece, masked), piece)
            s = ahead
            if not (cut.ahead or masked):
                add(*waiting)
                waiting = None
        if waiting is not None:
            add(*waiting)

    when_kind(job, word, numbers_ref[row], tile)

    @pl.when(tpu_pairs.flag(word, 1) == 1)
    def _():
        total_qL = jnp.broadcast_to(acc_ref[:, V : V + 1], max_ref.shape) if job.sums else sum_ref[...]
        has_keys = max_ref[...] > MASKED / 2
        total_qL = jnp.where(has_keys, total_qL, 1.0)
        scale = jnp.tile(1.0 / total_qL, (1, round_up(V) // LANES))[:, :V]
        if spec.dropout:
            scale = scale * (1.0 / (1.0 - spec.dropout))
        out_ref[...] = (acc_ref[:, :V] * scale).astype(out_ref.dtype)
        top_qL = max_ref[...] if job.scale_after_max is None else max_ref[...] * job.scale_after_max
        lse_qL = jnp.where(has_keys, (top_qL + jnp.log2(total_qL)) * (1.0 / LOG2E), MASKED)
        lse_ref[...] = lse_qL.T[:1, :]


def forward_call(job: Job, words, numbers, arrays: dict[str, jax.Array], B: int, N: int, K: int, interpret):
    """Return out [B, N, T, V] and lse [B, N, 1, T], both padded to tiles.

    `arrays`: q [B, N, T, H], k, v [B, K, S, H or V]; q_segments, q_positions [B, T, 128]; k_segments, k_positions,
    prefix [B, 8, S], int32; alibi, sinks [N], times log2(e)."""
    cut, (_, C, P) = job.cut, words.shape
    T, dtype = arrays["q"].shape[2], arrays["q"].dtype
    heads = N if C > 1 else 1
    entry = lambda b, n, p, words: word_at(job, words, b, n, p, P, heads)
    q_of = lambda b, n, p, words, _: (b, n, tpu_pairs.q_tile(entry(b, n, p, words)), 0)
    k_of = lambda b, n, p, words, _: (b, lax.div(n, job.group), tpu_pairs.k_tile(entry(b, n, p, words)), 0)
    spec_of = {
        "q": lambda x: pl.BlockSpec((None, None, cut.q, x.shape[3]), q_of),
        "k": lambda x: pl.BlockSpec((None, None, cut.k, x.shape[3]), k_of),
        "v": lambda x: pl.BlockSpec((None, None, cut.k, x.shape[3]), k_of),
        "alibi": lambda x: pl.BlockSpec(memory_space=pltpu.SMEM),
        "sinks": lambda x: pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    q_int = lambda b, n, p, words, _: (b, tpu_pairs.q_tile(entry(b, n, p, words)), 0)
    k_int = lambda b, n, p, words, _: (b, 0, tpu_pairs.k_tile(entry(b, n, p, words)))
    for name in ("q_segments", "q_positions"):
        spec_of[name] = lambda x: pl.BlockSpec((None, cut.q, LANES), q_int)
    for name in ("k_segments", "k_positions", "prefix"):
        spec_of[name] = lambda x: pl.BlockSpec((None, 8, cut.k), k_int)
    W = arrays["v"].shape[3] + job.ones
    names = tuple(arrays)
    pairs = B * N * P * cut.q * cut.k
    H, V = arrays["q"].shape[3], arrays["v"].shape[3]
    return pl.pallas_call(
        lambda *refs: forward_kernel(job, names, P, heads, *refs),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, N, P),
            in_specs=[spec_of[name](x) for name, x in arrays.items()],
            out_specs=[
                pl.BlockSpec((None, None, cut.q, job.V), q_of),
                pl.BlockSpec(
                    (None, None, 1, cut.q), lambda b, n, p, words, _: (b, n, 0, tpu_pairs.q_tile(entry(b, n, p, words)))
                ),
            ],
            scratch_shapes=[
                pltpu.VMEM((cut.q, LANES), jnp.float32),
                pltpu.VMEM((8, LANES) if job.sums else (cut.q, LANES), jnp.float32),
                pltpu.VMEM((cut.q, W), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((B, N, T, job.V), dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=cut.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * pairs * (arrays["k"].shape[3] + job.V),
            transcendentals=pairs,
            bytes_accessed=B * N * P * cut.k * (H + V) * dtype.itemsize + 2 * B * N * T * (H + job.V) * dtype.itemsize,
        ),
        name="flash_attention_forward",
        interpret=interpret,
    )(words.reshape(-1), numbers, *arrays.values())
