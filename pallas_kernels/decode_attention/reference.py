"""Decode attention by its formula, in float32: one masked product with the whole cache. Memory O(B N T S).

Shapes: as in spec.py.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.decode_attention.spec import MASKED, Cache, Shaped, Spec, first_slot


def unsupported(spec: Spec, q_BTNH: Shaped, cache: Cache) -> str | None:
    """Return the reason why the reference cannot run a call: it does not split rows."""
    return None if spec.splits == 1 else f"splits = {spec.splits}: the reference does not split rows; use None"


def forward(spec: Spec, q_BKRH: Array, cache: Cache, lengths_B: Array, alibi_N: Array | None, out_dtype):
    """See spec.py."""
    _, K, R, _ = q_BKRH.shape
    cache = contiguous(cache, lengths_B)
    slots_S = jnp.arange(cache.k.shape[2], dtype=jnp.int32)
    q_slots_BR = (lengths_B - spec.T)[:, None] + jnp.arange(R) // (R // spec.T)
    logits = jnp.einsum(
        "bkrh,bksh->bkrs", q_BKRH.astype(jnp.float32), cache.k.astype(jnp.float32), precision="highest"
    ) * jnp.float32(spec.scale)
    if cache.k_scales is not None:
        logits = logits * cache.k_scales[:, :, None, :]
    if spec.softcap is not None:
        logits = spec.softcap * jnp.tanh(logits / spec.softcap)
    distance_BRS = q_slots_BR[:, :, None] - slots_S
    if alibi_N is not None:
        logits = logits - jnp.tile(alibi_N.reshape(K, 1, -1), (1, spec.T, 1)).reshape(K, R, 1) * distance_BRS[:, None]
    visible = distance_BRS >= 0
    if spec.window is not None:
        visible &= distance_BRS < spec.window
    visible = visible[:, None]
    logits = jnp.where(visible, logits, MASKED)
    top = logits.max(-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(logits - top), 0.0)
    total = weights.sum(-1, keepdims=True)
    # Slots that no query sees may hold anything, even NaN, which a weight of zero would not remove.
    needed_BS = (slots_S < lengths_B[:, None]) & (slots_S >= first_slot(spec, lengths_B)[:, None])
    if cache.v_scales is not None:
        weights = weights * jnp.where(needed_BS[:, None], cache.v_scales, 0.0)[:, :, None, :]
    v = cache.v.astype(jnp.float32)
    if not spec.finite:
        v = jnp.where(needed_BS[:, None, :, None], v, 0.0)
    has_keys = total > 0
    out = jnp.einsum("bkrs,bksv->bkrv", weights, v, precision="highest") / jnp.where(has_keys, total, 1.0)
    lse = jnp.where(has_keys, top + jnp.log(jnp.where(has_keys, total, 1.0)), MASKED)[..., 0]
    return out.astype(out_dtype)[None], lse[None]


def contiguous(cache: Cache, lengths_B: Array) -> Cache:
    """Return the cache with each row's pages gathered. Table entries beyond a row's length are not followed."""
    table_BP = cache.page_table_BP
    if table_BP is None:
        return cache
    page_size = cache.k.shape[2]
    used_BP = jnp.arange(table_BP.shape[1]) * page_size < lengths_B[:, None]
    pages_BP = jnp.where(used_BP, table_BP, 0).clip(0, cache.k.shape[0] - 1)

    def gather(pages):
        if pages is None:
            return None
        rows = jnp.moveaxis(pages[pages_BP], 2, 1)  # [B, K, P, page_size, ...]
        return rows.reshape(*rows.shape[:2], -1, *rows.shape[4:])

    return Cache(*(gather(x) for x in cache[:4]))
