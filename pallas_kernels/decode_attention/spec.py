"""What the implementations are told, and which part of a cache a row of queries needs.

Every implementation offers `unsupported(spec, q_BTNH, cache) -> str | None`, the reason why it cannot run a call, and

    forward(spec, q_BKRH, cache, lengths_B, alibi_N, out_dtype) -> (outs_CBKRV in out_dtype, lses_CBKR float32)

where C = spec.splits parts of the cache length are left to be merged, and R = T * G rows, row t * G + g being query t
of the g-th head that shares a key head.

Shapes: B rows, T queries of each, N query heads, K key/value heads, G = N / K, R = T * G, H head dimension, V that of
the values, S slots of a row, P pages of a row, C parts of the cache length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

MASKED = -1e30  # finite, so that a row that sees nothing gives zeros, never NaN
Shaped = Array | jax.ShapeDtypeStruct  # for choices that go by shape and dtype alone
EIGHT_BITS = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class Spec:
    """The choices that are compiled in."""

    T: int  # queries of a row: its last T tokens
    scale: float
    window: int | None
    softcap: float | None
    splits: int
    interpret: Any  # a bool, or the parameters of an interpreter
    slots_innermost: bool = False  # how caches lie on a TPU whose H is no multiple of 128
    finite: bool = False  # slots that no query sees hold numbers: the reference cleans no copy of the values


class Cache(NamedTuple):
    """Keys and values, contiguous [B, K, S, H] or, with a page table, in pages [pages, K, page_size, H]."""

    k: Array
    v: Array
    k_scales: Array | None = None  # float32, the shape of k without its last dimension
    v_scales: Array | None = None
    page_table_BP: Int[Array, "B P"] | None = None

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.k.shape[2] * (1 if self.page_table_BP is None else self.page_table_BP.shape[1])


def div(n, by: int):
    """n // by for n >= 0, without the signs that `//` looks after in every kernel."""
    return n if by == 1 else jax.lax.div(n, jnp.full_like(n, by))


def cdiv(n, by: int):
    """n / by rounded up, for n >= 0."""
    return div(n + (by - 1), by)


def first_slot(spec: Spec, length):
    """The first slot that any query of a row of `length` tokens sees."""
    if spec.window is None:
        return length * 0
    return jnp.maximum(length - (spec.T - 1) - spec.window, 0)


def block_range(spec: Spec, length, block: int, part):
    """[first, end) of the blocks of `block` slots that part `part` of a row of `length` tokens reads. The parts share
    what the row has, not what the cache could hold."""
    start = div(first_slot(spec, length), block)
    end = cdiv(length, block)
    each = cdiv(end - start, spec.splits)
    first = start + part * each
    return first, jnp.maximum(jnp.minimum(first + each, end), first)


def compute_dtype(q_dtype, cache_dtype):
    """What keys, values and weights are multiplied in: bfloat16 or float16 where queries and cache are no wider (8 bits
    fit in either exactly), else float32."""
    if jnp.dtype(cache_dtype).name in EIGHT_BITS or q_dtype == cache_dtype:
        return jnp.dtype(q_dtype)
    return jnp.dtype(jnp.float32)


def traffic(spec: Spec, q_BTNH: Shaped, cache: Cache) -> tuple[int, int, int]:
    """(FLOPs, exponentials, bytes) of a step whose rows fill their caches, or the window: an upper bound, since lengths
    are data. FLOPs count 2 (H + V) for each query head, query and slot; bytes are keys, values and scales once, queries
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
