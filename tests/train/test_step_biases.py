"""Balancing without a loss: in the train step, router biases change only by their rate, and they balance the load."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from model.config import MoEConfig
from tests.models import random_model, tiny_config
from tests.train.batches import weighted, whole_rows
from train.config import OptimizerConfig, TrainConfig
from train.objectives import NextToken
from train.optimizers import make_optimizer, schedule
from train.step import init_state, make_step

RATE = 0.02
MOE = MoEConfig(
    num_experts=8,
    top_k=2,
    hidden_dim=16,
    layers=("dense", "moe"),
    weights="sigmoid_renormalized",
    bias_rate=RATE,
    load_balance=0.0,
)
TRAIN = TrainConfig(nonfinite="skip")


@pytest.fixture(scope="module", params=["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def run(request):
    """(step, state), with decay on all weights and a learning rate that hardly changes the rest of the network."""
    config = tiny_config(num_layers=4, moe=MOE)
    optimizer = OptimizerConfig(
        name=request.param, learning_rate=1e-4, schedule="constant", warmup_steps=0, decay="all", weight_decay=10.0
    )
    made = make_optimizer(optimizer, config, 100)
    state = jax.jit(lambda model: init_state(jax.random.key(1), model, made, TRAIN))(random_model(config))
    return jax.jit(make_step(NextToken(), lambda hyper: made, lambda hyper: schedule(optimizer, 100), TRAIN)), state


def biases(state) -> np.ndarray:
    """Return the biases [L, E] of the MoE layers in order."""
    return np.concatenate(
        [
            np.asarray(block.mlp.router_bias.value)
            for unit in state.model.stacks
            for block in unit
            if hasattr(block.mlp, "router_bias")
        ]
    )


def test_biases_change_by_their_rate_and_balance_the_load(run):
    step, state = run
    batch = whole_rows(0, 8, 33, 64)
    violations = []
    for _ in range(30):
        before = biases(state)
        state, metrics = step(state, batch)
        load_LE = np.asarray(metrics["expert_load"])
        expected = before + np.float32(RATE) * np.sign(load_LE.mean(1, keepdims=True) - load_LE)
        assert load_LE.shape == before.shape == (2, 8)
        np.testing.assert_allclose(biases(state), expected, atol=1e-7)
        violations.append((load_LE.max(1) / load_LE.mean(1) - 1).mean())
    assert np.mean(violations[-5:]) < 0.5 * violations[0], violations


def test_a_refused_update_changes_no_bias(run):
    step, state = run
    state, _ = step(state, whole_rows(0, 8, 33, 64))
    before = biases(state)
    bad = weighted(whole_rows(1, 8, 33, 64), np.nan)
    state, metrics = step(state, bad)
    assert int(metrics["nonfinite"]) == 1
    np.testing.assert_array_equal(biases(state), before)
