"""Attention over a sharded sequence, by exchanging positions for heads (Jacobs et al. 2023, DeepSpeed Ulysses).

An all-to-all gives each device whole rows for some of the heads. After the attention, another one returns the rows.
This sends less than a ring if the heads allow it, and it works with any attention, but there cannot be more devices
than query heads.

Shapes: B batch, T local queries and keys, N query heads, K key/value heads, H head dimension, V value dimension.
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
    """Return the attention of the local queries to the keys of all n devices along `axis`. Call it inside shard_map,
    with local shards of contiguous rows.

    `attend(q, k, v, *, offset=0, q_segments, k_segments) -> (out, lse)` receives whole rows with N / n query heads (on
    device i those from i * N / n on) and their key/value heads. It must be differentiable by JAX; lse is not used. n
    must divide N. n must also divide K or be a multiple of K; in the latter case each device gets the one key/value
    head that its queries use. In the forward pass each device sends (n - 1) / n of (N H + max(K, n) (H + V) + N V) * B
    * T numbers. Raises ValueError if the numbers of heads do not allow this.
    """
    n, N, K = jax.lax.axis_size(axis), q_BTNH.shape[2], k_BTKH.shape[2]
    if N % n:
        raise ValueError(
            f"{N} query heads (on this device) do not divide over the {n} devices of mesh axis {axis!r}. Use the ring"
        )
    if K % n and n % K:
        raise ValueError(
            f"{K} key/value heads (on this device) neither divide nor are divided by the {n} devices of mesh axis "
            f"{axis!r}. Use the ring"
        )
    if K < n:  # the queries of n / K devices share a head
        k_BTKH, v_BTKV = (jnp.repeat(x, n // K, axis=2) for x in (k_BTKH, v_BTKV))
    to_heads = lambda x: jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    ids = None if segments is None else jax.lax.all_gather(segments, axis, axis=1, tiled=True)
    out, _ = attend(*map(to_heads, (q_BTNH, k_BTKH, v_BTKV)), offset=0, q_segments=ids, k_segments=ids)
    return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
