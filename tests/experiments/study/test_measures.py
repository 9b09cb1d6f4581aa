"""Measures of trained weights equal independent sums over the same held-out windows."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import logsumexp

from data.pipeline import heldout_windows
from data.prepare import Prepared, prepare
from data.tokenizer import SpecialTokens
from experiments.study.measures import HeldOutUnder, Infilling, LogPartition, Movement, Trained, infilling_rows
from model.transformer import forward, logits
from tests.experiments.study.tiny import tiny_experiment
from train.evaluate import evaluate_all
from train.program import Program, build

SPECIAL = SpecialTokens()
WINDOWS = 3


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Program, Prepared]:
    experiment = tiny_experiment(tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache"))
    return build(experiment, devices=jax.devices()[:1]), prepare(experiment.data, print)


@pytest.fixture(scope="module")
def trained(parts) -> Trained:
    """Weights that are the initial ones of another seed."""
    program, prepared = parts
    other = dataclasses.replace(program.hyper, seed=np.uint32(7))
    return Trained(program, jax.jit(program.make_state)(other).model, prepared, print)


def windows(trained: Trained):
    prepared = trained.prepared
    return heldout_windows(prepared, prepared.heldout_names[0], batch_size=8, max_windows=WINDOWS)


def predictions(trained: Trained, model=None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return hidden states, logits, targets and weights of the first windows, in float64."""
    found = []
    for batch in heldout_windows(
        trained.prepared, trained.prepared.heldout_names[0], batch_size=8, max_windows=WINDOWS
    ):
        model = trained.model if model is None else model
        out = forward(model, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
        found.append((out.hidden_BTD, logits(model, out.hidden_BTD), batch.targets, batch.loss_weights))
    hidden, predicted, targets, weights = (
        np.concatenate([np.asarray(x) for x in part]) for part in zip(*found, strict=True)
    )
    return hidden.astype(np.float64), predicted.astype(np.float64), targets, weights.astype(np.float64)


def test_log_partition_is_the_root_mean_square_of_the_logsumexp(trained):
    _, predicted, _, weights = predictions(trained)
    log_z = logsumexp(predicted, axis=-1)
    expected = np.sqrt((log_z**2 * weights).sum() / weights.sum())
    assert LogPartition(WINDOWS)(trained)["log_z"] == pytest.approx(expected, rel=1e-5)


def test_movement_is_the_distance_from_the_initial_weights(parts, trained):
    program, _ = parts
    initial = jax.jit(program.make_state)(program.hyper).model
    (hidden, before, *_), (moved, after, *_) = predictions(trained, initial), predictions(trained)
    rms = lambda x: np.sqrt(np.mean(x**2))
    found = Movement(WINDOWS)(trained)
    assert found["initial_logits"] == pytest.approx(rms(before), rel=1e-4)
    assert found["hidden_change"] == pytest.approx(rms(moved - hidden), rel=1e-4)
    assert found["logits_change"] == pytest.approx(rms(after - before), rel=1e-4)
    still = Movement(WINDOWS)(trained._replace(model=initial))
    assert still["hidden_change"] == still["logits_change"] == 0.0


def test_both_batches_of_infilling_score_the_same_middles():
    width, rows = 32, 5
    text = np.random.default_rng(1).integers(20, 200, (rows - 1, width)).astype(np.int32)
    plain, moved = infilling_rows(text, rows, SPECIAL, np.random.default_rng(0))
    for row in range(rows - 1):
        middles = [batch.targets[row][batch.loss_weights[row] > 0] for batch in (plain, moved)]
        np.testing.assert_array_equal(*middles)
        assert width // 8 <= len(middles[0]) < width // 2
        # prefix <fim_suffix> suffix <fim_middle> middle spells the window without its last four tokens.
        line = moved.tokens[row].tolist() + [int(moved.targets[row, -1])]
        assert line[1] == SPECIAL.fim_prefix
        suffix, middle = line.index(SPECIAL.fim_suffix), line.index(SPECIAL.fim_middle)
        end = middle + 1 + len(middles[0])
        spelt = [line[0], *line[2:suffix], *line[middle + 1 : end], *line[suffix + 1 : middle]]
        assert spelt == text[row, : width - 4].tolist()
    assert plain.loss_weights[-1].sum() == moved.loss_weights[-1].sum() == 0


def test_infilling_scores_its_rows_as_the_network_does(trained):
    found = Infilling(WINDOWS)(trained)
    draw, sums = np.random.default_rng(0), np.zeros((2, 2))
    for batch in heldout_windows(
        trained.prepared, trained.prepared.heldout_names[0], batch_size=8, max_windows=WINDOWS
    ):
        one_document = (batch.segment_ids == 1).all(axis=1)
        for i, rows in enumerate(infilling_rows(batch.tokens[one_document], 8, SPECIAL, draw)):
            predicted = np.asarray(logits(trained.model, forward(trained.model, rows.tokens).hidden_BTD), np.float64)
            chosen = np.take_along_axis(predicted, rows.targets[..., None], -1)[..., 0]
            nll = logsumexp(predicted, axis=-1) - chosen
            sums[i] += (nll * rows.loss_weights).sum(), rows.loss_weights.sum()
    expected = sums[:, 0] / sums[:, 1]
    np.testing.assert_allclose([found["middle_nats"], found["infill_nats"]], expected, rtol=1e-5)


def test_held_out_text_under_the_same_config_is_the_evaluation(trained):
    full = next(iter(evaluate_all(trained.network, trained.model, trained.prepared, full=True).values()))
    same = HeldOutUnder("same", {}, windows=10**6)(trained)
    assert same["same"] == pytest.approx(full.bits_per_byte, rel=1e-6)
