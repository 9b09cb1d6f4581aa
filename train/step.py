"""The train step: one pure function of the state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from model.balance import update_biases
from model.transformer import Transformer, compute_dtype
from train.config import TrainConfig
from train.objectives import Batch, Loss, Objective

SMALLEST_LOSS_SCALE = 2.0**-24  # below 1, since gradients are of a sum over tokens
LOSS_SCALE_GROWTH_STEPS = 2000  # finite steps after which a float16 loss scale doubles (Micikevicius et al. 2018)


class TrainState(NamedTuple):
    """All that the next step depends on, but for the batch."""

    step: Int[Array, ""]  # updates tried so far
    key: PRNGKeyArray  # folded with the step for dropout and objectives
    model: Transformer
    optimizer: optax.OptState
    ema: Transformer | None
    loss_scale: Float[Array, ""]  # 1 but for float16
    finite_steps: Int[Array, ""]  # since the loss scale last changed
    nonfinite: Int[Array, ""]  # updates refused, a float16 overflow left out


def init_state(
    key: PRNGKeyArray, model: Transformer, optimizer: optax.GradientTransformation, config: TrainConfig
) -> TrainState:
    """The state before the first step. Under an explicit mesh everything takes its parameter's sharding."""
    scale = 2.0**15 if compute_dtype(model.config) == jnp.float16 else 1.0
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, model)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, key, model, optimizer.init(model), ema, jnp.float32(scale), zero, zero)


def weights_alone(model: Transformer) -> TrainState:
    """A state to evaluate and to sample from: there is no optimizer."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, jax.random.key(0), model, optax.EmptyState(), None, jnp.float32(1.0), zero, zero)


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, rate: optax.Schedule, config: TrainConfig
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted with the state donated.

    A gradient that is not finite changes nothing but the counters: the last good weights are never overwritten. With
    config.nonfinite == 'stop' neither does any later step, so that the state can still be saved as it was.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        moe = state.model.config.moe
        key = jax.random.fold_in(state.key, state.step)
        loss, grads = summed_gradients(objective, state.model, batch, key, config.microbatches, state.loss_scale)
        count = jnp.maximum(loss.count, 1.0)
        grads = jax.tree.map(lambda g: g / (count * state.loss_scale), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)
        halted = (state.nonfinite > 0) & (config.nonfinite == "stop")

        def update():
            updates, opt_state = optimizer.update(grads, state.optimizer, state.model)
            model = optax.apply_updates(state.model, updates)
            if moe is not None and moe.bias_rate is not None:
                model = update_biases(model, loss.metrics["expert_load"], moe)
            ema = state.ema
            if ema is not None:
                ema = optax.incremental_update(model, ema, 1.0 - config.ema_decay)
            return model, opt_state, ema

        def keep():
            return state.model, state.optimizer, state.ema

        model, opt_state, ema = jax.lax.cond(finite & ~halted, update, keep)
        scale, finite_steps, overflow = next_loss_scale(state, finite)
        nonfinite = state.nonfinite + (~finite & ~overflow).astype(jnp.int32)
        metrics = loss.metrics | {
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate(state.step), jnp.float32),
            "tokens": (batch["segment_ids"][:, 1:] > 0).sum().astype(jnp.float32),
            "loss_scale": state.loss_scale,
            "nonfinite": nonfinite,
        }
        return TrainState(state.step + 1, state.key, model, opt_state, ema, scale, finite_steps, nonfinite), metrics

    return step


def summed_gradients(
    objective: Objective, model: Transformer, batch: Batch, key: PRNGKeyArray, microbatches: int, scale: Array
) -> tuple[Loss, Transformer]:
    """Loss of the batch and the gradient of its sum times `scale`, over `microbatches` interleaved slices of the rows.

    Sums and counts add up to those of the whole batch; metrics are averaged by count. A load-balance loss over
    'batch' sees one slice at a time (balance_scope='sequence' does not depend on the slicing).
    """

    def scaled(model, batch, key):
        loss = objective(model, batch, key)
        return loss.total * scale, loss

    gradient = jax.grad(scaled, has_aux=True)
    if microbatches == 1:
        grads, loss = gradient(model, batch, key)
        return loss, grads

    def slices(rows):
        return jnp.swapaxes(rows.reshape(-1, microbatches, *rows.shape[1:]), 0, 1)

    def one(carry, scanned):
        index, part = scanned
        grads, loss = gradient(model, part, jax.random.fold_in(key, index))
        weighted = loss._replace(metrics=jax.tree.map(lambda m: m * loss.count, loss.metrics))
        return jax.tree.map(jnp.add, carry, (weighted, grads)), None

    parts = (jnp.arange(microbatches), jax.tree.map(slices, batch))
    shapes = jax.eval_shape(lambda part: gradient(model, part, key)[1], jax.tree.map(lambda p: p[0], parts[1]))
    zeros = (jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), jax.tree.map(jnp.zeros_like, model))
    (loss, grads), _ = jax.lax.scan(one, zeros, parts)
    return loss._replace(metrics=jax.tree.map(lambda m: m / jnp.maximum(loss.count, 1.0), loss.metrics)), grads


def next_loss_scale(state: TrainState, finite: Array) -> tuple[Array, Array, Array]:
    """Dynamic loss scaling (Micikevicius et al. 2018, sec. 3.2): the next scale, the steps since its last change, and
    whether a gradient that is not finite is an overflow of float16 that a smaller scale may cure."""
    if compute_dtype(state.model.config) != jnp.float16:
        return state.loss_scale, state.finite_steps, jnp.zeros_like(finite)
    grow = finite & (state.finite_steps + 1 >= LOSS_SCALE_GROWTH_STEPS)
    overflow = ~finite & (state.loss_scale > SMALLEST_LOSS_SCALE)
    scale = jnp.where(overflow, state.loss_scale / 2, jnp.where(grow, state.loss_scale * 2, state.loss_scale))
    return scale, jnp.where(finite & ~grow, state.finite_steps + 1, 0), overflow
