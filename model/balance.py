"""How evenly a router uses its experts: losses, statistics, and the bias that balances without a loss.

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


HostOrDevice = Array | np.ndarray  # reports give NumPy


class RouterStats(NamedTuple):
    """What a router did with the tokens of a batch, padding left out. Losses carry gradients; the rest does not."""

    load_balance: Float[Array, ""]  # 1 at perfect balance, E / C when C experts take everything
    z: Float[Array, ""]  # mean of logsumexp(logits)^2
    load_E: Float[
        Array, "E"
    ]  # fraction of the choices that each expert was chosen for, dropped ones included; sums to 1
    entropy: Float[Array, ""]  # mean entropy of the routing distribution, nats
    confidence: Float[Array, ""]  # mean of the largest probability
    dropped: Float[Array, ""]  # fraction of the choices that found no place
    choices_BTC: Int[Array, "B T C"]  # as routed, before any is dropped; E: none


def router_stats(
    routing: Routing,
    kept_BTC: Int[Array, "B T C"],
    valid_BT: Bool[Array, "B T"],
    config: MoEConfig,
    slices: int = 1,
) -> RouterStats:
    """Losses and statistics of a routing. `kept_BTC`: its indices after the capacity; E where a choice was dropped.

    Load balance: `load_balance`, per choice, over `config.balance_scope`, averaged over the scopes by their tokens.
    batch: all tokens (Qiu et al. 2025: best for specialization); device: the rows of each of `slices` devices, which
    must divide the rows (what most trainers do); sequence: each row (DeepSeek-V3, eq. 17-20; f counts the choices as
    made, a bias included, where eq. 18 leaves it out). z: `z_loss`.
    """
    E, rows = config.num_experts, valid_BT.shape[0]
    if config.balance_scope == "device" and rows % slices:
        raise ValueError(
            f"{rows} rows do not divide into the {slices} devices that model.moe.balance_scope = 'device' balances"
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
    """E * sum_e f_e P_e (Fedus et al. 2021, eq. 4-6; Shazeer et al. 2017 had the square of the variation): f_e the
    fraction of choices (`count_SE` of them, no gradient) that fall on expert e, P_e the mean of the router's
    probabilities, which `probs_SE` sums over `tokens_S` tokens.

    per 'choice': f sums to 1 and the loss is 1 at perfect balance (Switch, megablocks, OLMoE's paper); per 'token': f
    counts choices of a token and sums to k, as the loss is at balance (transformers' load_balancing_loss_func, which
    besides adds up the layers' counts and probabilities before it multiplies them: give it sums over them too).
    """
    tokens_S1 = jnp.maximum(tokens_S[..., None], 1.0)
    count_SE = jax.lax.stop_gradient(count_SE)
    of_S1 = jnp.maximum(count_SE.sum(-1, keepdims=True), 1.0) if per == "choice" else tokens_S1
    return count_SE.shape[-1] * (count_SE / of_S1 * probs_SE / tokens_S1).sum(-1)


def z_loss(log_total_BT: Float[Array, "B T"], valid_BT: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean of logsumexp(logits)^2 over the valid tokens (Zoph et al. 2022, eq. 5)."""
    return jnp.square(jnp.where(valid_BT, log_total_BT, 0.0)).sum() / jnp.maximum(valid_BT.sum(), 1)


def max_violation(load_E: Float[Array | np.ndarray, "*lead E"]) -> Float[Array | np.ndarray, "*lead"]:
    """MaxVio (Wang et al. 2024, eq. 4): the greatest load over the mean load, less 1. 0 at balance, E / k - 1 where k
    experts take everything. Of a batch's load it is their MaxVio_batch, of the load of all evaluated text
    MaxVio_global."""
    return load_E.max(-1) / load_E.mean(-1) - 1.0


def saturation(
    early_NC: Int[HostOrDevice, "*N C"],
    late_NC: Int[HostOrDevice, "*N C"],
    num_experts: int,
    valid_N: Bool[HostOrDevice, "*N"] | None = None,
) -> Float[Array, ""]:
    """The fraction of the choices of one checkpoint that another makes too, for the same tokens (OLMoE, Muennighoff et
    al. 2024, sec. 5.1). Choices with index `num_experts` are none. 0 to 1; chance gives k / E."""
    real_NC = late_NC < num_experts
    if valid_N is not None:
        real_NC &= valid_N[..., None]
    same_NC = (late_NC[..., :, None] == early_NC[..., None, :]).any(-1) & real_NC
    return same_NC.sum() / jnp.maximum(real_NC.sum(), 1)


def co_activation(
    indices_NC: Int[HostOrDevice, "*N C"], num_experts: int, valid_N: Bool[HostOrDevice, "*N"] | None = None
) -> Float[Array, "E E"]:
    """P(j | i): of the tokens that chose expert i, the part that chose j too (OLMoE, sec. 5.2). The diagonal is 1, and
    0 like all its row for an expert that none chose."""
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
    """bias + rate * sign(mean load - load) (Wang et al. 2024, algorithm 1): overloaded experts look worse from the next
    step on."""
    return bias_E + rate * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)


def update_biases(model: Transformer, load_LE: Float[Array, "L E"], config: MoEConfig) -> Transformer:
    """`model` with every MoE layer's `router_bias` moved by `config.bias_rate`; the model itself where there is none or
    0.

    `load_LE`: the loads of the MoE layers in their order, of the whole batch (`forward`'s router.load_E, averaged over
    microbatches by their targets). Called in the train step after the optimizer, which leaves these biases alone
    (train/optimizers.py).
    """
    rate = config.bias_rate
    if not rate:
        return model
    first = 0
    loads: dict[tuple[int, int], Array] = {}  # by stack and place in the unit: a stack runs unit by unit
    for s, unit in enumerate(model.stacks):
        biased = [i for i, block in enumerate(unit) if getattr(block.mlp, "router_bias", None) is not None]
        layers = len(biased) * repeats(unit)
        of_stack = load_LE[first : first + layers].reshape(-1, max(len(biased), 1), load_LE.shape[-1])
        loads |= {(s, i): of_stack[:, m] for m, i in enumerate(biased)}
        first += layers

    def moved(path: str, weight: Weight) -> Weight:
        if weight.name != "mlp.router_bias":
            return weight
        _, stack, place, *_ = path.split(".")
        return replace(weight, value=update_bias(weight.value, loads[int(stack), int(place)], rate))

    return map_named_weights(moved, model)
