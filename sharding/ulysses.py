"""Attention over a sequence that is spread over devices, by exchanging it for heads (Jacobs et al. 2023, DeepSpeed
Ulysses).

An all-to-all gives each device whole rows of a part of the heads; after the attention another gives the rows back. It
moves less than a ring where heads allow it, and any attention may stand between, but devices cannot outnumber the query
heads.

Shapes: B batch, T local queries and keys, N query heads, K key/value heads, H head dimension, V that of the values.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def ulysses_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKV: Float[Array, "B T K V"],
    *,
    attend: Callable[..., tuple[Array, Array]],
    axis: str = "sequence",
    segments: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N V"]:
    """Attention of the local queries to the keys of all n devices along `axis`: to be called inside shard_map, with
    local shards of contiguous rows.

    `attend(q, k, v, *, offset=0, q_segments, k_segments) -> (out, lse)` sees whole rows, N / n query heads (those of
    device i from i * N / n on) and their key/value heads, and must be differentiable by JAX; lse is not used. n must
    divide N, and K or be a multiple of K: then each device gets the one key/value head its queries use. Each device
    sends (n - 1) / n of (N H + max(K, n) (H + V) + N V) * B * T numbers forward. Raises ValueError where heads do not
    allow it.
    """
    n, N, K = jax.lax.axis_size(axis), q_BTNH.shape[2], k_BTKH.shape[2]
    if N % n:
        raise ValueError(
            f"{N} query heads (on this device) do not divide over the {n} devices of mesh axis {axis!r}; use the ring"
        )
    if K % n and n % K:
        raise ValueError(
            f"{K} key/value heads (on this device) neither divide over nor into the {n} devices of mesh axis {axis!r}; "
            f"use the ring"
        )
    if K < n:  # the queries of n / K devices share a head
        k_BTKH, v_BTKV = (jnp.repeat(x, n // K, axis=2) for x in (k_BTKH, v_BTKV))
    to_heads = lambda x: jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    whole = None if segments is None else jax.lax.all_gather(segments, axis, axis=1, tiled=True)
    out, _ = attend(*map(to_heads, (q_BTNH, k_BTKH, v_BTKV)), offset=0, q_segments=whole, k_segments=whole)
    return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
