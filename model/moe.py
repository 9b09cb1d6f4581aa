"""Mixture of experts: a layer with a router, routed experts and shared experts.

Shapes: B batch, T time, D width, E experts, C choices of a token, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from model.balance import RouterStats, router_stats
from model.capacity import positions_in_experts
from model.config import ModelConfig
from model.context import ForwardContext
from model.dispatch import DOWN, DOWN_BIAS, UP, UP_BIAS, ExpertWeights, run_experts
from model.mlp import MLP, gates
from model.moe_config import WITHOUT_LOGITS
from model.routers import noisy_input, route
from model.soft import soft_moe
from model.weights import Axes, Role, constant, normal, weight_std
from sharding.rules import ShardingRules


class MoE(nnx.Module):
    """A layer that sends each token to the experts that the router chooses, and to the shared experts."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules):
        assert config.moe is not None
        self.config, self.rules = config, rules
        moe = config.moe
        D, E, F, G = config.embed_dim, moe.num_experts, moe.hidden_dim, gates(config.mlp.kind)
        keys = jax.random.split(key, 3)
        up_std, down_std = weight_std(config, D), weight_std(config, F, residual=True)
        self.up = normal(keys[1], (E, D, G, F), UP, up_std, rules, name="mlp.up")
        self.down = normal(keys[2], (E, F, D), DOWN, down_std, rules, name="mlp.down")

        def zeros(name: str, shape: tuple[int, ...], axes: Axes, role: Role, wanted: bool, inputs: int = 0):
            made = lambda: constant(shape, axes, 0.0, rules, name=f"mlp.{name}", role=role, inputs=inputs)
            return made() if wanted else None

        biased, learned = config.mlp.bias, moe.router not in WITHOUT_LOGITS
        self.up_bias = zeros("up_bias", (E, G, F), UP_BIAS, "vector", biased)
        self.down_bias = zeros("down_bias", (E, D), DOWN_BIAS, "vector", biased)
        # The soft router has one logit for each slot of each expert.
        logits = E * moe.top_k if moe.router == "soft" else E
        router_axes: Axes = ("embed", None)
        self.router = (
            normal(keys[0], (D, logits), router_axes, D**-0.5, rules, name="mlp.router", role="router")
            if learned
            else None
        )
        # The bias of the projection to logits. `router_bias`, in contrast, only affects the choice; the train step
        # updates it without a gradient (model/balance.py).
        self.router_logit_bias = zeros("router_logit_bias", (logits,), (None,), "vector", biased and learned)
        self.router_bias = zeros("router_bias", (E,), (None,), "buffer", moe.bias_rate is not None)
        noisy = moe.router == "noisy_top_k"
        self.router_noise = zeros("router_noise", (D, E), router_axes, "router", noisy, inputs=1)
        shared = moe.shared_experts * F
        self.shared = MLP(jax.random.fold_in(key, 3), config, rules, shared, "shared") if shared else None

    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: ForwardContext, key: PRNGKeyArray | None = None
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return (output, router statistics). `key`: for the router's random draws, in training only. Decoding drops no
        choice."""
        config, rules = self.config, self.rules
        assert config.moe is not None
        if ctx.decoding and config.moe.capacity_factor is not None:
            # A capacity applies to whole sequences. Padded prompts and single tokens are decoded without drops.
            config = replace(config, moe=replace(config.moe, capacity_factor=None, dispatch="sort"))
        moe = config.moe
        assert moe is not None
        input_key, route_key = (None, None) if key is None else jax.random.split(key)
        logits_BTE, noise_BTE = self._logits(x_BTD, input_key)
        experts = ExpertWeights(self.up, self.down, self.up_bias, self.down_bias)
        if moe.router == "soft":
            assert logits_BTE is not None
            out_BTD, routing = soft_moe(x_BTD, logits_BTE, ctx.valid_BT, experts, config, rules)
            kept_BTC = routing.indices_BTC
        else:
            bias_E = None if self.router_bias is None else self.router_bias.gathered(jnp.float32)
            routing = route(
                logits_BTE, ctx.valid_BT, moe, bias_E=bias_E, noise_BTE=noise_BTE,
                ids_BT=ctx.token_ids_BT, positions_BT=ctx.positions_BT, key=route_key,
            )  # fmt: skip
            kept_BTC, position_BTC = routing.indices_BTC, None
            if moe.bounded:
                capacity = moe.capacity(x_BTD.shape[1])
                kept_BTC, position_BTC = positions_in_experts(routing.indices_BTC, moe.num_experts, capacity)
            out_BTD = run_experts(x_BTD, kept_BTC, routing.weights_BTC, position_BTC, experts, config, rules)
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)
        stats = router_stats(routing, kept_BTC, ctx.valid_BT, moe, rules.batch_slices())
        return checkpoint_name(out_BTD, "mlp_out"), stats

    def _logits(self, x_BTD: Array, key: PRNGKeyArray | None) -> tuple[Array | None, Array | None]:
        """Return (router logits, the scale of noisy_top_k's noise before softplus) in router_dtype; None for either if
        the router does not use it."""
        moe = self.config.moe
        assert moe is not None
        if self.router is None:
            return None, None
        dtype = jnp.dtype(moe.router_dtype)
        x_BTD = noisy_input(x_BTD.astype(dtype), moe, key)

        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        axes = ("batch", "sequence")
        logits_BTE = self.router.dot(x_BTD, axes, precision)
        if self.router_logit_bias is not None:
            logits_BTE = logits_BTE + self.router_logit_bias.gathered(dtype)
        if self.router_noise is None or key is None:
            return logits_BTE, None
        return logits_BTE, self.router_noise.dot(x_BTD, axes, precision)
