"""Runs that differ only in scalar hyperparameters share a program, and can run under one vmap."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from data.config import DataConfig
from model.config import MoEConfig
from tests.models import tiny_config
from tests.train.batches import packed_batch
from tests.train.small_runs import bits
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig
from train.hyper import hyper_of, stack
from train.program import Program, build

VOCAB, ROWS, WIDTH, STEPS = 64, 8, 17, 3
ARM = Experiment(
    name="arm",
    model=tiny_config(
        num_layers=1, dropout=0.1, moe=MoEConfig(num_experts=4, top_k=2, hidden_dim=16, load_balance=0.01)
    ),
    data=DataConfig(sequence_length=WIDTH - 1, batch_size=ROWS),
    optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2, weight_decay=0.1),
    train=TrainConfig(steps=10),
    samples=SampleConfig(count=0),
)


def arm(seed: int = 0, rate: float = 0.01, decay: float = 0.1, z_loss: float = 0.0) -> Experiment:
    return replace(
        ARM,
        optimizer=replace(ARM.optimizer, learning_rate=rate, weight_decay=decay),
        train=replace(ARM.train, seed=seed, z_loss=z_loss),
    )


@pytest.fixture(scope="module")
def program() -> Program:
    return build(ARM, devices=jax.devices()[:1])


def trained(make, step, hyper) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return (losses [steps, ...], weights) after a few steps."""
    state, losses = make(hyper), []
    for i in range(STEPS):
        state, metrics = step(state, packed_batch(i, ROWS, WIDTH, VOCAB), hyper)
        losses.append(np.asarray(metrics["loss"]))
    return np.stack(losses), [np.asarray(x) for x in jax.tree.leaves(state.model)]


def test_eight_seeds_under_one_vmap_match_separate_runs(program):
    hypers = [hyper_of(arm(seed)) for seed in range(8)]
    make, step = jax.jit(program.make_state), jax.jit(program.step)
    serial = [trained(make, step, hyper) for hyper in hypers]
    together = trained(
        jax.jit(jax.vmap(program.make_state)), jax.jit(jax.vmap(program.step, in_axes=(0, None, 0))), stack(hypers)
    )
    losses = np.stack([losses for losses, _ in serial], axis=1)
    assert len(np.unique(losses[-1])) == 8
    np.testing.assert_allclose(together[0], losses, rtol=1e-5)
    for i, (_, weights) in enumerate(serial):
        for one, all_of_them in zip(weights, together[1], strict=True):
            scale = np.abs(one).max()
            np.testing.assert_allclose(all_of_them[i], one, rtol=0, atol=1e-4 * scale)


def test_arms_share_a_program_and_match_their_configs(program):
    """With traced rates, decays and coefficients, the step equals one whose config holds them."""
    make, step = jax.jit(program.make_state), jax.jit(program.step)
    arms = [arm(1, 0.003, 0.0), arm(2, 0.03, 1.0)]
    for experiment in arms:
        own = build(experiment, devices=jax.devices()[:1])
        expected = trained(lambda _, own=own: jax.jit(own.make_state)(None), jax.jit(own.step), None)
        found = trained(make, step, hyper_of(experiment))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    assert step._cache_size() == 1


def test_a_zero_coefficient_removes_the_loss_unless_arms_differ():
    hypers = [hyper_of(arm(z_loss=value)) for value in (0.0, 0.5)]
    assert hypers[0].z_loss is None and hypers[1].z_loss == np.float32(0.5)
    assert stack(hypers[:1]).z_loss is None
    np.testing.assert_array_equal(stack(hypers).z_loss, np.float32([0, 0.5]))
    assert stack(hypers).seed.dtype == np.uint32


@pytest.mark.parametrize("seed", [0, 7, 2**31 + 5, 2**32 - 1])
def test_a_traced_seed_draws_the_same_as_a_constant_one(seed):
    traced = jax.jit(lambda s: jax.random.key_data(jax.random.key(s)))(hyper_of(arm(seed)).seed)
    assert bits(traced) == bits(jax.random.key_data(jax.random.key(seed)))
