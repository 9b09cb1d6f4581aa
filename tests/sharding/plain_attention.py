"""Attention straight from the formula: an oracle for whole rows, and the pair of functions that a ring takes.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dimension.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

UNSEEN = -1e30


class Problem(NamedTuple):
    """Inputs, the cotangent of the output and the document ids of whole rows."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    dout_BTNH: jax.Array
    segments_BT: jax.Array


def visible(T: int, S: int, offset, q_segments, k_segments, causal: bool, window: int | None = None):
    """Return the mask of visible keys, bool and broadcastable to [B, T, S]."""
    distance = jnp.arange(T)[:, None] + offset - jnp.arange(S)
    mask = jnp.ones((1, T, S), bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance < window
    if q_segments is not None:
        mask = mask & (q_segments[:, :, None] == k_segments[:, None, :])
    return mask


def logits(q, k, mask):
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.astype(jnp.float32).reshape(B, T, K, N // K, H) * H**-0.5
    return jnp.where(mask[:, None, None], jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32)), -jnp.inf)


def attend(q, k, v, *, offset, q_segments, k_segments, causal: bool = True, window: int | None = None):
    """Return (out in q's dtype, lse float32 [B, N, T]); differentiable."""
    mask = visible(q.shape[1], k.shape[1], offset, q_segments, k_segments, causal, window)
    s = logits(q, k, mask)
    top = jax.lax.stop_gradient(jnp.maximum(s.max(-1, keepdims=True), -1e29))
    p = jnp.exp(s - top)
    total = p.sum(-1, keepdims=True)
    out = jnp.einsum("bkgts,bskh->btkgh", p / jnp.where(total > 0, total, 1), v.astype(jnp.float32))
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), UNSEEN)
    B, T, N, _ = q.shape
    return out.reshape(B, T, N, v.shape[-1]).astype(q.dtype), lse.reshape(B, N, T)


def attend_backward(
    q, k, v, out, lse, dout, *, offset, q_segments, k_segments, causal: bool = True, window: int | None = None
):
    """Return the contribution (dq, dk, dv) of these keys in float32, for out, lse and dout of whole rows."""
    B, T, N, H = q.shape
    K, S = k.shape[2], k.shape[1]
    mask = visible(T, S, offset, q_segments, k_segments, causal, window)
    group = lambda x: x.astype(jnp.float32).reshape(B, T, K, N // K, -1)
    p = jnp.exp(logits(q, k, mask) - lse.reshape(B, K, N // K, T, 1))
    dp = jnp.einsum("btkgh,bskh->bkgts", group(dout), v.astype(jnp.float32))
    delta = (group(out) * group(dout)).sum(-1).transpose(0, 2, 3, 1)[..., None]
    ds = p * (dp - delta) * H**-0.5
    dq = jnp.einsum("bkgts,bskh->btkgh", ds, k.astype(jnp.float32)).reshape(q.shape)
    return dq, jnp.einsum("bkgts,btkgh->bskh", ds, group(q)), jnp.einsum("bkgts,btkgh->bskh", p, group(dout))


def pair(**options):
    """Return the two functions with mask options bound."""
    return dict(attend=partial(attend, **options), attend_backward=partial(attend_backward, **options))


def problem(seed: int, B: int, T: int, N: int, K: int, H: int, dtype=jnp.float32, documents: int = 3) -> Problem:
    """Return normal random inputs; each row packs `documents` documents of random lengths."""
    keys = jax.random.split(jax.random.key(seed), 5)
    heads = (N, K, K, N)
    arrays = [jax.random.normal(key, (B, T, n, H)).astype(dtype) for key, n in zip(keys, heads, strict=False)]
    cuts = jax.random.randint(keys[4], (B, documents - 1), 1, T)
    segments = 1 + (jnp.arange(T)[None, :, None] >= cuts[:, None, :]).sum(-1).astype(jnp.int32)
    return Problem(*arrays, segments)
