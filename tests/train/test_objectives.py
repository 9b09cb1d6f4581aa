"""Objectives match float64 cross-entropy, document by document, and rearranged rows parse back to their text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batch import Batch
from data.tokenizer import SpecialTokens
from model.config import AttentionConfig, MoEConfig
from model.transformer import Output, forward, logits
from model.weights import Weight
from tests.models import random_model, tiny_config
from tests.train.batches import FIRST_TEXT_ID, packed_batch, packed_windows, weighted, whole_rows, whole_windows
from train import objectives
from train.config import TrainConfig
from train.objectives import Masked, NextToken, make_objective, rearrange_middle

VOCAB, ROWS, WIDTH = 64, 4, 13
SPECIAL = SpecialTokens()
seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def network():
    """(model, jitted next-token loss with z-loss, jitted logits) of a dense network."""
    model = random_model(tiny_config())
    objective = NextToken(z_loss=0.01)
    loss = jax.jit(lambda batch: objective(model, None, batch, None))

    @jax.jit
    def predict(batch):
        out = forward(model, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
        return logits(model, out.hidden_BTD)

    return model, loss, predict


# ---------------------------------------------------------------------------------------------------- next token


@few
@given(seeds)
def test_the_loss_is_cross_entropy_over_targets_within_segments(network, seed):
    tokens, segment_ids = packed_windows(seed, ROWS, WIDTH, VOCAB, longest=6)
    batch = Batch.of_windows(tokens, segment_ids)
    weights = np.random.default_rng(seed).choice([0.0, 0.5, 1.0], (ROWS, WIDTH - 1))
    _, loss, predict = network
    logits_BTV = np.asarray(predict(batch), np.float64)
    total = count = nll = 0.0
    for b in range(ROWS):
        for t in range(WIDTH - 1):
            if segment_ids[b, t + 1] == 0 or segment_ids[b, t] != segment_ids[b, t + 1]:
                continue
            row = logits_BTV[b, t]
            log_z = row.max() + np.log(np.exp(row - row.max()).sum())
            nll += weights[b, t] * (log_z - row[tokens[b, t + 1]])
            total += weights[b, t] * 0.01 * log_z**2
            count += weights[b, t]
    found = loss(weighted(batch, weights))
    np.testing.assert_allclose(found.total, nll + total, rtol=2e-6, atol=1e-4)
    np.testing.assert_allclose(found.count, count)
    np.testing.assert_allclose(found.metrics["loss"], nll / max(count, 1), rtol=2e-6, atol=1e-6)


@few
@given(seeds, st.integers(2, 4))
def test_packed_rows_match_separate_rows(network, seed, documents):
    _, loss, _ = network
    draw = np.random.default_rng(seed)
    sizes = np.diff([0, *sorted(draw.choice(np.arange(1, WIDTH), documents - 1, replace=False)), WIDTH])
    rows = np.zeros((2, ROWS, WIDTH), np.int32)  # packed: all in row 0; separate: each at the start of a row
    ids = np.zeros((2, ROWS, WIDTH), np.int32)
    at = 0
    for d, size in enumerate(sizes):
        rows[0, 0, at : at + size] = rows[1, d, :size] = draw.integers(FIRST_TEXT_ID, VOCAB, size)
        ids[0, 0, at : at + size], ids[1, d, :size] = d + 1, 1
        at += size
    packed, alone = (loss(Batch.of_windows(r, s)) for r, s in zip(rows, ids, strict=True))
    assert packed.count == alone.count == WIDTH - documents
    np.testing.assert_allclose(packed.total, alone.total, rtol=1e-5, atol=1e-4)


@few
@given(seeds)
def test_padding_and_segment_borders_never_count(network, seed):
    _, loss, _ = network
    tokens, segment_ids = packed_windows(seed, ROWS, WIDTH, VOCAB, longest=6)
    noise = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, WIDTH)).astype(np.int32)
    batch, other = (Batch.of_windows(rows, segment_ids) for rows in (tokens, np.where(segment_ids > 0, tokens, noise)))
    assert loss(batch).total == loss(other).total


def test_the_loss_without_targets_is_zero(network):
    found = network[1](Batch.of_windows(*np.zeros((2, ROWS, WIDTH), np.int32)))
    assert found.total == found.count == found.metrics["loss"] == 0


@few
@given(seeds)
def test_losses_of_halves_add_up(network, seed):
    _, loss, _ = network
    batch = packed_batch(seed, ROWS, WIDTH, VOCAB)
    halves = [loss(weighted(batch, keep[:, None])) for keep in np.eye(2, dtype=np.float32)[:, np.arange(ROWS) % 2]]
    whole = loss(batch)
    np.testing.assert_allclose(sum(h.total for h in halves), whole.total, rtol=1e-6, atol=1e-4)
    assert sum(h.count for h in halves) == whole.count


def test_auxiliary_losses_have_their_coefficients():
    moe = MoEConfig(num_experts=4, top_k=2, hidden_dim=16, load_balance=0.3, z_loss=0.2)
    model = random_model(tiny_config(moe=moe))
    found = jax.jit(lambda batch: NextToken()(model, None, batch, None))(whole_rows(0, ROWS, WIDTH, VOCAB))
    m = {name: np.asarray(value, np.float64) for name, value in found.metrics.items()}
    expected = m["loss"] + 2 * (
        0.3 * m["load_balance_loss"] + 0.2 * m["router_z_loss"]
    )  # two layers; the metrics are means
    np.testing.assert_allclose(found.total / found.count, expected, rtol=1e-5)
    np.testing.assert_allclose(m["expert_load"].sum(-1), 1, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------- masked


@pytest.fixture
def seen(monkeypatch):
    """A function that runs `Masked` with a network that records its input.

    The loss of a target is 1 if its input differs from it, and 1000 otherwise.
    """

    def run(batch: Batch, rate: float, seed: int = 0):
        inputs = []

        def fake_forward(model, tokens_BT, **_):
            inputs.append(np.asarray(tokens_BT))
            return Output(jnp.zeros((*tokens_BT.shape, 1)), None, None)

        def fake_losses(model, hidden_BTD, targets_BT, chunk):
            return jnp.where(inputs[0] != np.asarray(targets_BT), 1.0, 1000.0), jnp.zeros(targets_BT.shape)

        monkeypatch.setattr(objectives, "forward", fake_forward)
        monkeypatch.setattr(objectives, "token_losses", fake_losses)
        model = random_model(tiny_config(vocab_size=4096))
        return inputs, Masked(rate=rate, special=SPECIAL, ids=VOCAB)(model, None, batch, jax.random.key(seed))

    return run


@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_masked_draws_at_the_rates_of_the_paper(seen, rate):
    batch = packed_batch(1, 128, 513, 4096)
    (inputs,), loss = seen(batch, rate)
    tokens, valid = batch.tokens, batch.segment_ids > 0
    changed = inputs != tokens
    to_mask = changed & (inputs == SPECIAL.mask)
    kept = (float(loss.total) - changed.sum()) / 1000  # chosen, but unchanged
    assert not changed[~valid].any()
    assert (inputs[changed & ~to_mask] >= FIRST_TEXT_ID).all(), "a random token is never a special token"
    assert float(loss.count) == changed.sum() + kept, "every changed token is predicted"

    def near(found, expected, trials):
        assert abs(found / trials - expected) < 5 * np.sqrt(expected * (1 - expected) / trials)

    near(float(loss.count), rate, valid.sum())
    near(to_mask.sum(), 0.8, float(loss.count))
    near((changed & ~to_mask).sum(), 0.1, float(loss.count))
    near(kept, 0.1, float(loss.count))


def test_masked_draws_depend_on_the_key(seen):
    batch = packed_batch(1, 4, 65, 4096)
    (first,), _ = seen(batch, 0.5, seed=1)
    (again,), _ = seen(batch, 0.5, seed=1)
    (other,), _ = seen(batch, 0.5, seed=2)
    assert (first == again).all() and (first != other).any()


def test_masked_tokens_are_predicted_from_both_sides():
    """The last token changes the loss of the tokens before it, even if it is not predicted."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, mask="bidirectional")
    model = random_model(tiny_config(attention=attention))
    objective = make_objective(TrainConfig(objective="masked", mask_rate=0.3), VOCAB)
    loss = jax.jit(lambda batch, key: objective(model, None, batch, key))
    batch = whole_rows(0, 1, WIDTH, VOCAB)
    changed = replace(batch, tokens=batch.tokens.copy())
    changed.tokens[0, -1] = 11 + (changed.tokens[0, -1] - 10) % 50
    pairs = [(loss(batch, jax.random.key(i)), loss(changed, jax.random.key(i))) for i in range(8)]
    assert all(a.count == b.count for a, b in pairs)
    assert sum(float(a.total) != float(b.total) for a, b in pairs if a.count) >= 6


# ---------------------------------------------------------------------------------------------------- prefix


def test_a_prefix_attends_both_ways_and_is_never_predicted():
    """The loss of the first target depends on the whole prefix and on no later token, and the prefix has no targets."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, mask="prefix")
    model = random_model(tiny_config(attention=attention))
    objective = make_objective(TrainConfig(objective="prefix"), VOCAB)
    batch = whole_rows(0, ROWS, WIDTH, VOCAB)
    loss = jax.jit(lambda weights, key: objective(model, None, replace(batch, loss_weights=weights), key))
    counted = np.zeros((ROWS, WIDTH - 1))
    for row in range(ROWS):
        for t in range(WIDTH - 1):
            weights = np.zeros((ROWS, WIDTH - 1), np.float32)
            weights[row, t] = 1
            counted[row, t] = loss(weights, jax.random.key(3)).count
    cuts = WIDTH - 1 - counted.sum(1)  # every target after the cut counts, and none before it
    assert (
        all((counted[row] == (np.arange(WIDTH - 1) >= cut)).all() for row, cut in enumerate(cuts))
        and len(set(cuts)) > 1
    )

    def gradient(weights):  # of the weighted losses by each input token's embedding, row by row
        def total(shift):
            return objective(shifted(shift), None, replace(batch, loss_weights=weights), jax.random.key(3)).total

        def shifted(shift):
            copy = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
            table = Weight(shift, name="positions", axes=(None, "embed"), inputs=1, role="embedding")
            copy.positions = nnx.data(table)
            return copy

        return jax.grad(total)(jnp.zeros((WIDTH - 1, 32)))

    row = int(np.argmax(cuts))
    cut = int(cuts[row])
    first = np.zeros((ROWS, WIDTH - 1), np.float32)
    first[row, cut] = 1
    reached = np.abs(np.asarray(jax.jit(gradient)(first))).max(1) > 0
    assert reached[: cut + 1].all() and not reached[cut + 1 :].any()


# ------------------------------------------------------------------------------------------- fill in the middle


def longest_segment(ids_W: np.ndarray) -> tuple[int, int]:
    """Return (start, size) of the longest segment, or of the first of several."""
    sizes = [((ids_W == s).sum(), -s) for s in range(1, ids_W.max(initial=0) + 1)]
    size, segment = max(sizes, default=(0, 0))
    return int((ids_W == -segment).argmax()), int(size)


def parse(body: list[int]) -> tuple[list[int], list[int], list[int]]:
    """Return (prefix, middle, suffix) of a rearranged segment without its first token.

    In the shared SPM form, prefix and middle are adjacent, and both are returned as the middle.
    """
    assert body[-1] == SPECIAL.end, "<end> follows the middle"
    body = body[:-1]
    marks = [body.index(mark) for mark in (SPECIAL.fim_prefix, SPECIAL.fim_suffix, SPECIAL.fim_middle)]
    assert sum(token < FIRST_TEXT_ID for token in body) == 3 and marks == sorted(marks) and marks[0] == 0
    return body[1 : marks[1]], body[marks[2] + 1 :], body[marks[1] + 1 : marks[2]]


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from([(4, 24), (1, 9), (3, 40)]), st.integers(4, 40), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_rearranged_segment_parses_back_to_its_document(seed, shape, longest, spm_rate):
    tokens, ids = packed_windows(seed, *shape, VOCAB, longest=longest)
    moved = np.asarray(jitted_rearrange(tokens, ids, jax.random.key(seed), 1.0, spm_rate))
    for before, after, row_ids in zip(tokens, moved, ids, strict=True):
        start, size = longest_segment(row_ids)
        if size < 8:
            assert (before == after).all()
            continue
        inside = np.arange(start, start + size)
        outside = np.delete(np.arange(len(before)), inside)
        assert (before[outside] == after[outside]).all(), "other segments and padding do not change"
        assert before[start] == after[start], "the token that opens the document stays first"
        prefix, middle, suffix = parse(after[inside[1:]].tolist())
        assert prefix + middle + suffix == before[inside[1:-4]].tolist()
        if spm_rate == 1.0:
            assert not prefix, "SPM: the first two special tokens are adjacent"


jitted_rearrange = jax.jit(lambda *args: rearrange_middle(*args, SPECIAL))


def test_rearrangement_follows_its_rates_and_cuts_uniformly():
    rows, width = 2000, 34
    tokens, ids = whole_windows(0, rows, width, VOCAB)
    moved = np.asarray(jitted_rearrange(tokens, ids, jax.random.key(0), 0.3, 0.25))
    chosen = (moved != tokens).any(1)
    assert abs(chosen.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / rows)
    parts = [parse(row[1:].tolist()) for row in moved[chosen]]
    length = width - 5
    # With two uniform cuts, each part has a third of the tokens on average, and a prefix is empty with probability
    # 1 - (1 - 1/(length+1))^2.
    suffixes = [len(suffix) / length for _, _, suffix in parts]
    assert abs(np.mean(suffixes) - 1 / 3) < 0.05
    no_prefix = 0.25 + 0.75 * (1 - (1 - 1 / (length + 1)) ** 2)
    found = np.mean([not prefix for prefix, _, _ in parts])
    assert abs(found - no_prefix) < 5 * np.sqrt(no_prefix * (1 - no_prefix) / len(parts))


def test_shared_spm_keeps_prefix_before_middle():
    """In SPM, prefix and middle follow <fim_middle> in this order, which is the text up to the suffix."""
    tokens, ids = whole_windows(3, 50, 34, VOCAB)
    moved = np.asarray(jitted_rearrange(tokens, ids, jax.random.key(1), 1.0, 1.0))
    for before, after in zip(tokens, moved, strict=True):
        _, both, _ = parse(after[1:].tolist())
        assert both == before[1 : 1 + len(both)].tolist()


@few
@given(seeds, seeds)
def test_rate_zero_is_the_identity_and_draws_depend_on_the_key(seed, other):
    tokens, ids = packed_windows(seed, 4, 24, VOCAB)
    rearrange = partial(jitted_rearrange, tokens, ids)
    assert (rearrange(jax.random.key(other), 0.0, 0.5) == tokens).all()
    assert (rearrange(jax.random.key(other), 0.5, 0.5) == rearrange(jax.random.key(other), 0.5, 0.5)).all()


def test_fill_in_middle_is_the_next_token_loss_of_the_rearranged_rows(network):
    model, loss, _ = network
    (tokens, ids), key = whole_windows(0, ROWS, WIDTH, VOCAB), jax.random.key(5)
    objective = make_objective(TrainConfig(objective="fill_in_middle", fim_rate=0.7, z_loss=0.01), VOCAB)
    moved = jitted_rearrange(tokens, ids, jax.random.split(key)[0], 0.7, 0.5)
    assert (moved != tokens).any()
    found = jax.jit(lambda batch: objective(model, None, batch, key))(Batch.of_windows(tokens, ids))
    np.testing.assert_allclose(found.total, loss(Batch.of_windows(np.asarray(moved), ids)).total, rtol=1e-6)
