"""Scalar hyperparameters as traced values, so that runs that differ only in them share one compiled program.

`step(state, batch, hyper)` takes them next to the batch. A sweep over learning rates therefore compiles once, and runs
with several seeds go through one `jax.vmap`:

    hypers = stack([hyper_of(e) for e in arms])
    states = jax.vmap(program.make_state)(hypers)
    states, metrics = jax.vmap(program.step, in_axes=(0, None, 0))(states, batch, hypers)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from train.config import Experiment

COEFFICIENTS = ("z_loss", "load_balance", "router_z_loss", "temperature", "mix")  # fields of objectives


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Hyper:
    """Scalars of one run or, with a leading axis, of several runs. None: the loss is not computed at all."""

    seed: Any  # uint32: of the weights, dropout and objectives
    learning_rate: Any  # float32: peak of the schedule
    weight_decay: Any  # float32
    z_loss: Any = None  # float32: train.z_loss
    load_balance: Any = None  # float32: model.moe.load_balance
    router_z_loss: Any = None  # float32: model.moe.z_loss
    temperature: Any = None  # float32: train.distillation_temperature
    mix: Any = None  # float32: train.distillation_mix


def hyper_of(experiment: Experiment) -> Hyper:
    """Return the scalars of an experiment as NumPy. The coefficient of an auxiliary loss is None instead of 0."""
    moe, optimizer, train = experiment.model.moe, experiment.optimizer, experiment.train
    of_loss = lambda value: np.float32(value) if value else None
    distilled = train.objective == "distillation"
    return Hyper(
        np.uint32(train.seed),
        np.float32(optimizer.learning_rate),
        np.float32(optimizer.weight_decay),
        z_loss=of_loss(train.z_loss),
        load_balance=of_loss(0.0 if moe is None else moe.load_balance),
        router_z_loss=of_loss(0.0 if moe is None else moe.z_loss),
        temperature=np.float32(train.distillation_temperature) if distilled else None,
        mix=np.float32(train.distillation_mix) if distilled else None,
    )


def stack(hypers: Sequence[Hyper]) -> Hyper:
    """Return one Hyper whose scalars have a leading axis over `hypers`.

    A coefficient that only some of them have is 0 in the others.
    """

    def column(name: str) -> np.ndarray | None:
        values = [getattr(hyper, name) for hyper in hypers]
        if all(value is None for value in values):
            return None
        return np.stack([np.float32(0) if value is None else value for value in values])

    return Hyper(**{field.name: column(field.name) for field in fields(Hyper)})
