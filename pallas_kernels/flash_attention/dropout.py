"""Dropout of attention weights by a counter-based generator: the mask is a pure function of (seed, row, head, query,
key).

Every implementation and tiling draws the same mask, forward and backward, and none stores it. The arithmetic is int32
that wraps, which the vector units of TPUs and GPUs share; the mixing is MurmurHash3's 32-bit finalizer (Appleby 2011).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def keep(seed, row, head, q_index, k_index, rate: float):
    """Return a mask that is True with probability 1 - `rate`.

    The int32 inputs broadcast: scalars `seed`, `row` (in the batch) and `head` (of the queries), and indices [..., T,
    1] and [..., 1, S] into the call's arrays. Costs about eight operations per pair."""
    stream = _mix(_mix(_mix(seed + 0x2545F491) ^ row) + head)
    bits = _mix(_mix(q_index ^ stream) ^ _mix(k_index + 0x5BD1E995))
    return jax.lax.shift_right_logical(bits, _like(bits, 8)) >= round(rate * (1 << 24))


def _mix(x):
    """Apply a bijection of 32-bit words in which every input bit flips each output bit about half of the time."""
    x = jnp.asarray(x, jnp.int32)
    x = x ^ jax.lax.shift_right_logical(x, _like(x, 16))
    x = x * jnp.int32(-2048144789)  # 0x85EBCA6B
    x = x ^ jax.lax.shift_right_logical(x, _like(x, 13))
    x = x * jnp.int32(-1028477387)  # 0xC2B2AE35
    return x ^ jax.lax.shift_right_logical(x, _like(x, 16))


def _like(x, value: int):
    return jnp.full_like(x, value)
