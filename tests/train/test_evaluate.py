"""Held-out bits per byte match a sum by hand, document by document."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.prepare import heldout_files, prepare
from model.config import AttentionConfig, MoEConfig
from model.transformer import forward, logits
from tests.data.conftest import byte_config, write_corpus
from tests.models import put, random_model, tiny_config
from train.config import TrainConfig
from train.evaluate import evaluate, make_score
from train.objectives import NextToken, scoring_objective

T = 32


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    evaluation = write_corpus(root / "prose", 3, longest=40)
    config = byte_config(root, write_corpus(root / "code", 20, longest=80), evaluation_sources=(evaluation,))
    return prepare(config)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(vocab_size=272, num_layers=1))


@pytest.fixture(scope="module")
def score():
    return jax.jit(make_score(NextToken(dropout=False)))


def bits_by_hand(model, prepared, name: str) -> tuple[float, int, int]:
    """Return (bits per byte, tokens, bytes) over windows of T targets of the held-out stream.

    The network sees each document's part of a window separately.
    """

    @jax.jit
    def predict(tokens_T):
        return logits(model, forward(model, tokens_T[None]).hidden_BTD)[0]

    end, encode = prepared.tokenizer.special.end, prepared.tokenizer.encode
    texts = [text for _, text in heldout_files(prepared, name)]
    documents = [[end, *encode(text).tolist(), end] for text in texts]
    stream = [(token, d) for d, tokens in enumerate(documents) for token in tokens]
    nats, count = 0.0, 0
    for at in range(0, len(stream) - 1, T):
        window = stream[at : at + T + 1]
        for d in sorted({d for _, d in window}):
            tokens = [token for token, owner in window if owner == d]
            padded = np.zeros(T + 1, np.int32)
            padded[: len(tokens)] = tokens
            rows = np.asarray(predict(padded[:-1]), np.float64)
            for t, target in enumerate(tokens[1:]):
                nats += rows[t].max() + math.log(np.exp(rows[t] - rows[t].max()).sum()) - rows[t, target]
                count += 1
    size = sum(len(text.encode()) for text in texts)
    return nats / math.log(2) / size, count, size


@pytest.mark.parametrize("name", ["code", "prose"])
def test_bits_per_byte_match_a_sum_by_hand_for_every_batch_size(model, prepared, score, name):
    expected, tokens, size = bits_by_hand(model, prepared, name)
    for batch_size in (4, 8):
        found = evaluate(score, model, prepared, name, batch_size=batch_size)
        assert (found.tokens, found.bytes) == (tokens, size)
        assert found.bits_per_byte == pytest.approx(expected, rel=2e-6)
        assert found.loss == pytest.approx(expected * math.log(2) * size / tokens, rel=2e-6)


def test_a_stride_scores_the_same_tokens_with_more_context(model, prepared, score):
    whole = evaluate(score, model, prepared, "code", batch_size=8)
    strided = evaluate(score, model, prepared, "code", batch_size=8, stride=T // 4)
    assert (strided.tokens, strided.bytes) == (whole.tokens, whole.bytes)
    assert strided.bits_per_byte != whole.bits_per_byte


def test_a_part_of_the_windows_counts_its_own_bytes(model, prepared, score):
    whole = evaluate(score, model, prepared, "code", batch_size=8)
    part = evaluate(score, model, prepared, "code", batch_size=8, max_windows=5)
    assert part.tokens <= 5 * T < whole.tokens and part.bytes < whole.bytes
    assert part.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.2)


@pytest.mark.parametrize("objective", ["next_token", "masked"])
def test_held_out_text_is_scored_without_dropout(prepared, objective):
    attention = AttentionConfig(
        num_heads=4, num_kv_heads=2, head_dim=8, mask="causal" if objective == "next_token" else "bidirectional"
    )
    score = jax.jit(make_score(scoring_objective(TrainConfig(objective=objective), 272)))
    found = []
    for rate in (0.0, 0.5):
        network = random_model(tiny_config(vocab_size=272, num_layers=1, attention=attention, dropout=rate))
        found.append(evaluate(score, network, prepared, "code", batch_size=8, max_windows=8).loss)
    assert found[0] == found[1]


def test_uniform_predictions_cost_the_logarithm_of_the_vocabulary(model, prepared, score):
    blind = jax.tree.map(np.zeros_like, model)
    found = evaluate(score, blind, prepared, "code", batch_size=8)
    assert found.loss == pytest.approx(math.log(272), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(272) * found.tokens / found.bytes, rel=1e-6)


def test_masked_prediction_is_scored_per_predicted_byte(prepared):
    """Bytes of tokens that are not predicted do not count, so a network of zeros scores as above."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, mask="bidirectional")
    blind = jax.tree.map(np.zeros_like, random_model(tiny_config(vocab_size=272, num_layers=1, attention=attention)))
    score = jax.jit(make_score(scoring_objective(TrainConfig(objective="masked", mask_rate=0.15), 272)))
    found = evaluate(score, blind, prepared, "code", batch_size=8)
    assert found.bits_per_byte == pytest.approx(math.log2(272), rel=0.1)


def test_the_load_of_experts_is_computed_over_the_whole_set(prepared):
    """Router weights of zero tie all experts, so the first two take every token. Half the capacity drops the rest."""
    moe = MoEConfig(num_experts=6, top_k=2, hidden_dim=8)
    found = []
    for capacity in (None, 1.5):
        network = random_model(
            tiny_config(vocab_size=272, num_layers=1, moe=dataclasses.replace(moe, capacity_factor=capacity))
        )
        router = network.stacks[0][0].mlp.router
        put(network.stacks[0][0].mlp, "router", jnp.zeros_like(router.value))
        found.append(evaluate(jax.jit(make_score(NextToken(dropout=False))), network, prepared, "code", batch_size=8))
    assert [f.max_violation for f in found] == pytest.approx([6 / 2 - 1] * 2, rel=1e-6)
    assert found[0].dropped_fraction == 0
    assert found[1].dropped_fraction == pytest.approx(0.5, abs=0.05)
    assert set(found[0].row()) == {"loss", "bits_per_byte", "tokens", "bytes", "max_violation", "dropped_fraction"}


def test_a_dense_network_has_no_load(model, prepared, score):
    assert set(evaluate(score, model, prepared, "code", batch_size=8, max_windows=4).row()) == {
        "loss",
        "bits_per_byte",
        "tokens",
        "bytes",
    }
