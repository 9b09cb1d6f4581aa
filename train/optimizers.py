"""Optimizers and schedules: optax's, put together from `OptimizerConfig`.

The pytree of parameters is the model itself (a Flax NNX module used as a plain pytree).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr, tree_map_with_path

from model.config import ModelConfig
from sharding.rules import no_mesh
from train.config import OptimizerConfig

# Trailing dimensions of each matrix: (inputs, outputs); what stands before them is stacked matrices.
MATRIX_DIMS = {
    "attention/q": (1, 2), "attention/k": (1, 2), "attention/v": (1, 2), "attention/out": (2, 1),
    "attention/q_down": (1, 1), "attention/kv_down": (1, 1), "attention/k_up": (1, 2), "attention/v_up": (1, 2),
    "mlp/up": (1, 2), "mlp/down": (1, 1), "shared/up": (1, 2), "shared/down": (1, 1), "mlp/router": (1, 1),
    "mlp/router_noise": (1, 1), "embedding": (1, 1), "positions": (1, 1), "head": (1, 1),
}  # fmt: skip


def parameter_name(path) -> str:
    """'stacks/0/1/attention/q' for the key path of a parameter in the model's pytree."""
    return keystr(path, simple=True, separator="/").removesuffix("/value")


def matrix_kind(path) -> str | None:
    """The key of MATRIX_DIMS a parameter belongs to; None for norm scales, biases and sinks."""
    name = parameter_name(path)
    last = "/".join(name.split("/")[-2:]) if "/" in name else name
    return last if last in MATRIX_DIMS else None


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to the peak, then the configured fall over the rest of `steps`."""
    peak, final, warmup = config.learning_rate, config.learning_rate * config.final_fraction, config.warmup_steps
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif config.schedule == "wsd":  # warm-up, stable, decay (Hu et al. 2024)
        fall = max(int(rest * config.decay_fraction), 1)
        after = optax.linear_schedule(peak, final, fall, transition_begin=rest - fall)
    elif config.schedule == "exponential":
        after = optax.exponential_decay(peak, rest, max(config.final_fraction, 1e-8))
    elif config.schedule == "inverse_sqrt":  # continuous with the warm-up (Vaswani et al. 2017, eq. 3)
        start = max(warmup, 1)

        def after(step):
            return peak * (start / (jnp.maximum(step, 0) + start)) ** 0.5

    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(config: OptimizerConfig, model: ModelConfig, steps: int) -> optax.GradientTransformation:
    """Clipping, then the optimizer with its schedule and decay mask, then muP's learning rates.

    Under muP (Yang et al. 2022, table 8; Adam-like optimizers) matrices inside the network learn at
    mup_base_dim / embed_dim times the rate; embeddings, norms, biases and the head at the rate itself.
    Biases of routers are left as they are, by decay too: the train step moves them (model/balance.py).
    """

    def decayed(params):
        return tree_map_with_path(lambda path, _: config.decay == "all" or matrix_kind(path) is not None, params)

    rate = schedule(config, steps)
    if config.name == "adamw":
        inner = optax.adamw(rate, *config.betas, config.epsilon, weight_decay=config.weight_decay, mask=decayed)
    elif config.name == "lion":  # Chen et al. 2023
        inner = optax.lion(rate, *config.betas, weight_decay=config.weight_decay, mask=decayed)
    elif config.name == "adafactor":  # Shazeer & Stern 2018; decoupled decay, scaled by the rate as AdamW's is
        inner = optax.chain(
            optax.adafactor(1.0, multiply_by_parameter_scale=False, clipping_threshold=1.0),
            optax.add_decayed_weights(-config.weight_decay, decayed),
            optax.scale_by_schedule(rate),
        )
    else:  # Jordan et al. 2024; embeddings, head, norms and biases learn by Adam
        directions = optax.contrib.muon(
            1.0,
            beta=0.95,
            eps=config.epsilon,
            adam_b1=config.betas[0],
            adam_b2=config.betas[1],
            muon_weight_dimension_numbers=lambda params: tree_map_with_path(_muon_dimensions, params),
            consistent_rms=0.2,  # updates as large as Adam's (Liu et al. 2025, sec. 2.2): one rate serves both
        )
        # Decay stands here because the mask of optax's Muon does not reach the weights that it leaves to Adam.
        inner = optax.chain(
            _partitioned_by_compiler(directions),
            optax.add_decayed_weights(-config.weight_decay, decayed),
            optax.scale_by_schedule(rate),
        )
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(inner)
    if model.mup_base_dim is not None:
        ratio = model.mup_base_dim / model.embed_dim
        parts.append(
            optax.stateless(lambda updates, _: tree_map_with_path(lambda p, u: u * _mup_rate(p, ratio), updates))
        )
    if model.moe is not None and model.moe.bias_rate is not None:
        parts.append(optax.stateless(lambda updates, _: tree_map_with_path(_without_router_bias, updates)))
    return optax.chain(*parts)


def _without_router_bias(path, update: jax.Array) -> jax.Array:
    return jnp.zeros_like(update) if parameter_name(path).endswith("/router_bias") else update


def _mup_rate(path, ratio: float) -> float:
    kind = matrix_kind(path)
    return ratio if kind is not None and "/" in kind else 1.0


def _muon_dimensions(path, weight: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    kind = matrix_kind(path)
    if kind is None or "/" not in kind or kind in ("mlp/router", "mlp/router_noise"):
        return None
    inputs, outputs = MATRIX_DIMS[kind]
    if kind in ("mlp/up", "shared/up"):  # gate and up are two matrices: [..., D, G, F]
        return optax.contrib.MuonDimensionNumbers(weight.ndim - 3, weight.ndim - 1)
    first_out = weight.ndim - outputs
    return optax.contrib.MuonDimensionNumbers(
        tuple(range(first_out - inputs, first_out)), tuple(range(first_out, weight.ndim))
    )


def _partitioned_by_compiler(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` under a mesh with automatic axes, for optax's Newton-Schulz iterations do not say how products of sharded
    matrices are laid out. What comes out keeps the shardings of what went in."""

    def update(grads, state, params=None):
        if no_mesh():
            return inner.update(grads, state, params)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state))
        return jax.sharding.auto_axes(inner.update, out_sharding=shardings)(grads, state, params)

    return optax.GradientTransformation(inner.init, update)
