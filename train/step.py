"""The train step, a pure function of the state, a batch and the scalar hyperparameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data.batch import Batch
from model.balance import update_biases
from model.transformer import Transformer, compute_dtype
from train.config import TrainConfig
from train.frozen import Frozen, network
from train.hyper import Hyper
from train.objectives import Loss, Objective
from train.optimizers import applied_updates

SMALLEST_LOSS_SCALE = 2.0**-24  # may be below 1, because the gradient is of a sum over tokens
LOSS_SCALE_GROWTH_STEPS = 2000  # finite steps after which a float16 loss scale doubles (Micikevicius et al. 2018)

Step = Callable[..., tuple["TrainState", dict[str, Array]]]  # (state, batch, hyper=None) -> (state, metrics)


class TrainState(NamedTuple):
    """Everything that the next step depends on, except the batch and the scalar hyperparameters."""

    step: Int[Array, ""]  # updates attempted so far
    key: PRNGKeyArray  # folded with the step for dropout and objectives
    model: Transformer  # the trained network, or its trained part with None for the rest
    optimizer: optax.OptState
    ema: Transformer | None  # moving average of `model`
    loss_scale: Float[Array, ""]  # 1 except for float16
    finite_steps: Int[Array, ""]  # since the loss scale last changed
    nonfinite: Int[Array, ""]  # updates refused so far, without float16 overflows
    frozen: Frozen | None = None  # weights that are never updated; not part of a step's checkpoint

    @property
    def weights(self) -> Transformer:
        """The network for evaluation and sampling: the average if there is one, with the frozen layers."""
        return network(self.model if self.ema is None else self.ema, self.frozen)


def init_state(
    key: PRNGKeyArray,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    config: TrainConfig,
    frozen: Frozen | None = None,
) -> TrainState:
    """Return the state before the first step. Under an explicit mesh, every array takes its parameter's sharding."""
    scale = 2.0**15 if compute_dtype(model.config) == jnp.float16 else 1.0
    ema = None if config.ema_decay is None else jax.tree.map(jnp.copy, model)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, key, model, optimizer.init(model), ema, jnp.float32(scale), zero, zero, frozen)


def make_step(
    objective: Objective,
    optimizer: Callable[[Hyper | None], optax.GradientTransformation],
    rate: Callable[[Hyper | None], optax.Schedule],
    config: TrainConfig,
) -> Step:
    """Return `step(state, batch, hyper=None) -> (state, metrics)`, to be jitted with the state donated.

    `optimizer` and `rate` return the optimizer and its schedule for traced hyperparameters, or those of the config for
    None. A gradient that is not finite changes only the counters, so the last good weights are never overwritten. With
    config.nonfinite == 'stop', all later steps also change only the counters, so that the state can still be saved.
    """

    def step(state: TrainState, batch: Batch, hyper: Hyper | None = None) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(state.key, state.step)
        loss, grads = summed_gradients(
            objective if hyper is None else objective.with_hyper(hyper),
            state.model,
            state.frozen,
            batch,
            key,
            config.microbatches,
            state.loss_scale,
        )
        count = jnp.maximum(loss.count, 1.0)
        grads = jax.tree.map(lambda g: g / (count * state.loss_scale), grads)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss.total)
        halted = (state.nonfinite > 0) & (config.nonfinite == "stop")

        def update():
            updates, opt_state = optimizer(hyper).update(grads, state.optimizer, state.model)
            model = balanced(optax.apply_updates(state.model, updates), state.frozen, loss)
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
            # The rate of this update. After refused updates, the schedule lags behind the step count.
            "learning_rate": jnp.asarray(rate(hyper)(applied_updates(state.optimizer)), jnp.float32),
            "tokens": (batch.segment_ids > 0).sum().astype(jnp.float32),
            "loss_scale": state.loss_scale,
            "nonfinite": nonfinite,
        }
        after = TrainState(
            state.step + 1, state.key, model, opt_state, ema, scale, finite_steps, nonfinite, state.frozen
        )
        return after, metrics

    return step


def balanced(model: Transformer, frozen: Frozen | None, loss: Loss) -> Transformer:
    """Return the trained part with its router biases updated by the load of their experts."""
    moe = model.config.moe
    if moe is None or moe.bias_rate is None:
        return model
    assert loss.expert_load is not None, "experts report their load"
    moved = update_biases(network(model, frozen), loss.expert_load, moe)
    return jax.tree.map(lambda old, new: None if old is None else new, model, moved, is_leaf=lambda x: x is None)


def summed_gradients(
    objective: Objective,
    model: Transformer,
    frozen: Frozen | None,
    batch: Batch,
    key: PRNGKeyArray,
    microbatches: int,
    scale: Array,
) -> tuple[Loss, Transformer]:
    """Return the loss of the batch, and the gradient of `scale` times its sum with respect to the trained part `model`.

    The rows are processed in `microbatches` interleaved slices. Sums and counts add up to those of the whole batch, and
    metrics are averages weighted by count. With balance_scope='batch', the load-balance loss is computed per slice;
    with 'sequence', it does not depend on the slicing.
    """

    def scaled(model, batch, key):
        loss = objective(model, frozen, batch, key)
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
        weighted = _map_figures(lambda m: m * loss.count, loss)
        return jax.tree.map(jnp.add, carry, (weighted, grads)), None

    parts = (jnp.arange(microbatches), jax.tree.map(slices, batch))
    shapes = jax.eval_shape(lambda part: gradient(model, part, key)[1], jax.tree.map(lambda p: p[0], parts[1]))
    zeros = (jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), jax.tree.map(jnp.zeros_like, model))
    (loss, grads), _ = jax.lax.scan(one, zeros, parts)
    return _map_figures(lambda m: m / jnp.maximum(loss.count, 1.0), loss), grads


def _map_figures(f: Callable[[Array], Array], loss: Loss) -> Loss:
    """Return `loss` with `f` applied to each of its means over the batch."""
    metrics, load = jax.tree.map(f, (loss.metrics, loss.expert_load))
    return loss._replace(metrics=metrics, expert_load=load)


def next_loss_scale(state: TrainState, finite: Array) -> tuple[Array, Array, Array]:
    """Return the next loss scale, the steps since its last change, and whether this step overflowed float16.

    Only a gradient that a smaller scale may still make finite counts as an overflow. Dynamic loss scaling follows
    Micikevicius et al. 2018, sec. 3.2.
    """
    if compute_dtype(state.model.config) != jnp.float16:
        return state.loss_scale, state.finite_steps, jnp.zeros_like(finite)
    grow = finite & (state.finite_steps + 1 >= LOSS_SCALE_GROWTH_STEPS)
    overflow = ~finite & (state.loss_scale > SMALLEST_LOSS_SCALE)
    scale = jnp.where(overflow, state.loss_scale / 2, jnp.where(grow, state.loss_scale * 2, state.loss_scale))
    return scale, jnp.where(finite & ~grow, state.finite_steps + 1, 0), overflow
