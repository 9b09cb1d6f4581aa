"""Mixture of experts: a layer of router, chosen experts and shared experts.

Shapes: B batch, T time, D width, E experts, C choices of a token, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

import math
from dataclasses import replace
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
from model.dispatch import DOWN, DOWN_BIAS, UP, UP_BIAS, run_experts
from model.experts import Biases
from model.mlp import MLP, gates
from model.moe_config import WITHOUT_LOGITS
from model.routers import noisy_input, route
from model.soft import soft_moe
from model.weights import constant, matmul, normal, use
from sharding.rules import ShardingRules, no_mesh


class Tokens(NamedTuple):
    """What routers know of the tokens beside their hidden states."""

    ids_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]  # in their document
    valid_BT: Bool[Array, "B T"]  # False: padding
    cached: bool = False  # these continue a cache: the sequence is not here as a whole


class MoE(nnx.Module):
    """Every token goes to the experts that its router chooses, and to the shared ones."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules):
        assert config.moe is not None
        self.config, self.rules = config, rules
        D, E, F, G = config.embed_dim, config.moe.num_experts, config.moe.hidden_dim, gates(config.mlp.kind)
        keys = jax.random.split(key, 3)
        # Soft: a logit for each of an expert's slots.
        logits = E * config.moe.top_k if config.moe.router == "soft" else E
        learned = config.moe.router not in WITHOUT_LOGITS
        self.router = normal(keys[0], (D, logits), ("embed", None), D**-0.5, rules) if learned else None
        self.up = normal(keys[1], (E, D, G, F), UP, weight_std(config, D), rules)
        self.down = normal(keys[2], (E, F, D), DOWN, weight_std(config, F, residual=True), rules)
        biased = config.mlp.bias
        self.up_bias = constant((E, G, F), UP_BIAS, 0.0, rules) if biased else None
        self.down_bias = constant((E, D), DOWN_BIAS, 0.0, rules) if biased else None
        # Of the linear map to the logits; beside it there may be a bias that only moves the choice:
        self.router_logit_bias = constant((logits,), (None,), 0.0, rules) if biased and learned else None
        # Moved by the train step, never by a gradient (model/balance.py).
        self.router_bias = constant((E,), (None,), 0.0, rules) if config.moe.bias_rate is not None else None
        noisy = config.moe.router == "noisy_top_k"
        self.router_noise = constant((D, E), ("embed", None), 0.0, rules) if noisy else None
        shared = config.moe.shared_experts * F
        self.shared = MLP(jax.random.fold_in(key, 3), config, rules, shared) if shared else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], tokens: Tokens, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """`key`: given in training alone, for what is random in the router. With `tokens.cached` no choice is
        dropped."""
        config, rules, dtype = self.config, self.rules, x_BTD.dtype
        assert config.moe is not None
        if tokens.cached and config.moe.capacity_factor is not None:
            # A capacity is for whole sequences. Prompts of any padding and single tokens are decoded without drops.
            config = replace(config, moe=replace(config.moe, capacity_factor=None, dispatch="sort"))
        moe = config.moe
        assert moe is not None
        input_key, route_key = (None, None) if key is None else jax.random.split(key)
        logits_BTE, noise_BTE = self._logits(x_BTD, input_key)
        up = self.up[...].astype(dtype)
        down = self.down[...].astype(dtype)
        biases = None
        if self.up_bias is not None and self.down_bias is not None:
            biases = Biases(self.up_bias[...].astype(dtype), self.down_bias[...].astype(dtype))
        if moe.router == "soft":
            assert logits_BTE is not None
            out_BTD, routing = soft_moe(x_BTD, logits_BTE, tokens.valid_BT, up, down, config, rules, biases)
            kept_BTC = routing.indices_BTC
        else:
            bias_E = None if self.router_bias is None else use(self.router_bias, (None,), jnp.float32, rules)
            routing = route(
                logits_BTE, tokens.valid_BT, moe, bias_E=bias_E, noise_BTE=noise_BTE,
                ids_BT=tokens.ids_BT, positions_BT=tokens.positions_BT, key=route_key,
            )  # fmt: skip
            kept_BTC, place_BTC = routing.indices_BTC, None
            if moe.bounded:
                kept_BTC, place_BTC = places(routing.indices_BTC, moe.num_experts, moe.capacity(x_BTD.shape[1]))
            out_BTD = run_experts(x_BTD, kept_BTC, routing.weights_BTC, place_BTC, up, down, config, rules, biases)
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)
        stats = router_stats(routing, kept_BTC, tokens.valid_BT, moe, _batch_slices(rules))
        return checkpoint_name(out_BTD, "mlp_out"), stats

    def _logits(self, x_BTD: Array, key: PRNGKeyArray | None) -> tuple[Array | None, Array | None]:
        """Router logits and what noisy_top_k's noise is scaled by, in router_dtype; None where there is none."""
        moe = self.config.moe
        assert moe is not None
        if self.router is None:
            return None, None
        dtype = jnp.dtype(moe.router_dtype)
        x_BTD = noisy_input(x_BTD.astype(dtype), moe, key)

        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

        def times(weight: nnx.Param) -> Array:
            w = use(weight, ("embed", None), dtype, self.rules)
            return matmul(x_BTD, w, 1, ("batch", "sequence", None), self.rules, precision)

        logits_BTE = times(self.router)
        if self.router_logit_bias is not None:
            logits_BTE = logits_BTE + use(self.router_logit_bias, (None,), dtype, self.rules)
        return logits_BTE, None if self.router_noise is None or key is None else times(self.router_noise)


def _batch_slices(rules: ShardingRules) -> int:
    """How many slices of rows the mesh makes of a batch."""
    if no_mesh():
        return 1
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in rules.activations.batch)
