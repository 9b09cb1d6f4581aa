"""Coordinate check of muP (Yang et al. 2022, app. D.1): changes by training do not grow with the width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import AttentionConfig, InitConfig, MLPConfig
from model.transformer import Transformer, forward, logits
from sharding.rules import ShardingRules
from tests.models import tiny_config
from train.config import OptimizerConfig
from train.optimizers import make_optimizer

WIDTHS = (64, 512)
STEPS = 4


def movement(width: int, mup: bool) -> tuple[float, float, float]:
    """Return the root mean squares of the initial logits, and of the changes of hidden states and logits over a few
    Adam steps."""
    config = tiny_config(
        embed_dim=width,
        attention=AttentionConfig(num_heads=width // 16, num_kv_heads=width // 16, head_dim=16),
        mlp=MLPConfig("gelu", 2 * width),
        init=InitConfig(embedding_std=1.0),
        mup_base_dim=WIDTHS[0] if mup else None,
    )
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=0.002, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=None),
        config,
        STEPS,
    )
    tokens = np.random.default_rng(0).integers(0, 64, (4, 17)).astype(np.int32)

    def predict(model):
        hidden = forward(model, tokens[:, :-1]).hidden_BTD
        return hidden, logits(model, hidden)

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(predict(model)[1], tokens[:, 1:]).mean()

    @jax.jit
    def run(key):
        model = Transformer(key, config, ShardingRules())

        def step(carry, _):
            model, state = carry
            updates, state = optimizer.update(jax.grad(loss)(model), state, model)
            return (optax.apply_updates(model, updates), state), None

        (trained, _), _ = jax.lax.scan(step, (model, optimizer.init(model)), length=STEPS)
        before, after = predict(model), predict(trained)
        rms = [jnp.sqrt(jnp.square(x).mean()) for x in (before[1], after[0] - before[0], after[1] - before[1])]
        return jnp.stack(rms)

    return tuple(np.asarray(run(jax.random.key(0))))


@pytest.mark.slow
def test_training_changes_a_wide_network_no_more_than_a_narrow_one():
    mup, plain = (np.array([movement(width, mup) for width in WIDTHS]) for mup in (True, False))
    growth, plain_growth = mup[1] / mup[0], plain[1] / plain[0]
    assert growth[0] < 0.6  # logits start at 1 / sqrt(width)
    assert 0.5 < growth[1] < 1.3 and 0.5 < growth[2] < 1.3, growth  # measured: 0.9, 0.7
    assert plain_growth[1] > 1.7 and plain_growth[2] > 2.5, plain_growth  # the standard parametrization: 2.1, 3.7
