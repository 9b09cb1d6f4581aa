"""Distillation matches a closed form in NumPy, and a run saves its teacher and resumes with it."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.prepare import prepare
from model.transformer import forward, logits
from tests.data.conftest import byte_config, write_corpus
from tests.models import random_model, tiny_config
from tests.train.batches import packed_batch, weighted
from tests.train.small_runs import TINY, StopAt, bits, experiment, run
from train.config_io import ConfigError, save_json
from train.frozen import Frozen
from train.objectives import Distillation, divergence
from train.program import build

CONFIG = tiny_config()
BATCH = packed_batch(0, 4, 13, 64, longest=8)


@pytest.fixture(scope="module")
def networks():
    return random_model(CONFIG), random_model(CONFIG, seed=1)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(("temperature", "mix"), [(1.0, 1.0), (2.0, 0.3), (5.0, 0.0)])
def test_the_loss_matches_the_closed_form(networks, temperature, mix):
    student, teacher = networks
    batch = weighted(BATCH, np.random.default_rng(0).choice([0.5, 1.0], BATCH.tokens.shape))
    objective = Distillation(temperature=temperature, mix=mix)
    found = jax.jit(lambda s, t: objective(s, Frozen(teacher=t), batch, None))(student, teacher)

    @jax.jit
    def predict(model):
        out = forward(model, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
        return logits(model, out.hidden_BTD)

    s, t = (np.asarray(predict(model), np.float64) for model in networks)
    p, q = softmax(t / temperature), softmax(s / temperature)
    soft = (p * (np.log(p) - np.log(q))).sum(-1) * temperature**2
    hard = -np.log(np.take_along_axis(softmax(s), batch.targets[..., None], -1))[..., 0]
    w = np.asarray(batch.loss_weights, np.float64)
    np.testing.assert_allclose(found.total, (w * ((1 - mix) * hard + mix * soft)).sum(), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["loss"], (w * hard).sum() / w.sum(), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["distillation_loss"], (w * soft).sum() / w.sum(), rtol=1e-5)


def test_a_teacher_equal_to_the_student_gives_no_gradient(networks):
    model, _ = networks
    objective = Distillation(temperature=2.0, mix=1.0)

    @jax.jit
    def gradients(model, teacher):
        of = lambda mix: jax.grad(lambda m: replace(objective, mix=mix)(m, Frozen(teacher=teacher), BATCH, None).total)
        return of(1.0)(model), of(0.0)(model)

    taught, plain = gradients(model, model)
    norm = lambda tree: float(jnp.sqrt(sum(jnp.square(x).sum() for x in jax.tree.leaves(tree))))
    assert norm(taught) < 1e-5 * norm(plain)


def test_the_gradient_of_the_logits_matches_the_paper():
    """Hinton et al. 2015, eq. 2: temperature^2 times (q - p) / temperature."""
    draw = np.random.default_rng(0)
    student, teacher = (jnp.asarray(draw.standard_normal((1, 2, 7)), jnp.float32) for _ in range(2))
    found = jax.grad(lambda s: divergence(teacher, s, 3.0).sum())(student)
    np.testing.assert_allclose(found, 3.0 * (softmax(student / 3) - softmax(teacher / 3)), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(data config, prepared data, folder of a trained teacher that is twice as wide as the student)."""
    root = tmp_path_factory.mktemp("distillation")
    data = byte_config(root, write_corpus(root / "large", 12))
    prepared = prepare(data)
    config = replace(experiment(data, objective="next_token", steps=2), model=replace(TINY, embed_dim=32))
    folder = root / "teacher"
    run(build(config, devices=jax.devices()[:1]), prepared, folder)
    save_json(config, folder / "config.json")
    return data, prepared, folder


def test_a_run_learns_from_a_teacher_and_resumes_bit_for_bit(place, tmp_path):
    data, prepared, teacher = place
    config = experiment(data, objective="distillation", teacher=str(teacher), steps=6, eval_every=0, checkpoint_every=3)
    program = build(replace(config, model=TINY), devices=jax.devices()[:1])
    whole = run(program, prepared, tmp_path / "whole")
    with StopAt(4) as stop:
        run(program, prepared, tmp_path / "two", stop=stop)
    text = (tmp_path / "two" / "metrics.jsonl").read_text()
    assert '"distillation_loss"' in text and (tmp_path / "two" / "frozen" / "0").is_dir()
    resumed = run(program, prepared, tmp_path / "two")
    assert bits(resumed.state) == bits(whole.state)
    assert bits(whole.state.frozen.teacher) != bits(whole.state.model)


def test_a_teacher_that_does_not_fit_is_refused(place, tmp_path):
    data, _, teacher = place
    config = experiment(data, objective="distillation", teacher=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"train.teacher = .*not a run with a readable config"):
        build(replace(config, model=TINY))
    config = replace(config, train=replace(config.train, teacher=str(teacher)))
    with pytest.raises(ConfigError, match=r"model.vocab_size = 272, the student 300"):
        build(replace(config, model=replace(TINY, vocab_size=300)), devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="set both, or neither"):
        replace(config.train, teacher="").validate()
