"""Which experts a token goes to: pure functions from router logits to choices and weights.

Shapes: B batch, T time, E experts, C choices of a token (`top_k`; of some routers E).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from model.moe_config import MoEConfig


class Routing(NamedTuple):
    """The choice of a router. A pair (token, choice) with index E goes nowhere."""

    indices_BTC: Int[Array, "B T C"]  # distinct experts of a token, in [0, E]
    weights_BTC: Float[Array, "B T C"]  # float32; multiply the experts' outputs
    probs_BTE: Float[Array, "B T E"]  # float32, sums to one: the distribution that losses and statistics read
    log_total_BT: Float[Array, "B T"]  # float32: logsumexp of the logits


def route(
    logits_BTE: Float[Array, "B T E"],
    valid_BT: Bool[Array, "B T"],
    config: MoEConfig,
    *,
    bias_E: Float[Array, "E"] | None = None,
    noise_BTE: Float[Array, "B T E"] | None = None,
    ids_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Routing:
    """The choice of `config.router`. `key`: given in training alone; what is random is drawn from it.

    `bias_E` is added for the choice, not to the weights. `noise_BTE`: what noisy_top_k's noise is scaled by, before softplus.
    Tokens that are not valid (padding) go nowhere. A token whose logits are not finite gets weights that are not finite, so
    that the loss shows it.
    """
    E = config.num_experts
    logits_BTE = logits_BTE.astype(jnp.float32)
    log_total_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    probs_BTE = jnp.exp(logits_BTE - log_total_BT[..., None])
    weights_BTC, indices_BTC = jax.lax.top_k(probs_BTE, config.top_k)
    if config.weights == "renormalized":
        weights_BTC = weights_BTC / weights_BTC.sum(-1, keepdims=True)
    # top_k may rank NaN below every number and so drop it: a token with a bad logit is marked by hand.
    weights_BTC = jnp.where(jnp.isfinite(logits_BTE).all(-1, keepdims=True), weights_BTC, jnp.nan)
    indices_BTC = jnp.where(valid_BT[..., None], indices_BTC, E)
    return Routing(indices_BTC, weights_BTC, probs_BTE, log_total_BT)


def stochastic(config: MoEConfig | None) -> bool:
    """Whether training draws random numbers for the router."""
    if config is None:
        return False
    noisy = config.router in ("gshard", "noisy_top_k", "random")
    return noisy or config.jitter > 0 or config.router_dropout > 0 or config.router == "sinkhorn"
