"""Attention by its formula: the whole matrix of logits at once, differentiated by JAX. O(T S) memory.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dimension, V head dimension of
the values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.mask import MASKED, visible
from pallas_kernels.flash_attention.spec import Extra, Shaped, Spec


def unsupported(spec: Spec, q: Shaped, k: Shaped, v: Shaped, extra: Extra) -> str | None:
    """Return None: the reference runs every call."""
    return None


def forward(spec: Spec, q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, extra: Extra) -> tuple[Array, Array]:
    """See spec.py."""
    B, T, N, _ = q_BTNH.shape
    logits, visible_mask = logits_and_seen(spec, q_BTNH, k_BSKH, extra)
    logits = jnp.where(visible_mask, logits, MASKED)
    top = logits.max(-1, keepdims=True)
    if extra.sinks_N is not None:
        top = jnp.maximum(top, extra.sinks_N[:, None, None])
    top = jax.lax.stop_gradient(top)
    p = jnp.where(visible_mask, jnp.exp(logits - top), 0.0)
    total = p.sum(-1, keepdims=True)
    if extra.sinks_N is not None:
        total = total + jnp.exp(extra.sinks_N[:, None, None] - top)
    has_keys = total > 0
    total = jnp.where(has_keys, total, 1.0)
    lse_BNT = jnp.where(has_keys, top + jnp.log(total), MASKED)[..., 0]
    p = p / total
    if spec.dropout:
        p = jnp.where(_keep(spec, extra, B, N, T, k_BSKH.shape[1]), p / (1.0 - spec.dropout), 0.0)
    v = jnp.repeat(v_BSKV.astype(p.dtype), N // v_BSKV.shape[2], axis=2)
    out_BTNV = jnp.einsum("bnts,bsnv->btnv", p, v, precision="highest")
    return out_BTNV.astype(q_BTNH.dtype), lse_BNT


def _keep(spec: Spec, extra: Extra, B: int, N: int, T: int, S: int) -> Array:
    """Return which weights dropout keeps, [B, N, T, S]."""
    index = lambda n, axis: jnp.expand_dims(jnp.arange(n, dtype=jnp.int32), [a for a in range(4) if a != axis])
    return keep(extra.seed, index(B, 0), index(N, 1), index(T, 2), index(S, 3), spec.dropout)


def logits_and_seen(spec: Spec, q_BTNH: Array, k_BSKH: Array, extra: Extra) -> tuple[Array, Array]:
    """Return the logits before the mask, [B, N, T, S], and the mask of visible pairs, which broadcasts to them. Logits
    are float32, or the inputs' dtype if it is wider."""
    T, N, S = q_BTNH.shape[1], q_BTNH.shape[2], k_BSKH.shape[1]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    k = jnp.repeat(k_BSKH, N // k_BSKH.shape[2], axis=2)
    logits = spec.scale * jnp.einsum("btnh,bsnh->bnts", q_BTNH.astype(wide), k.astype(wide), precision="highest")
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    data = extra.data
    q_slot = jnp.asarray(data.offset).reshape(-1, 1, 1, 1) + jnp.arange(T)[:, None]
    k_slot = jnp.arange(S)[None, :]
    if extra.bias_BNTS is not None:
        logits = logits + extra.bias_BNTS
    if extra.alibi_N is not None:
        logits = logits - extra.alibi_N[:, None, None] * jnp.abs(q_slot - k_slot)
    column = lambda x: None if x is None else x[:, None, :, None]
    row = lambda x: None if x is None else x[:, None, None, :]
    visible_mask = visible(
        spec.mask, q_slot, k_slot, column(data.q_segments_BT), row(data.k_segments_BS),
        column(data.q_positions_BT), row(data.k_positions_BS), row(data.prefix_BS),
    )  # fmt: skip
    visible_mask = jnp.ones((1, 1, T, S), bool) if visible_mask is None else visible_mask
    if data.blocks_BNIJ is not None and spec.mask.block_shape is not None:
        rows, columns = jnp.arange(T) // spec.mask.block_shape[0], jnp.arange(S) // spec.mask.block_shape[1]
        visible_mask = visible_mask & data.blocks_BNIJ[:, :, rows[:, None], columns[None, :]]
    return logits, visible_mask


def backward(spec: Spec, q, k, v, extra: Extra, lse_BNT, delta_BNT, dout_BTNV):
    """See spec.py. Uses the gradient's formula instead of jax.grad, since the row may span more keys than k holds."""
    N, K = q.shape[2], k.shape[2]
    bias = extra.bias_BNTS

    def scores(q, k, bias):
        return logits_and_seen(spec, q, k, extra._replace(bias_BNTS=bias))

    logits, pull, visible_mask = jax.vjp(scores, q, k, bias, has_aux=True)
    p = jnp.where(visible_mask, jnp.exp(jnp.where(visible_mask, logits, MASKED) - lse_BNT[..., None]), 0.0)
    wide = p.dtype
    v_N, dout = jnp.repeat(v.astype(wide), N // K, axis=2), dout_BTNV.astype(wide)
    dp = jnp.einsum("btnv,bsnv->bnts", dout, v_N, precision="highest")
    kept = p
    if spec.dropout:
        keeps = _keep(spec, extra, q.shape[0], N, q.shape[1], k.shape[1])
        kept, dp = (jnp.where(keeps, x / (1.0 - spec.dropout), 0.0) for x in (p, dp))
    dlogits = p * (dp - delta_BNT[..., None])
    dv_N = jnp.einsum("bnts,btnv->bsnv", kept, dout, precision="highest")
    dv = dv_N.reshape(*v.shape[:2], K, N // K, v.shape[-1]).sum(3)
    dq, dk, dbias = pull(dlogits)
    return dq, dk, dv.astype(v.dtype), dbias
