"""Contexts longer than the published length: generation with dynamic scaling, and notices on raising the length."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.generate import generate
from decode.sampling import SamplingParams
from interop import llama
from interop.families import family_of
from model.config import ModelConfig, PositionConfig, RopeScalingConfig
from model.positions import check_length
from model.transformer import Transformer, forward, logits
from tests.closeness import assert_close
from tests.interop.hf_folder import CONFIG
from tests.models import random_model

PUBLISHED, LONG = 16, 40


@jax.jit
def last_logits(model: Transformer, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    """Return the logits [B, V] after the first `length_B` tokens of each row, without a cache."""
    valid_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    out = forward(model, tokens_BT, valid_BT=valid_BT).hidden_BTD
    return logits(model, jnp.take_along_axis(out, length_B[:, None, None] - 1, 1)[:, 0])


def test_dynamic_scaling_past_the_published_length_matches_an_uncached_forward():
    values = CONFIG | {
        "max_position_embeddings": PUBLISHED,
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "num_hidden_layers": 1,
    }
    published = family_of(values)[1]
    config = replace(published, max_length=LONG, dtype="float32")
    assert llama.tensor_map(config) == llama.tensor_map(published), "the weights are the same"
    prompt, new = list(range(1, 9)), LONG - 8
    params = SamplingParams(temperature=0.0, max_new_tokens=new)
    with pytest.raises(ValueError, match=r"more than model.max_length = 16"):
        generate(random_model(replace(published, dtype="float32")), [prompt], params)
    model = random_model(config)
    (made,) = generate(model, [prompt], params)
    assert len(made.tokens) == new

    rows = np.tile(np.asarray(prompt + made.tokens, np.int32), (new, 1))
    lengths = np.arange(len(prompt), LONG, dtype=np.int32)
    found = np.asarray(last_logits(model, rows, lengths), np.float64)
    logprobs = found - np.log(np.exp(found).sum(-1, keepdims=True))
    np.testing.assert_array_equal(found.argmax(-1), made.tokens)
    picked = logprobs[np.arange(new), made.tokens]
    # A log-probability is a difference of logits, so the scale of its error is their size: 2 units in the last place.
    assert_close(made.logprobs, picked, 16 * 2.0**-23, scale=np.abs(found).max())
    # The scaling has an effect: without it, predictions differ past the published length and only there.
    unscaled = replace(config, position=replace(config.position, scaling=None))
    moved = np.abs(np.asarray(last_logits(random_model(unscaled), rows, lengths)) - found).max(-1)
    assert moved[lengths <= PUBLISHED].max() < 1e-4 < 1e-2 < moved[lengths > PUBLISHED + 1].min()


@pytest.mark.parametrize(
    "position, published, length, notice",
    [
        (PositionConfig(), 64, 64, None),
        (PositionConfig(), 64, 32, None),
        (PositionConfig(), 64, 65, "worse text past position 64"),
        (PositionConfig("none"), 64, 65, "worse text past position 64"),
        (PositionConfig("alibi"), 64, 128, None),
        (PositionConfig(scaling=RopeScalingConfig("dynamic_ntk", 2.0, 64)), 64, 1024, None),
        (PositionConfig(scaling=RopeScalingConfig("yarn", 4.0, 64)), 128, 256, None),
        (PositionConfig(scaling=RopeScalingConfig("yarn", 4.0, 64)), 128, 257, "worse text past position 256"),
        (PositionConfig("learned"), 64, 64, None),
    ],
)
def test_a_context_longer_than_the_positions_cover_gives_a_notice(position, published, length, notice):
    found = check_length(ModelConfig(max_length=length, position=position), published)
    assert (found is None) == (notice is None) and (notice or "") in (found or "")


def test_a_learned_table_cannot_change_its_length():
    for length in (63, 65):
        with pytest.raises(ValueError, match=rf"model.max_length = {length}: .* table of 64 positions. Try 64"):
            check_length(ModelConfig(max_length=length, position=PositionConfig("learned")), 64)
