"""Merge attention over parts of the keys by their log-sum-exps (FlashAttention, Dao et al. 2022, section 3.1)."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.decode_attention.spec import MASKED


def merge(
    outs_CxV: Float[Array, "C *x V"], lses_Cx: Float[Array, "C *x"]
) -> tuple[Float[Array, "*x V"], Float[Array, "*x"]]:
    """Return (out, lse), float32, of softmax attention over the union of C disjoint parts of the keys. Part c gave the
    output `outs_CxV[c]` and the log-sum-exp of its logits `lses_Cx[c]`.

    A part in which a query sees no key has lse -1e30 or less and is ignored, whatever its output. A query that sees no
    key in any part has out 0 and lse -1e30."""
    lses_Cx = lses_Cx.astype(jnp.float32)
    top_x = lses_Cx.max(0)
    has_keys_x = top_x > MASKED / 2
    weights_Cx = jnp.where(lses_Cx > MASKED / 2, jnp.exp(lses_Cx - top_x), 0.0)
    total_x = jnp.where(has_keys_x, weights_Cx.sum(0), 1.0)
    parts_CxV = jnp.where(weights_Cx[..., None] > 0, outs_CxV.astype(jnp.float32), 0.0)
    out_xV = (parts_CxV * weights_Cx[..., None]).sum(0) / total_x[..., None]
    return out_xV, jnp.where(has_keys_x, top_x + jnp.log(total_x), MASKED)
