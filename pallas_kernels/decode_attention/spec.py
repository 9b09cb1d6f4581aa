"""The arguments that all implementations take, and the part of a cache that a row's queries need.

Every implementation provides `unsupported(spec, q_BTNH, cache) -> str | None`, the reason why it cannot run a call, and

    forward(spec, q_BKRH, cache, lengths_B, alibi_N, out_dtype) -> (outs_CBKRV in out_dtype, lses_CBKR float32)

The caller merges the C = spec.splits parts of the cache length. Of the R = T * G query rows, row t * G + g is query t
of the g-th head that shares a key head.

Shapes: B rows, T queries per row, N query heads, K key/value heads, G = N / K, R = T * G, H head dimension, V head
dimension of the values, S slots per row, P pages per row, C parts of the cache length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

MASKED = -1e30  # finite, so that a query that sees no key gives zeros, never NaN
Shaped = Array | jax.ShapeDtypeStruct  # where only shape and dtype matter
EIGHT_BITS = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Spec:
    """The choices that are compiled in."""

    T: int  # queries per row: its last T tokens
    scale: float
    window: int | None  # slots that a query sees, its own included; None: all
    softcap: float | None
    splits: int  # parts of a row's used length
    interpret: Any  # a bool, or the parameters of an interpreter
    slots_innermost: bool = False  # the caches' layout on a TPU if H or V is not a multiple of 128
    finite: bool = False  # slots that no query sees hold finite numbers, so the reference need not clear them


class Cache(NamedTuple):
    """Keys and values, contiguous [B, K, S, H] or, with a page table, in pages [pages, K, page_size, H]."""

    k: Array
    v: Array
    k_scales: Array | None = None  # float32, the shape of k without its last dimension
    v_scales: Array | None = None
    page_table_BP: Int[Array, "B P"] | None = None

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self.k.shape[2] * (1 if self.page_table_BP is None else self.page_table_BP.shape[1])


def div(n, by: int):
    """Return n // by for n >= 0. Unlike `//`, it adds no code for negative numbers to a kernel."""
    return n if by == 1 else jax.lax.div(n, jnp.full_like(n, by))


def cdiv(n, by: int):
    """Return n / by rounded up, for n >= 0."""
    return div(n + (by - 1), by)


def first_slot(spec: Spec, length):
    """Return the first slot that any query of a row of `length` tokens sees."""
    if spec.window is None:
        return length * 0
    return jnp.maximum(length - (spec.T - 1) - spec.window, 0)


def block_range(spec: Spec, length, block: int, part):
    """Return the range [first, end) of blocks of `block` slots that part `part` of a row of `length` tokens reads. The
    parts divide the row's length, not the cache's capacity."""
    start = div(first_slot(spec, length), block)
    end = cdiv(length, block)
    each = cdiv(end - start, spec.splits)
    first = start + part * each
    return first, jnp.maximum(jnp.minimum(first + each, end), first)


def compute_dtype(q_dtype, cache_dtype):
    """Return the dtype in which keys, values and weights are multiplied: the queries' if the cache has that dtype or 8
    bits (which bfloat16 and float16 represent exactly), else float32."""
    if jnp.dtype(cache_dtype).name in EIGHT_BITS or q_dtype == cache_dtype:
        return jnp.dtype(q_dtype)
    return jnp.dtype(jnp.float32)


def traffic(spec: Spec, q_BTNH: Shaped, cache: Cache) -> tuple[int, int, int]:
    """Return (FLOPs, exponentials, bytes) of a step whose rows fill their caches or the window, an upper bound since
    lengths are data. FLOPs count 2 (H + V) per query head, query and slot; bytes count keys, values, scales, queries
    and results once."""
    B, T, N, H = q_BTNH.shape
    K, V = cache.k.shape[1], cache.v.shape[-1]
    slots = cache.capacity if spec.window is None else min(cache.capacity, spec.window + T - 1)
    scales = 0 if cache.k_scales is None else 8
    of_cache = B * K * slots * ((H + V) * cache.k.dtype.itemsize + scales)
    return (
        2 * B * N * T * slots * (H + V),
        B * N * T * slots,
        of_cache + B * T * N * (H + V) * q_BTNH.dtype.itemsize,
    )
