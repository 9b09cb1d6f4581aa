"""How evenly a router uses its experts: losses, statistics, and the bias that balances without a loss.

Shapes: B batch, T time, E experts, C choices of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.moe_config import MoEConfig
from model.routers import Routing


class RouterStats(NamedTuple):
    """What a router did with the tokens of a batch, padding left out. Losses carry gradients; the rest does not."""

    load_balance: Float[Array, ""]  # 1 at perfect balance, E / C when C experts take everything
    z: Float[Array, ""]  # mean of logsumexp(logits)^2
    load_E: Float[Array, "E"]  # fraction of the choices that each expert was chosen for, dropped ones included; sums to 1
    entropy: Float[Array, ""]  # mean entropy of the routing distribution, nats
    confidence: Float[Array, ""]  # mean of the largest probability
    dropped: Float[Array, ""]  # fraction of the choices that found no place
    choices_BTC: Int[Array, "B T C"]  # as routed, before any is dropped; E: none


def router_stats(
    routing: Routing, kept_BTC: Int[Array, "B T C"], valid_BT: Bool[Array, "B T"], config: MoEConfig
) -> RouterStats:
    """Losses and statistics of a routing. `kept_BTC`: its indices after the capacity; E where a choice was dropped.

    Load balance: E * sum_e f_e P_e (Fedus et al. 2021, eq. 4) with f_e the fraction of choices and P_e the mean
    probability, over `config.balance_scope`, averaged over the scopes by their tokens. z: Zoph et al. 2022, eq. 5.
    """
    E = config.num_experts
    valid = valid_BT.astype(jnp.float32)
    probs_BTE = routing.probs_BTE
    chosen_BTE = jax.nn.one_hot(routing.indices_BTC, E, dtype=jnp.float32).sum(-2) * valid[..., None] / config.top_k
    chosen_BTE = jax.lax.stop_gradient(chosen_BTE)
    count = jnp.maximum(valid.sum(), 1.0)
    load_E = chosen_BTE.sum((0, 1)) / count
    if config.balance_scope == "batch":
        balance = E * (load_E * (probs_BTE * valid[..., None]).sum((0, 1)) / count).sum()
    else:
        count_B = valid.sum(1)
        f_BE, p_BE = chosen_BTE.sum(1), (probs_BTE * valid[..., None]).sum(1)
        balance = E * ((f_BE * p_BE).sum(-1) / jnp.maximum(count_B, 1.0)).sum() / count
    z = (jnp.square(routing.log_total_BT) * valid).sum() / count
    logs = jnp.log(jnp.maximum(probs_BTE, jnp.finfo(jnp.float32).tiny))
    entropy = (-(probs_BTE * logs).sum(-1) * valid).sum() / count
    confidence = (probs_BTE.max(-1) * valid).sum() / count
    chosen, kept = ((indices < E).sum() for indices in (routing.indices_BTC, kept_BTC))
    dropped = 1.0 - kept / jnp.maximum(chosen, 1)
    rest = jax.lax.stop_gradient((entropy, confidence, dropped))
    return RouterStats(balance, z, load_E, *rest, routing.indices_BTC)
