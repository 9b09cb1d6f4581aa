"""Decode attention on TPUs: one pass over the cache by hand-issued copies, two blocks in flight.

The grid is (parts, rows x groups of key heads); the last axis runs in order. Keys and values stay in HBM. A step loops
over the blocks of its row's cached tokens (only those within the window), which it finds from the scalar-prefetched
lengths. While it computes on one block, it fetches the next one, from the same row or from the next row that has any.
Neither copies nor products touch the rest of the cache. A block consists of `pages` chunks: pages of a paged cache, or
128 slots each of a contiguous one. Each chunk is a separate copy [heads, chunk, H]; everything else is the same for
both kinds of cache, so they give the same bits.

Per key head and block: logits [R, block] = q [R, H] k^T, online softmax in float32, out [R, V] += weights v. Scales
multiply the logits and the weights rather than keys and values, which are widened from 8 bits but never rescaled. In a
row's first and last block, values that were not fetched or lie beyond the row are zeroed, because zero times NaN is
NaN.

Layout: the kernel takes arrays with the last dimension innermost, padded to 128. If XLA stores a cache differently, it
copies the whole cache first. If H is a multiple of 128, it never does. For any other H, XLA stores a program's
arguments and results with their slots innermost, which needs no padding, and stores an array that a loop updates as the
kernel wants it, so only entry and exit copy. With `slots_innermost` the kernel takes the former layout without a copy
if S (or the page size) is a multiple of 128. For other H, smaller pages are copied on entry to a program, as are scales
in pages of fewer than 128 slots.

VMEM: 2 buffers of block * heads * (H + V) numbers, with H and V rounded up to 128 lanes, about 4 MiB together, plus
queries, results and one head's logits; `plan` keeps the sum within 13 MiB.

Shapes: as in spec.py; C the parts of the cache length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.decode_attention.spec import (
    MASKED,
    Cache,
    Shaped,
    Spec,
    block_range,
    cdiv,
    compute_dtype,
    div,
    first_slot,
    traffic,
)
from pallas_kernels.target import target

LANES, SUBLANES = 128, 8
BLOCK_BYTES = 2 << 20  # keys and values of one block: 2.5 us of a v5e's bandwidth, far above a copy's latency
MAX_BLOCK = 2048  # slots
VMEM_BUDGET = 13 << 20  # of the 16 MiB that the compiler grants a kernel on v4, v5e and v5p
HEADS_AT_ONCE, LOGITS_AT_ONCE = 8, 1 << 15  # limits of one stage; that many logits fill 32 of the 64 vector registers
MAX_TABLE_BYTES = 512 << 10  # of the 1 MiB of scalar memory
MEGACORES = ("TPU v4", "TPU v5p", "TPU v5")  # a device has two cores, which share a grid's parallel dimension


@dataclass(frozen=True)
class Plan:
    """How a call is divided into blocks."""

    heads: int  # key heads per grid step; a divisor of K
    chunk: int  # slots per copy: the page size, or 128
    pages: int  # chunks per block
    k_transposed: bool  # keys come as [.., H, slots]
    v_transposed: bool

    @property
    def block(self) -> int:
        """Slots per block."""
        return self.chunk * self.pages


def default_splits(q_BTNH: Shaped, cache: Cache) -> int:
    """Return one part for each core of a device."""
    return 2 if target()[1] in MEGACORES else 1


def unsupported(spec: Spec, q_BTNH: Shaped, cache: Cache) -> str | None:
    """Return the reason why the kernel cannot run a call, or None."""
    if cache.k.dtype == jnp.float16:
        return "caches of float16: the TPU compiler has no float16 arithmetic; use bfloat16"
    slots = cache.k.shape[2]
    if slots % SUBLANES:
        what = "slots per row" if cache.page_table_BP is None else "page_size"
        return f"{what} = {slots}: must be a multiple of {SUBLANES}, since a copy cannot split a tile's rows"
    table = 0 if cache.page_table_BP is None else 4 * cache.page_table_BP.size
    if table > MAX_TABLE_BYTES:
        return (
            f"page_table_BP of {table} bytes: at most {MAX_TABLE_BYTES} fit in scalar memory; "
            "use larger pages or fewer rows"
        )
    if plan(spec, q_BTNH, cache) is None:
        return (
            f"q {q_BTNH.shape}, k_cache {cache.k.shape}, v_cache {cache.v.shape}: one block of one group of heads "
            f"needs more than {VMEM_BUDGET >> 20} MiB of VMEM"
        )
    return None


def plan(spec: Spec, q_BTNH: Shaped, cache: Cache) -> Plan | None:
    """Return a plan with the most heads that fit and blocks of about BLOCK_BYTES, or None if nothing fits."""
    K = cache.k.shape[1]
    chunk = LANES if cache.page_table_BP is None else cache.k.shape[2]
    unit = math.lcm(chunk, LANES)
    for heads in sorted((n for n in range(1, K + 1) if K % n == 0), reverse=True):
        if cache.k_scales is not None and heads < K and heads % SUBLANES:
            continue  # heads are the rows of a tile of scales, which copies cannot split
        per_slot = heads * _slot_bytes(spec, cache)
        block = min(BLOCK_BYTES // per_slot, MAX_BLOCK, pl.cdiv(cache.capacity, unit) * unit)
        block = max(block // unit, 1) * unit
        while block > unit and vmem_bytes(spec, heads, block, q_BTNH, cache) > VMEM_BUDGET:
            block -= unit
        if vmem_bytes(spec, heads, block, q_BTNH, cache) <= VMEM_BUDGET:
            return Plan(heads, chunk, block // chunk, _transposed(spec, cache.k), _transposed(spec, cache.v))
    return None


def _slot_bytes(spec: Spec, cache: Cache) -> int:
    """Return the VMEM of one slot of one head, in bytes, with its numbers rounded up to whole tiles."""
    width = lambda x: pl.cdiv(x.shape[-1], 32) * 32 if _transposed(spec, x) else _lanes(x.shape[-1])
    return (width(cache.k) + width(cache.v)) * cache.k.dtype.itemsize


def _transposed(spec: Spec, x: Shaped) -> bool:
    """Return whether a cache has its slots innermost, in whole tiles."""
    return spec.slots_innermost and x.shape[2] % LANES == 0 and x.shape[3] % LANES != 0


def _lanes(n: int) -> int:
    return pl.cdiv(n, LANES) * LANES


def vmem_bytes(spec: Spec, heads: int, block: int, q_BTNH: Shaped, cache: Cache) -> int:
    """Return the VMEM that a call needs, in bytes: buffers, scratch, and an estimate of one head's temporaries."""
    H, V = _lanes(cache.k.shape[-1]), _lanes(cache.v.shape[-1])
    wide = compute_dtype(q_BTNH.dtype, cache.k.dtype).itemsize
    rows = pl.cdiv(spec.T * q_BTNH.shape[2] // cache.k.shape[1], SUBLANES) * SUBLANES
    buffers = 2 * block * heads * _slot_bytes(spec, cache)
    if cache.k_scales is not None:
        chunk = LANES if cache.page_table_BP is None else cache.k.shape[2]
        buffers += 4 * (block // chunk) * pl.cdiv(heads, SUBLANES) * SUBLANES * _lanes(chunk) * 4
    state = heads * rows * (2 * H * wide + V * 4 * 3 + LANES * 4 * 4)
    widened = block * (H + V) * wide if wide != cache.k.dtype.itemsize else 0
    return buffers + state + 3 * rows * block * 4 + widened


@partial(jax.jit, static_argnames=("spec", "out_dtype"))  # jax 0.10 accepts the HBM constraint below only in jit
def forward(spec: Spec, q_BKRH: Array, cache: Cache, lengths_B: Array, alibi_N: Array | None, out_dtype):
    """See spec.py."""
    B, K, R, H = q_BKRH.shape
    V = cache.v.shape[-1]
    q_BTNH = jax.ShapeDtypeStruct((B, spec.T, K * R // spec.T, H), q_BKRH.dtype)
    cut = plan(spec, q_BTNH, cache)
    assert cut is not None
    if q_BKRH.dtype == jnp.float16:
        q_BKRH = q_BKRH.astype(jnp.float32)
        out_dtype = jnp.float32
    q_BKRH = q_BKRH.astype(compute_dtype(q_BKRH.dtype, cache.k.dtype))
    groups = K // cut.heads
    row = lambda c, item, *_: (*_place(item, groups), 0, 0)
    result = lambda c, item, *_: (c, *_place(item, groups), 0, 0)
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    k, v = (
        x.swapaxes(2, 3) if transposed else x
        for x, transposed in ((cache.k, cut.k_transposed), (cache.v, cut.v_transposed))
    )
    in_two = lambda *shape: pltpu.VMEM((2, cut.heads, *shape), cache.k.dtype)

    inputs: dict[str, tuple[Array, pl.BlockSpec | None]] = {"lengths": (lengths_B, None)}
    if cache.page_table_BP is not None:  # flattened, since scalar memory would pad each row to 128
        inputs["table"] = (cache.page_table_BP.reshape(-1), None)
    scalars = len(inputs)
    inputs["q"] = (q_BKRH, pl.BlockSpec((1, cut.heads, R, H), row))
    if alibi_N is not None:
        slopes = jnp.tile(alibi_N.reshape(K, 1, -1), (1, spec.T, 1)).reshape(K, R, 1)
        inputs["alibi"] = (slopes, pl.BlockSpec((cut.heads, R, 1), lambda c, item, *_: (_place(item, groups)[1], 0, 0)))
    if not spec.interpret:  # otherwise XLA fetches a whole cache of a few MiB into VMEM before the kernel runs
        k, v = (pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in (k, v))
    inputs["k"], inputs["v"] = (k, hbm), (v, hbm)
    scratch = {
        "k_buf": in_two(H, cut.block) if cut.k_transposed else in_two(cut.block, H),
        "v_buf": in_two(V, cut.block) if cut.v_transposed else in_two(cut.block, V),
    }
    if cache.k_scales is not None and cache.v_scales is not None:
        for name, scales in (("ks", cache.k_scales), ("vs", cache.v_scales)):
            if cache.page_table_BP is None:  # copies move whole lanes
                scales = jnp.pad(scales, ((0, 0), (0, 0), (0, -scales.shape[2] % LANES)))
            inputs[name] = (scales, hbm)
            scratch[name + "_buf"] = pltpu.VMEM((2, cut.pages, cut.heads, cut.chunk), jnp.float32)
    scratch |= {
        "acc": pltpu.VMEM((cut.heads, R, V), jnp.float32),
        "top": pltpu.VMEM((cut.heads, R, LANES), jnp.float32),
        "total": pltpu.VMEM((cut.heads, R, LANES), jnp.float32),
        "slot": pltpu.SMEM((1,), jnp.int32),
        "arrived": pltpu.SemaphoreType.DMA((2, 4)),
    }
    names = [*inputs, "out", "lse", *scratch]
    flops, exponentials, moved = traffic(spec, q_BTNH, cache)
    outs, lses = pl.pallas_call(
        lambda *refs: _kernel(spec, cut, B * groups, groups, SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_shape=(
            jax.ShapeDtypeStruct((spec.splits, B, K, R, V), out_dtype),
            jax.ShapeDtypeStruct((spec.splits, B, K, R, 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(spec.splits, B * groups),
            in_specs=[where for _, where in list(inputs.values())[scalars:]],
            out_specs=(
                pl.BlockSpec((1, 1, cut.heads, R, V), result),
                pl.BlockSpec((1, 1, cut.heads, R, 1), result),
            ),
            scratch_shapes=list(scratch.values()),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved),
        interpret=spec.interpret,
        name="decode_attention",
    )(*(x for x, _ in inputs.values()))
    return outs, lses[..., 0]


def _place(item, groups: int):
    """Return (row, group of heads) of an item."""
    row = div(item, groups)
    return row, item - row * groups


def _kernel(spec: Spec, cut: Plan, items: int, groups: int, r: SimpleNamespace) -> None:
    part, item = pl.program_id(0), pl.program_id(1)
    length = r.lengths[div(item, groups)]
    first, end = block_range(spec, length, cut.block, part)
    r.acc[...] = jnp.zeros_like(r.acc)
    r.top[...] = jnp.full_like(r.top, MASKED)
    r.total[...] = jnp.zeros_like(r.total)

    def blocks_of(n):
        return block_range(spec, r.lengths[div(jnp.minimum(n, items - 1), groups)], cut.block, part)

    def next_with_blocks(n):
        def empty(n):
            first, end = blocks_of(n)
            return (n < items) & (first >= end)

        return jax.lax.while_loop(empty, lambda n: n + 1, n)

    @pl.when(item == 0)
    def _():
        r.slot[0] = 0
        n = next_with_blocks(0)

        @pl.when(n < items)
        def _():
            _copies(spec, cut, groups, r, n, blocks_of(n)[0], 0, lambda copy: copy.start())

    def work(i, _):
        slot = r.slot[0]
        last = i + 1 == end
        n = next_with_blocks(item + last.astype(jnp.int32))
        after = jnp.where(last, blocks_of(n)[0], i + 1)

        @pl.when(n < items)
        def _():
            _copies(spec, cut, groups, r, n, after, 1 - slot, lambda copy: copy.start())

        _copies(spec, cut, groups, r, item, i, slot, lambda copy: copy.wait())
        _block(spec, cut, r, length, i, slot)
        r.slot[0] = 1 - slot

    jax.lax.fori_loop(first, end, work, None)
    for h in range(cut.heads):
        top, total = r.top[h, :, :1], r.total[h, :, :1]
        has_keys = top > MASKED / 2
        total = jnp.where(has_keys, total, 1.0)
        r.out[0, 0, h] = jnp.where(has_keys, r.acc[h] / total, 0.0).astype(r.out.dtype)
        r.lse[0, 0, h] = jnp.where(has_keys, top + jnp.log(total), MASKED)


def _copies(spec: Spec, cut: Plan, groups: int, r: SimpleNamespace, item, i, slot, act) -> None:
    """Call `act` on each copy of block i of an item. Only chunks with slots that the row sees are copied."""
    b, group = _place(item, groups)
    length = r.lengths[b]
    paged = hasattr(r, "table")
    heads = pl.ds(0, cut.heads) if groups == 1 else pl.ds(group * cut.heads, cut.heads)
    capacity = r.k.shape[3 if cut.k_transposed else 2]
    tail = 0 if paged else capacity % cut.chunk
    arrays = [(r.k, r.k_buf, cut.k_transposed), (r.v, r.v_buf, cut.v_transposed)]
    scales = [(r.ks, r.ks_buf), (r.vs, r.vs_buf)] if hasattr(r, "ks") else []
    width = r.table.shape[0] // r.lengths.shape[0] if paged else 0
    start_of = lambda n: pl.multiple_of(n * cut.chunk, cut.chunk)

    def chunk(page, _):
        place = page - i * cut.pages

        def move(size):
            for n, (source, buf, transposed) in enumerate(arrays):
                part = lambda at: (slice(None), pl.ds(at, size)) if transposed else (pl.ds(at, size),)  # noqa: B023
                from_ = (
                    source.at[r.table[b * width + page], heads] if paged else source.at[b, heads, *part(start_of(page))]
                )
                to = buf.at[slot, :, *part(start_of(place))]
                act(pltpu.make_async_copy(from_, to, r.arrived.at[slot, n]))

        if tail:
            is_full = page < capacity // cut.chunk
            pl.when(is_full)(partial(move, cut.chunk))
            pl.when(jnp.logical_not(is_full))(partial(move, tail))
        else:
            move(cut.chunk)
        for n, (source, buf) in enumerate(scales):
            lanes = pl.ds(start_of(page), cut.chunk)
            from_ = source.at[r.table[b * width + page], heads] if paged else source.at[b, heads, lanes]
            act(pltpu.make_async_copy(from_, buf.at[slot, place], r.arrived.at[slot, 2 + n]))

    start = jnp.maximum(div(first_slot(spec, length), cut.chunk), i * cut.pages)
    jax.lax.fori_loop(start, jnp.minimum(cdiv(length, cut.chunk), (i + 1) * cut.pages), chunk, None)


def _block(spec: Spec, cut: Plan, r: SimpleNamespace, length, i, slot) -> None:
    """Add block i, which is in buffer `slot`, to the state of every head."""
    R, G = r.q.shape[2], r.q.shape[2] // spec.T
    dtype = r.q.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    start, low = i * cut.block, first_slot(spec, length)

    @pl.when((start < low) | (start + cut.block > length))
    def _():
        for h in range(cut.heads):
            slots = start + jax.lax.broadcasted_iota(jnp.int32, r.v_buf.shape[2:], 1 if cut.v_transposed else 0)
            v = r.v_buf[slot, h]
            r.v_buf[slot, h] = jnp.where((slots >= low) & (slots < length), v, jnp.zeros_like(v))

    slots_1S = start + jax.lax.broadcasted_iota(jnp.int32, (1, cut.block), 1)
    q_slots_R1 = length - spec.T
    if spec.T > 1:
        rows_R1 = jax.lax.broadcasted_iota(jnp.int32, (R, 1), 0)
        q_slots_R1 += sum((rows_R1 >= t * G).astype(jnp.int32) for t in range(1, spec.T))
    distance_RS = q_slots_R1 - slots_1S
    visible_RS = distance_RS >= 0
    if spec.window is not None:
        visible_RS &= distance_RS < spec.window
    if hasattr(r, "ks"):
        needed_1S = (slots_1S >= low) & (slots_1S < length)
        row = lambda buf: jnp.concatenate([buf[slot, p] for p in range(cut.pages)], axis=-1)
        ks_KS, vs_KS = row(r.ks_buf), jnp.where(needed_1S, row(r.vs_buf), 0.0)

    def heads_at(hs) -> None:
        """Run each stage for all of these heads before the next stage, so that one head's latency hides another's."""
        many_RS = [
            jax.lax.dot_general(
                r.q[0, h], r.k_buf[slot, h].astype(dtype), (((1,), (0 if cut.k_transposed else 1,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            ) * spec.scale
            for h in hs
        ]  # fmt: skip
        state = []
        for n, h in enumerate(hs):
            logits_RS = many_RS[n]
            if hasattr(r, "ks"):
                logits_RS = logits_RS * ks_KS[h : h + 1]
            if spec.softcap is not None:
                logits_RS = spec.softcap * jnp.tanh(logits_RS / spec.softcap)
            if hasattr(r, "alibi"):
                logits_RS = logits_RS - r.alibi[h] * distance_RS.astype(jnp.float32)
            logits_RS = jnp.where(visible_RS, logits_RS, MASKED)
            before_R1 = r.top[h, :, :1]
            top_R1 = jnp.maximum(before_R1, logits_RS.max(1, keepdims=True))
            # Until a query sees its first key, masked slots have weight 1; that key scales them by exp(-1e30) = 0.
            weights_RS = jnp.exp(logits_RS - top_R1)
            keep_R1 = jnp.exp(before_R1 - top_R1)
            state.append((top_R1, r.total[h, :, :1] * keep_R1 + weights_RS.sum(1, keepdims=True), keep_R1))
            if hasattr(r, "vs"):
                weights_RS = weights_RS * vs_KS[h : h + 1]
            many_RS[n] = weights_RS.astype(dtype)
        outs_RV = [
            jax.lax.dot_general(
                weights_RS, r.v_buf[slot, h].astype(dtype), (((1,), (1 if cut.v_transposed else 0,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )
            for weights_RS, h in zip(many_RS, hs, strict=True)
        ]  # fmt: skip
        for h, out_RV, (top_R1, total_R1, keep_R1) in zip(hs, outs_RV, state, strict=True):
            r.acc[h] = r.acc[h] * keep_R1 + out_RV
            r.top[h] = jnp.broadcast_to(top_R1, (R, LANES))
            r.total[h] = jnp.broadcast_to(total_R1, (R, LANES))

    at_once = max(1, min(HEADS_AT_ONCE, LOGITS_AT_ONCE // (pl.cdiv(R, SUBLANES) * SUBLANES * cut.block)))
    for h in range(0, cut.heads, at_once):
        heads_at(range(h, min(h + at_once, cut.heads)))
