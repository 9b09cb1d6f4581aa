"""Load balance of a router: losses, statistics, and the bias that balances without a loss.

Shapes: B batch, T time, E experts, C choices of a token, N tokens, L MoE layers, S scopes (groups of tokens balanced
together).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model.moe_config import MoEConfig
from model.routers import Routing
from model.weights import Weight, map_named_weights, repeats

if TYPE_CHECKING:
    from model.transformer import Transformer


HostOrDevice = Array | np.ndarray  # reports pass NumPy arrays


class RouterStats(NamedTuple):
    """Losses and statistics of a router on one batch, without padding. Only the losses carry gradients."""

    load_balance: Float[Array, ""]  # 1 at perfect balance, E / C when C experts take everything
    z: Float[Array, ""]  # mean of logsumexp(logits)^2
    load_E: Float[Array, "E"]  # each expert's fraction of the choices, including dropped ones; sums to 1
    entropy: Float[Array, ""]  # mean entropy of the routing distribution, nats
    confidence: Float[Array, ""]  # mean of the largest probability
    dropped: Float[Array, ""]  # fraction of the choices that exceeded an expert's capacity
    choices_BTC: Int[Array, "B T C"]  # experts as routed, before any drop; E: no expert


def router_stats(
    routing: Routing,
    kept_BTC: Int[Array, "B T C"],
    valid_BT: Bool[Array, "B T"],
    config: MoEConfig,
    slices: int = 1,
) -> RouterStats:
    """Return the losses and statistics of a routing. `kept_BTC`: its indices after the capacity limit; E where a choice
    was dropped.

    `RouterStats.load_balance` is `load_balance` per choice for each scope of `config.balance_scope`, averaged over the
    scopes with their numbers of tokens as weights. 'batch': all tokens (Qiu et al. 2025: best for specialization).
    'device': the rows of each of `slices` devices, as most trainers do; `slices` must divide the rows. 'sequence': each
    row (DeepSeek-V3, eq. 17-20; here f counts the choices made with the bias, while eq. 18 leaves the bias out).
    `RouterStats.z` is `z_loss`. Raises ValueError if `slices` does not divide the rows.
    """
    E, rows = config.num_experts, valid_BT.shape[0]
    if config.balance_scope == "device" and rows % slices:
        raise ValueError(
            f"model.moe.balance_scope = 'device': {rows} rows do not divide into the {slices} devices. Use a batch of "
            f"a multiple of {slices} rows, or 'batch' or 'sequence'"
        )
    valid_BT1 = valid_BT[..., None]
    probs_BTE = jnp.where(valid_BT1, routing.probs_BTE, 0.0)
    chosen_BTE = (routing.indices_BTC[..., None] == jnp.arange(E)).sum(2, dtype=jnp.float32) * valid_BT1
    count_BE, probs_BE = chosen_BTE.sum(1), probs_BTE.sum(1)
    tokens_B = valid_BT.sum(1).astype(jnp.float32)
    tokens = jnp.maximum(tokens_B.sum(), 1.0)
    choices = jnp.maximum(count_BE.sum(), 1.0)
    if config.balance_scope == "sequence":
        count_SE, probs_SE, tokens_S = count_BE, probs_BE, tokens_B
    else:
        scopes = slices if config.balance_scope == "device" else 1
        member_BS = jax.nn.one_hot(jnp.arange(rows) // (rows // scopes), scopes)
        count_SE, probs_SE, tokens_S = (
            jnp.einsum("bs,b...->s...", member_BS, y) for y in (count_BE, probs_BE, tokens_B)
        )
    balance_S = load_balance(count_SE, probs_SE, tokens_S)
    balance = (balance_S * tokens_S).sum() / tokens
    logs = jnp.log(jnp.maximum(probs_BTE, jnp.finfo(jnp.float32).tiny))
    entropy = -(probs_BTE * logs).sum() / tokens
    confidence = probs_BTE.max(-1).sum() / tokens
    dropped = 1.0 - (kept_BTC < E).sum() / choices
    rest = jax.lax.stop_gradient((count_BE.sum(0) / choices, entropy, confidence, dropped))
    return RouterStats(balance, z_loss(routing.log_total_BT, valid_BT), *rest, routing.indices_BTC)


def load_balance(
    count_SE: Float[Array, "*S E"],
    probs_SE: Float[Array, "*S E"],
    tokens_S: Float[Array, "*S"],
    per: Literal["choice", "token"] = "choice",
) -> Float[Array, "*S"]:
    """Return E * sum_e f_e P_e (Fedus et al. 2021, eq. 4-6; Shazeer et al. 2017 used the squared coefficient of
    variation). f_e is the fraction of choices that fall on expert e (`count_SE` counts them and has no gradient). P_e
    is the mean router probability of e (`probs_SE` sums it over `tokens_S` tokens).

    per='choice': f sums to 1 and the loss is 1 at perfect balance (Switch, megablocks, the OLMoE paper). per='token': f
    counts choices per token and sums to k, and the loss is k at perfect balance (load_balancing_loss_func of
    transformers, which also sums counts and probabilities over the layers before it multiplies them; to reproduce it,
    pass such sums).
    """
    tokens_S1 = jnp.maximum(tokens_S[..., None], 1.0)
    count_SE = jax.lax.stop_gradient(count_SE)
    of_S1 = jnp.maximum(count_SE.sum(-1, keepdims=True), 1.0) if per == "choice" else tokens_S1
    return count_SE.shape[-1] * (count_SE / of_S1 * probs_SE / tokens_S1).sum(-1)


def z_loss(log_total_BT: Float[Array, "B T"], valid_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Return the mean of logsumexp(logits)^2 over the valid tokens (Zoph et al. 2022, eq. 5)."""
    return jnp.square(jnp.where(valid_BT, log_total_BT, 0.0)).sum() / jnp.maximum(valid_BT.sum(), 1)


def max_violation(load_E: Float[Array | np.ndarray, "*lead E"]) -> Float[Array | np.ndarray, "*lead"]:
    """Return MaxVio (Wang et al. 2024, eq. 4): the maximum load over the mean load, minus 1.

    It is 0 at perfect balance and E / k - 1 if k experts take everything. The load of one batch gives their
    MaxVio_batch, and the load of all evaluated text gives MaxVio_global.
    """
    return load_E.max(-1) / load_E.mean(-1) - 1.0


def saturation(
    early_NC: Int[HostOrDevice, "*N C"],
    late_NC: Int[HostOrDevice, "*N C"],
    num_experts: int,
    valid_N: Bool[HostOrDevice, "*N"] | None = None,
) -> Float[Array, ""]:
    """Return the fraction of the late checkpoint's choices that the early one also made for the same tokens (OLMoE,
    Muennighoff et al. 2024, sec. 5.1), between 0 and 1. Index `num_experts` means no choice. Random routing gives k /
    E."""
    real_NC = late_NC < num_experts
    if valid_N is not None:
        real_NC &= valid_N[..., None]
    same_NC = (late_NC[..., :, None] == early_NC[..., None, :]).any(-1) & real_NC
    return same_NC.sum() / jnp.maximum(real_NC.sum(), 1)


def co_activation(
    indices_NC: Int[HostOrDevice, "*N C"], num_experts: int, valid_N: Bool[HostOrDevice, "*N"] | None = None
) -> Float[Array, "E E"]:
    """Return P(j | i): the fraction of the tokens routed to expert i that also chose expert j (OLMoE, sec. 5.2). The
    diagonal is 1. The row of an expert that no token chose is 0."""
    E = num_experts
    chosen_NE = (indices_NC[..., None] == jnp.arange(E)).any(-2)
    if valid_N is not None:
        chosen_NE &= valid_N[..., None]
    chosen_NE = chosen_NE.reshape(-1, E).astype(jnp.float32)
    together_EE = chosen_NE.T @ chosen_NE
    return together_EE / jnp.maximum(jnp.diag(together_EE)[:, None], 1.0)


def update_bias(
    bias_E: Float[Array, "*lead E"], load_E: Float[Array, "*lead E"], rate: float
) -> Float[Array, "*lead E"]:
    """Return bias + rate * sign(mean load - load) (Wang et al. 2024, algorithm 1), which makes overloaded experts less
    likely from the next step on."""
    return bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)


def update_biases(model: Transformer, load_LE: Float[Array, "L E"], config: MoEConfig) -> Transformer:
    """Return `model` with every MoE layer's `router_bias` moved by `config.bias_rate`, or `model` itself if the rate is
    None or 0.

    `load_LE`: the loads of the MoE layers in order, over the whole batch (router.load_E of `forward`, averaged over
    microbatches weighted by their targets). The train step calls this after the optimizer, which does not change these
    biases (train/optimizers.py).
    """
    rate = config.bias_rate
    if not rate:
        return model
    first = 0
    loads: dict[tuple[int, int], Array] = {}  # by (scan group, index in its pattern)
    for s, pattern in enumerate(model.stacks):
        biased = [i for i, block in enumerate(pattern) if getattr(block.mlp, "router_bias", None) is not None]
        layers = len(biased) * repeats(pattern)
        stack_load = load_LE[first : first + layers].reshape(-1, max(len(biased), 1), load_LE.shape[-1])
        loads |= {(s, i): stack_load[:, m] for m, i in enumerate(biased)}
        first += layers

    def moved(path: str, weight: Weight) -> Weight:
        if weight.name != "mlp.router_bias":
            return weight
        _, stack, index, *_ = path.split(".")
        return replace(weight, value=update_bias(weight.value, loads[int(stack), int(index)], rate))

    return map_named_weights(moved, model)
