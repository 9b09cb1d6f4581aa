"""Decode attention on GPUs, in Triton (flash-decoding).

The grid is (rows, key heads x tiles of query rows, parts of the cache length). A program holds up to 64 query rows of
one key head, loops over the blocks of its part of the row's cached tokens (only those within the window), and writes an
output and a log-sum-exp, which `merge` combines outside the kernel. With few rows and heads most of the device would be
idle, so `default_splits` makes about two programs per multiprocessor. Without atomics, the same call always returns the
same bits.

Every load is by pointer, so a paged cache differs from a contiguous one only in how a slot becomes an address. Masked
loads never touch slots that the row does not see, nor their page table entries. Triton's tensors have power-of-two
sizes, so a head dimension of 80 or 96 is computed as 128, and 192 as 256, but only the real numbers are read.

Shapes: as in spec.py.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels.decode_attention.spec import (
    MASKED,
    Cache,
    Shaped,
    Spec,
    block_range,
    compute_dtype,
    div,
    first_slot,
    traffic,
)
from pallas_kernels.target import target

MIN_ROWS, MAX_ROWS = 16, 64  # a matrix product takes at least 16 rows
MAX_WIDTH = 256
PROGRAMS_PER_CORE = 2
MIN_BLOCKS = 4  # per part, if the row fills its cache; fewer do not repay the merge
CORES = {"H100": 132, "H200": 132, "A100": 108, "B200": 148, "L4": 58, "V100": 80}


def cores_of(device_kind: str) -> int:
    """Return the number of streaming multiprocessors, or an H100's number for an unknown device."""
    return next((n for name, n in CORES.items() if name in device_kind), 132)


def block_slots(cache: Cache) -> int:
    """Return the slots per block: up to 32 KiB of 16-bit keys and values, so that two blocks in flight fit in shared
    memory."""
    width = _power(cache.k.shape[-1]) + _power(cache.v.shape[-1])
    return 128 if width <= 128 else 64 if width <= 256 and cache.k.dtype.itemsize <= 2 else 32


def default_splits(q_BTNH: Shaped, cache: Cache) -> int:
    """Return the number of parts that gives each multiprocessor PROGRAMS_PER_CORE programs, or fewer if the cache is
    too short."""
    B, T, N, _ = q_BTNH.shape
    K = cache.k.shape[1]
    programs = B * K * pl.cdiv(T * (N // K), MAX_ROWS)
    most = max(cache.capacity // (MIN_BLOCKS * block_slots(cache)), 1)
    return min(max(pl.cdiv(PROGRAMS_PER_CORE * cores_of(target()[1]), programs), 1), most)


def unsupported(spec: Spec, q_BTNH: Shaped, cache: Cache) -> str | None:
    """Return the reason why the kernel cannot run a call, or None."""
    H, V = cache.k.shape[-1], cache.v.shape[-1]
    if max(H, V) > MAX_WIDTH:
        return f"head dimensions of {H} and {V}: at most {MAX_WIDTH} fit in a program's registers"
    for name, x in (("k_cache", cache.k), ("v_cache", cache.v)):
        # Pallas indexes arrays of up to 2**32 bytes with signed 32 bits, whatever the size of an element.
        if 2**31 < x.size and x.size * x.dtype.itemsize <= 2**32:
            return (
                f"{name} of {x.size} 8-bit elements: between 2**31 and 2**32 elements their indices overflow; use "
                "fewer slots"
            )
    return None


def forward(spec: Spec, q_BKRH: Array, cache: Cache, lengths_B: Array, alibi_N: Array | None, out_dtype):
    """See spec.py."""
    B, K, R, H = q_BKRH.shape
    V = cache.v.shape[-1]
    q_BTNH = jax.ShapeDtypeStruct((B, spec.T, K * R // spec.T, H), q_BKRH.dtype)
    rows = min(max(_power(R), MIN_ROWS), MAX_ROWS)
    tiles = pl.cdiv(R, rows)
    block = block_slots(cache)
    inputs = {"lengths": lengths_B, "q": q_BKRH, "k": cache.k, "v": cache.v}
    if cache.page_table_BP is not None:
        inputs["table"] = cache.page_table_BP
    if cache.k_scales is not None and cache.v_scales is not None:
        inputs["ks"], inputs["vs"] = cache.k_scales, cache.v_scales
    if alibi_N is not None:
        inputs["alibi"] = jnp.tile(alibi_N.reshape(K, 1, -1), (1, spec.T, 1)).reshape(K, R)
    names = [*inputs, "out", "lse"]
    flops, exponentials, moved = traffic(spec, q_BTNH, cache)
    anywhere = pl.no_block_spec
    return pl.pallas_call(
        lambda *refs: _kernel(spec, rows, tiles, block, SimpleNamespace(**dict(zip(names, refs, strict=True)))),
        out_shape=(
            jax.ShapeDtypeStruct((spec.splits, B, K, R, V), out_dtype),
            jax.ShapeDtypeStruct((spec.splits, B, K, R), jnp.float32),
        ),
        grid=(B, K * tiles, spec.splits),
        in_specs=[anywhere] * len(inputs),
        out_specs=(anywhere, anywhere),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2 if cache.k.dtype.itemsize == 4 else 3),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=exponentials, bytes_accessed=moved),
        interpret=spec.interpret,
        name="decode_attention",
    )(*inputs.values())


def _power(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _kernel(spec: Spec, rows: int, tiles: int, block: int, r: SimpleNamespace) -> None:
    b, head_tile, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    _, _, R, H = r.q.shape
    V, G = r.v.shape[-1], R // spec.T
    head = div(head_tile, tiles)
    length = plgpu.load(r.lengths.at[b])
    low = first_slot(spec, length)
    dtype = compute_dtype(r.q.dtype, r.k.dtype)
    dot = partial(
        jax.lax.dot_general,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    rows_R = (head_tile - head * tiles) * rows + jnp.arange(rows, dtype=jnp.int32)
    q_slots_R = length - spec.T + div(rows_R, G)
    h_H, h_V = jnp.arange(_power(H), dtype=jnp.int32), jnp.arange(_power(V), dtype=jnp.int32)
    real_R, real_H, real_V = rows_R < R, h_H < H, h_V < V
    q_RH = plgpu.load(
        r.q.at[b, head, rows_R[:, None], h_H[None, :]], mask=real_R[:, None] & real_H[None, :], other=0.0
    ).astype(dtype)
    if hasattr(r, "alibi"):
        alibi_R = plgpu.load(r.alibi.at[head, rows_R], mask=real_R, other=0.0)

    def numbers(ref, places_S, needed_S, h, real):
        """Load [block, width] of a cache; zeros in slots that the row does not see."""
        at = ref.at[places_S[0][:, None], head, places_S[1][:, None], h[None, :]]
        return plgpu.load(at, mask=needed_S[:, None] & real[None, :], other=jnp.zeros((), ref.dtype)).astype(dtype)

    def fold(i, state):
        out_RV, top_R, total_R = state
        slots_S = i * block + jnp.arange(block, dtype=jnp.int32)
        needed_S = (slots_S >= low) & (slots_S < length)
        places_S = (jnp.full_like(slots_S, b), slots_S)
        if hasattr(r, "table"):
            pages_S = div(slots_S, r.k.shape[2])
            pages_S, within_S = (
                plgpu.load(r.table.at[b, pages_S], mask=needed_S, other=0),
                slots_S - pages_S * r.k.shape[2],
            )
            places_S = (pages_S, within_S)
        scale_of = lambda ref: plgpu.load(ref.at[places_S[0], head, places_S[1]], mask=needed_S, other=0.0)[None, :]
        k_SH = numbers(r.k, places_S, needed_S, h_H, real_H)
        logits_RS = dot(q_RH, k_SH, (((1,), (1,)), ((), ()))) * spec.scale
        if hasattr(r, "ks"):
            logits_RS = logits_RS * scale_of(r.ks)
        if spec.softcap is not None:
            logits_RS = spec.softcap * jnp.tanh(logits_RS / spec.softcap)
        distance_RS = q_slots_R[:, None] - slots_S[None, :]
        if hasattr(r, "alibi"):
            logits_RS = logits_RS - alibi_R[:, None] * distance_RS.astype(jnp.float32)
        visible_RS = distance_RS >= 0
        if spec.window is not None:
            visible_RS &= distance_RS < spec.window
        logits_RS = jnp.where(visible_RS, logits_RS, MASKED)
        new_top_R = jnp.maximum(top_R, logits_RS.max(1))
        # Until a query sees its first key, masked slots have weight 1; that key then scales them by exp(-1e30) = 0.
        weights_RS = jnp.exp(logits_RS - new_top_R[:, None])
        keep_R = jnp.exp(top_R - new_top_R)
        total_R = total_R * keep_R + weights_RS.sum(1)
        if hasattr(r, "vs"):
            weights_RS = weights_RS * scale_of(r.vs)
        v_SV = numbers(r.v, places_S, needed_S, h_V, real_V)
        out_RV = out_RV * keep_R[:, None] + dot(weights_RS.astype(dtype), v_SV, (((1,), (0,)), ((), ())))
        return out_RV, new_top_R, total_R

    first, end = block_range(spec, length, block, part)
    state = (
        jnp.zeros((rows, _power(V)), jnp.float32),
        jnp.full((rows,), MASKED, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
    )
    out_RV, top_R, total_R = jax.lax.fori_loop(first, end, fold, state)
    has_keys_R = top_R > MASKED / 2
    total_R = jnp.where(has_keys_R, total_R, 1.0)
    out_RV = jnp.where(has_keys_R[:, None], out_RV / total_R[:, None], 0.0).astype(r.out.dtype)
    at = r.out.at[part, b, head, rows_R[:, None], h_V[None, :]]
    plgpu.store(at, out_RV, mask=real_R[:, None] & real_V[None, :])
    lse_R = jnp.where(has_keys_R, top_R + jnp.log(total_R), MASKED)
    plgpu.store(r.lse.at[part, b, head, rows_R], lse_R, mask=real_R)
