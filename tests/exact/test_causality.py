"""Which predictions change if one token changes. No tolerance: a prediction that must not depend on a token keeps its
bits."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from model.config import LatentConfig, ModelConfig, MoEConfig, PositionConfig
from model.transformer import forward, logits
from tests.models import TINY_ATTENTION, random_model, tiny_config

LENGTH, CHANGED = 24, 6


def changed_predictions(config: ModelConfig, position: int = CHANGED) -> np.ndarray:
    """Return [T]: whether the logits at each position differ in any bit after the token at `position` changed."""
    model = random_model(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, LENGTH)).astype(np.int32)
    other = tokens.copy()
    other[0, position] = (other[0, position] + 1) % config.vocab_size
    run = jax.jit(lambda model, tokens: logits(model, forward(model, tokens).hidden_BTD))
    before, after = (np.asarray(run(model, x))[0] for x in (tokens, other))
    return (before != after).any(-1)


def assert_causal(config: ModelConfig) -> None:
    changed = changed_predictions(config)
    assert changed[CHANGED], "the prediction of the changed token must change"
    assert changed[CHANGED + 1 :].any(), "a later prediction must change"
    assert not changed[:CHANGED].any(), "an earlier prediction changed"


def experts(router: str, k: int = 2, **more) -> ModelConfig:
    return tiny_config(moe=MoEConfig(4, k, 24, router=router, **more))


CAUSAL = {
    "dense": tiny_config(),
    "alibi, block sparse": tiny_config(
        position=PositionConfig("alibi"), attention=replace(TINY_ATTENTION, layers=("block_sparse",))
    ),
    "latent": tiny_config(
        attention=replace(
            TINY_ATTENTION, num_kv_heads=4, head_dim=12, latent=LatentConfig(kv_rank=16, rope_dim=4, value_dim=6)
        )
    ),
    "token choice": experts("top_k"),
    "token choice with drops": experts("switch", 1, capacity_factor=1.0),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_earlier_predictions_keep_their_bits(name):
    CAUSAL[name].validate()
    assert_causal(CAUSAL[name])


NONCAUSAL = {
    # Wang et al. 2024, sec. 5.2: experts that choose their tokens see the whole sequence.
    "expert choice": experts("expert_choice", allow_leak=True),
    "soft": experts("soft", 1, allow_leak=True),
    "bidirectional": tiny_config(attention=replace(TINY_ATTENTION, mask="bidirectional")),
}


@pytest.mark.parametrize("name", NONCAUSAL)
def test_networks_that_read_later_tokens_fail_the_test_above(name):
    NONCAUSAL[name].validate()
    assert not NONCAUSAL[name].can_generate
    assert all(config.can_generate for config in CAUSAL.values())
    with pytest.raises(AssertionError, match="an earlier prediction changed"):
        assert_causal(NONCAUSAL[name])


def test_windows_of_w_positions_reach_w_minus_1_tokens_back_per_layer():
    """Jiang et al. 2023 (Mistral 7B), sec. 2: information moves forward by one window per layer, 131 K tokens for 32
    layers and a window of 4,096. Our windows include the query's position, so L layers reach L (W - 1) tokens back."""
    layers, window = 4, 3
    config = tiny_config(num_layers=layers, attention=replace(TINY_ATTENTION, layers=("sliding",), window=window))
    reach = layers * (window - 1)
    expected = (np.arange(LENGTH) >= CHANGED) & (np.arange(LENGTH) <= CHANGED + reach)
    np.testing.assert_array_equal(changed_predictions(config), expected)
    assert round(32 * (4096 - 1) / 1000) == 131
