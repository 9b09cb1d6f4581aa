"""Soft mixture of experts: each expert processes mixtures of all tokens (Puigcerver et al. 2023).

Shapes: B batch, T time, D width, E experts, S slots of an expert, X = E * S, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from model.config import ModelConfig
from model.dispatch import ExpertWeights, run_experts
from model.routers import Routing
from sharding.rules import ShardingRules, activation_spec, reshard


def soft_moe(
    x_BTD: Float[Array, "B T D"],
    logits_BTX: Float[Array, "B T X"],
    valid_BT: Bool[Array, "B T"],
    experts: ExpertWeights,
    config: ModelConfig,
    rules: ShardingRules,
) -> tuple[Float[Array, "B T D"], Routing]:
    """Return (output, routing) of sec. 2.1 of the paper. The slots are the tokens mixed by a softmax of the logits over
    the tokens. Each expert runs on its config.moe.top_k slots. Each token receives the slot outputs mixed by a softmax
    of its logits over all slots, times config.moe.scale.

    `logits_BTX`: the slots of expert 0, then those of expert 1, and so on. Whole rows are mixed, so documents packed
    into one row mix too. Invalid tokens enter no mixture and get zeros. One non-finite logit makes its whole sequence
    non-finite. The normalization of sec. 2.3 (for widths above about 1,000) is left out. The Routing is for statistics:
    every token uses every expert, weighted by the sum over its slots.
    """
    moe = config.moe
    assert moe is not None
    E, S, dtype = moe.num_experts, moe.top_k, x_BTD.dtype
    logits_BTX = logits_BTX.astype(jnp.float32)
    dispatch_BTX = jax.nn.softmax(jnp.where(valid_BT[..., None], logits_BTX, jnp.finfo(jnp.float32).min), axis=1)
    dispatch_BTX = jnp.where(valid_BT[..., None], dispatch_BTX, 0.0)  # a sequence of padding alone
    log_total_BT = jax.nn.logsumexp(logits_BTX, axis=-1)
    combine_BTX = jnp.exp(logits_BTX - log_total_BT[..., None])

    spec = activation_spec(rules, "batch", "sequence", None)
    slots_BXD = jnp.einsum("btx,btd->bxd", dispatch_BTX.astype(dtype), x_BTD, out_sharding=spec)
    expert_BX1 = jnp.broadcast_to(jnp.arange(E * S, dtype=jnp.int32)[:, None] // S, (x_BTD.shape[0], E * S, 1))
    expert_BX1 = reshard(expert_BX1, rules, "batch", "sequence", None)
    y_BXD = run_experts(slots_BXD, expert_BX1, jnp.ones_like(expert_BX1, jnp.float32), None, experts, config, rules)
    mix_BTX = jnp.where(valid_BT[..., None], moe.scale * combine_BTX, 0.0).astype(dtype)
    out_BTD = jnp.einsum("btx,bxd->btd", mix_BTX, reshard(y_BXD, rules, "batch", None, None), out_sharding=spec)

    probs_BTE = combine_BTX.reshape(*valid_BT.shape, E, S).sum(-1)
    indices_BTE = jnp.where(valid_BT[..., None], jnp.arange(E), E)
    return out_BTD, Routing(indices_BTE, moe.scale * probs_BTE, probs_BTE, log_total_BT)
