"""Mixture of experts: a top-k router, its balancing losses and statistics, and dropless dispatch over the mesh.

Shapes: B batch, T time, D width, E experts, C = top_k choices, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from model.attention import weight_std
from model.config import ModelConfig, MoEConfig
from model.experts import expert_mlp
from model.mlp import gates
from model.weights import matmul, normal, use
from sharding.manual import vary, varying_axes
from sharding.rules import ShardingRules, no_mesh, reshard


class RouterStats(NamedTuple):
    """What a router did with the tokens of a batch, padding left out. Losses carry gradients; the load does not."""

    load_balance: Float[Array, ""]  # 1 at perfect balance, E / C when C experts take everything
    z: Float[Array, ""]  # mean of logsumexp(logits)^2
    load_E: Float[Array, "E"]  # fraction of the choices that each expert got; sums to 1
    entropy: Float[Array, ""]  # mean entropy of the routing distribution, nats


def route(
    logits_BTE: Float[Array, "B T E"], valid_BT: Bool[Array, "B T"], config: MoEConfig
) -> tuple[Int[Array, "B T C"], Float[Array, "B T C"], RouterStats]:
    """Chosen experts, their weights (float32) and statistics; softmax, then top-k (Shazeer et al. 2017, sec. 2.1).

    Load balance: E * sum_e f_e P_e (Fedus et al. 2021, eq. 4) with f_e the fraction of choices and P_e the mean
    probability, over the batch or averaged over its sequences by their tokens. z: Zoph et al. 2022, eq. 5.
    A token whose logits are not finite gets weights that are not finite, so that the loss shows it.
    """
    E = config.num_experts
    logits_BTE = logits_BTE.astype(jnp.float32)
    log_total_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    probs_BTE = jnp.exp(logits_BTE - log_total_BT[..., None])
    weights_BTC, indices_BTC = jax.lax.top_k(probs_BTE, config.top_k)
    if config.renormalize:
        weights_BTC = weights_BTC / weights_BTC.sum(-1, keepdims=True)
    # top_k may rank NaN below every number and so drop it: a token with a bad logit is marked by hand.
    weights_BTC = jnp.where(jnp.isfinite(logits_BTE).all(-1, keepdims=True), weights_BTC, jnp.nan)

    valid = valid_BT.astype(jnp.float32)
    chosen_BTE = jax.nn.one_hot(indices_BTC, E, dtype=jnp.float32).sum(-2) * valid[..., None] / config.top_k
    chosen_BTE = jax.lax.stop_gradient(chosen_BTE)
    count = jnp.maximum(valid.sum(), 1.0)
    load_E = chosen_BTE.sum((0, 1)) / count
    if config.balance_scope == "batch":
        balance = E * (load_E * (probs_BTE * valid[..., None]).sum((0, 1)) / count).sum()
    else:
        count_B = valid.sum(1)
        f_BE, p_BE = chosen_BTE.sum(1), (probs_BTE * valid[..., None]).sum(1)
        balance = E * ((f_BE * p_BE).sum(-1) / jnp.maximum(count_B, 1.0)).sum() / count
    z = (jnp.square(log_total_BT) * valid).sum() / count
    entropy = ((log_total_BT - (probs_BTE * logits_BTE).sum(-1)) * valid).sum() / count
    return indices_BTC, weights_BTC, RouterStats(balance, z, load_E, jax.lax.stop_gradient(entropy))


class MoE(nnx.Module):
    """Every token goes to its top-k experts; nothing is dropped."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules):
        assert config.moe is not None
        self.config, self.rules = config, rules
        D, E, F, G = config.embed_dim, config.moe.num_experts, config.moe.hidden_dim, gates(config.mlp.kind)
        keys = jax.random.split(key, 3)
        self.router = normal(keys[0], (D, E), ("embed", None), D**-0.5, rules)
        self.up = normal(keys[1], (E, D, G, F), ("expert", "embed", None, "mlp"), weight_std(config, D), rules)
        self.down = normal(keys[2], (E, F, D), ("expert", "mlp", "embed"), weight_std(config, F, residual=True), rules)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], valid_BT: Bool[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        moe, rules, dtype = self.config.moe, self.rules, x_BTD.dtype
        assert moe is not None
        router = use(self.router, ("embed", None), jnp.float32, rules)
        logits_BTE = matmul(x_BTD.astype(jnp.float32), router, 1, ("batch", "sequence", None), rules)
        indices_BTC, weights_BTC, stats = route(logits_BTE, valid_BT, moe)
        up = use(self.up, ("expert", "embed", None, "mlp"), dtype, rules)
        down = use(self.down, ("expert", "mlp", "embed"), dtype, rules)
        out_BTD = _dispatch(x_BTD, indices_BTC, weights_BTC, up, down, self.config.mlp.kind, rules)
        return checkpoint_name(out_BTD, "mlp_out"), stats


def _dispatch(x_BTD, indices_BTC, weights_BTC, up, down, kind: str, rules: ShardingRules) -> Array:
    """Runs the experts where they are: tokens are gathered over the devices that share a batch slice's experts, each
    device computes the pairs of its own experts (and its own columns of them), and the sums return to the tokens' owners.
    """
    D, C = x_BTD.shape[-1], indices_BTC.shape[-1]
    if no_mesh():
        x_ND, indices_NC, weights_NC = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, indices_BTC, weights_BTC))
        return expert_mlp(x_ND, indices_NC, weights_NC, up, down, kind).reshape(x_BTD.shape)

    activations = rules.activations
    expert_axes, mlp_axes = activations.expert, activations.mlp
    gathered = tuple(a for a in expert_axes if a in activations.batch)  # experts spread over devices with other tokens

    def local(x, indices, weights, up, down):
        first = jax.lax.axis_index(expert_axes) * up.shape[0] if expert_axes else 0
        if gathered:
            x, indices, weights = (jax.lax.all_gather(y, gathered, axis=0, tiled=True) for y in (x, indices, weights))
        # Weights are used by tokens that differ between devices: said here, so that their gradients are summed over them.
        axes = varying_axes(x) | varying_axes(up)
        x, indices, weights, up, down = (vary(y, axes) for y in (x, indices, weights, up, down))
        y = expert_mlp(x.reshape(-1, D), indices.reshape(-1, C) - first, weights.reshape(-1, C), up, down, kind)
        y = y.reshape(x.shape)
        if gathered:
            y = jax.lax.psum_scatter(y, gathered, scatter_dimension=0, tiled=True)
        rest = mlp_axes + tuple(a for a in expert_axes if a not in gathered)
        return jax.lax.psum(y, rest) if rest else y

    token_spec = rules.spec("activations", ("batch", "sequence", None))
    return jax.shard_map(
        local,
        in_specs=(
            token_spec,
            token_spec,
            token_spec,
            rules.spec("activations", ("expert", None, None, "mlp")),
            rules.spec("activations", ("expert", "mlp", None)),
        ),
        out_specs=token_spec,
    )(reshard(x_BTD, rules, "batch", "sequence", None), indices_BTC, weights_BTC, up, down)
