"""Mixture of experts: a layer of router, chosen experts and shared experts.

Shapes: B batch, T time, D width, E experts, C choices of a token, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from model.attention import weight_std
from model.balance import RouterStats, router_stats
from model.capacity import places
from model.config import ModelConfig
from model.dispatch import run_experts
from model.mlp import MLP, gates
from model.routers import route
from model.weights import constant, matmul, normal, use
from sharding.rules import ShardingRules


class Tokens(NamedTuple):
    """What routers know of the tokens beside their hidden states."""

    ids_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]  # in their document
    valid_BT: Bool[Array, "B T"]  # False: padding


class MoE(nnx.Module):
    """Every token goes to the experts that its router chooses, and to the shared ones."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules):
        assert config.moe is not None
        self.config, self.rules = config, rules
        D, E, F, G = config.embed_dim, config.moe.num_experts, config.moe.hidden_dim, gates(config.mlp.kind)
        keys = jax.random.split(key, 3)
        self.router = normal(keys[0], (D, E), ("embed", None), D**-0.5, rules)
        self.up = normal(keys[1], (E, D, G, F), ("expert", "embed", None, "mlp"), weight_std(config, D), rules)
        self.down = normal(keys[2], (E, F, D), ("expert", "mlp", "embed"), weight_std(config, F, residual=True), rules)
        # Moved by the train step, never by a gradient (model/balance.py).
        self.router_bias = constant((E,), (None,), 0.0, rules) if config.moe.bias_rate is not None else None
        noisy = config.moe.router == "noisy_top_k"
        self.router_noise = constant((D, E), ("embed", None), 0.0, rules) if noisy else None
        shared = config.moe.shared_experts * F
        self.shared = MLP(jax.random.fold_in(key, 3), config, rules, shared) if shared else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """`key`: given in training alone, for what is random in the router."""
        moe, rules, dtype = self.config.moe, self.rules, x_BTD.dtype
        assert moe is not None
        router_dtype = jnp.dtype(moe.router_dtype)
        router = use(self.router, ("embed", None), router_dtype, rules)
        logits_BTE = matmul(x_BTD.astype(router_dtype), router, 1, ("batch", "sequence", None), rules)
        routing = route(
            logits_BTE, tokens.valid_BT, moe, ids_BT=tokens.ids_BT, positions_BT=tokens.positions_BT, key=key
        )
        kept_BTC, place_BTC = routing.indices_BTC, None
        if moe.capacity_factor is not None:
            capacity = moe.capacity(x_BTD.shape[1])
            kept_BTC, place_BTC = places(routing.indices_BTC, moe.num_experts, capacity)
        up = use(self.up, ("expert", "embed", None, "mlp"), dtype, rules)
        down = use(self.down, ("expert", "mlp", "embed"), dtype, rules)
        out_BTD = run_experts(x_BTD, kept_BTC, routing.weights_BTC, place_BTC, up, down, self.config, rules)
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)
        stats = router_stats(routing, kept_BTC, tokens.valid_BT, moe)
        return checkpoint_name(out_BTD, "mlp_out"), stats
