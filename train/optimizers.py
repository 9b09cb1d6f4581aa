"""Optimizers and schedules, composed from optax according to `OptimizerConfig`.

The pytree of parameters is the network itself, or its trained part. The role of a weight (model/weights.py) decides how
it is treated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from model.config import ModelConfig
from model.weights import Weight, is_weight, map_weights
from sharding.rules import no_mesh
from train.config import OptimizerConfig
from train.hyper import Hyper


def schedule(config: OptimizerConfig, steps: int, hyper: Hyper | None = None) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates.

    It rises linearly to the peak, and then follows the configured decay over the rest of `steps`. The peak is that of
    `hyper`, which may be traced, or that of the config.
    """
    peak = config.learning_rate if hyper is None else hyper.learning_rate
    final, warmup = peak * config.final_fraction, config.warmup_steps
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


def applied_updates(state: optax.OptState) -> jax.Array:
    """Return the number of updates that an optimizer of `make_optimizer` has applied, from its schedule's counter."""
    schedules = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
    return next(x.count for x in schedules if isinstance(x, optax.ScaleByScheduleState))


def make_optimizer(
    config: OptimizerConfig, model: ModelConfig, steps: int, hyper: Hyper | None = None
) -> optax.GradientTransformation:
    """Return the chain of clipping, the optimizer with its schedule and decay mask, and muP's learning rates.

    `hyper`: peak learning rate and weight decay, which may be traced, in place of the config's. The optimizer state
    does not depend on them.

    Under muP (Yang et al. 2022, table 8, Adam-like optimizers), matrices inside the network learn at mup_base_dim /
    embed_dim times the learning rate; embeddings, norms, biases and the head learn at the full rate. The optimizer does
    not update or decay router biases, because the train step updates them (model/balance.py).
    """

    def decayed(params):
        return map_weights(lambda w: config.decay == "all" or w.role not in ("vector", "buffer"), params)

    rate = schedule(config, steps, hyper)
    weight_decay = config.weight_decay if hyper is None else hyper.weight_decay
    if config.name == "adamw":
        inner = optax.adamw(rate, *config.betas, config.epsilon, weight_decay=weight_decay, mask=decayed)
    elif config.name == "lion":  # Chen et al. 2023
        inner = optax.lion(rate, *config.betas, weight_decay=weight_decay, mask=decayed)
    elif config.name == "adafactor":  # Shazeer & Stern 2018; decoupled decay, scaled by the rate as in AdamW
        inner = optax.chain(
            optax.adafactor(1.0, multiply_by_parameter_scale=False, clipping_threshold=1.0),
            optax.add_decayed_weights(-weight_decay, decayed),
            optax.scale_by_schedule(rate),
        )
    else:  # Jordan et al. 2024; embeddings, head, norms and biases learn by Adam
        directions = optax.contrib.muon(
            1.0,
            beta=0.95,
            eps=config.epsilon,
            adam_b1=config.betas[0],
            adam_b2=config.betas[1],
            muon_weight_dimension_numbers=lambda params: map_weights(_muon_dimensions, params),
            consistent_rms=0.2,  # updates as large as Adam's, so that one rate suits both (Liu et al. 2025, sec. 2.2)
        )
        # Decay is applied here because the mask of optax's Muon does not cover the weights that Adam updates.
        inner = optax.chain(
            _partitioned_by_compiler(directions),
            optax.add_decayed_weights(-weight_decay, decayed),
            optax.scale_by_schedule(rate),
        )
    parts = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    parts.append(inner)
    if model.mup_base_dim is not None:
        ratio = model.mup_base_dim / model.embed_dim
        parts.append(_scaled_by_weight(lambda w: ratio if w.role in ("matrix", "router") else 1.0))
    if model.moe is not None and model.moe.bias_rate is not None:
        parts.append(_scaled_by_weight(lambda w: 0.0 if w.role == "buffer" else 1.0))
    return optax.chain(*parts)


def _scaled_by_weight(factor: Callable[[Weight], float]) -> optax.GradientTransformation:
    """Return a transformation that multiplies the update of each weight by its `factor`."""

    def scaled(weight: Weight) -> Weight:
        by = factor(weight)
        if by == 1.0:
            return weight
        return jax.tree.map(jnp.zeros_like if by == 0.0 else lambda u: u * by, weight)

    return optax.stateless(lambda updates, _: map_weights(scaled, updates))


def _muon_dims(weight: Weight) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the (input, output) dimensions of the matrices that Muon orthogonalizes; None if Adam updates the weight,
    where optax puts a marker in place of the value."""
    return weight.matrix_dims() if weight.role == "matrix" and hasattr(weight.value, "ndim") else None


def _muon_dimensions(weight: Weight) -> Weight:
    """Return the matrix dimensions of a weight that Muon updates, and None for others, in the weight's tree."""
    dims = _muon_dims(weight)
    numbers = None if dims is None else optax.contrib.MuonDimensionNumbers(*dims)
    return jax.tree.map(lambda x: numbers if x is weight.value else None, weight)


def _with_whole_matrices(weight: Weight) -> Weight:
    """Return a gradient, or its average, with its matrices divided over the devices, rather than split or repeated.

    Each mesh axis moves to a dimension that counts matrices (layers, experts); it stays where it is if it divides none.
    """
    dims = _muon_dims(weight)
    if dims is None:
        return weight
    shape, mesh = weight.value.shape, jax.typeof(weight.value).sharding.mesh
    spec = [p if isinstance(p, tuple) else () if p is None else (p,) for p in jax.typeof(weight.value).sharding.spec]
    for axis, size in mesh.shape.items():
        counts = [d for d in range(len(shape)) if d not in (*dims[0], *dims[1])]
        if size == 1 or any(axis in spec[d] for d in counts):
            continue
        for d in counts:
            if shape[d] % (math.prod(mesh.shape[a] for a in spec[d]) * size) == 0:
                spec = [tuple(a for a in part if a != axis) for part in spec]
                spec[d] = (*spec[d], axis)
                break
    return replace(weight, value=jax.sharding.reshard(weight.value, PartitionSpec(*spec)))


def _partitioned_by_compiler(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return `inner` run with automatic mesh axes, with the shardings of its outputs equal to those of its inputs.

    optax's Newton-Schulz iterations do not specify the sharding of their matrix products, as explicit axes require.
    Each device computes those of some layers and experts, where the mesh divides their numbers.
    """

    def update(grads, state, params=None):
        if no_mesh():
            return inner.update(grads, state, params)
        shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (grads, state))
        whole = lambda x: _with_whole_matrices(x) if is_weight(x) else x  # the state has other leaves, too
        grads, state = map_weights(whole, (grads, state))
        return jax.sharding.auto_axes(inner.update, out_sharding=shardings)(grads, state, params)

    return optax.GradientTransformation(inner.init, update)
