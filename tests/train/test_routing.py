"""Choices of the experts, kept at each evaluation."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from data.prepare import prepare
from model.config import MoEConfig
from sharding.rules import ShardingRules
from tests.data.conftest import byte_config, write_corpus
from tests.models import random_model, tiny_config
from train.config import Experiment
from train.records import RunFolder
from train.routing import make_probe, read_choices


@pytest.fixture
def probe_of(tmp_path):
    data = byte_config(tmp_path, write_corpus(tmp_path / "code", 20, longest=80))
    prepared = prepare(data)
    config = tiny_config(vocab_size=272, moe=MoEConfig(4, 2, 8))
    experiment = Experiment(name="probe", model=config, data=data)
    run = RunFolder(tmp_path)
    spec = ShardingRules().spec("activations", ("batch", None))
    return make_probe(experiment, prepared, run, None, spec), random_model(config), run


def test_choices_are_those_of_the_network_on_the_same_tokens_every_time(probe_of):
    probe, model, run = probe_of
    probe(model, 5)
    probe(jax.tree.map(lambda w: w * 1.5, model), 10)
    probe(model, 15)
    found = read_choices(run)
    assert list(found) == [5, 10, 15]
    np.testing.assert_array_equal(found[5], found[15])
    assert (found[5] != found[10]).any()
    assert found[5].shape[0] == 2 and found[5].shape[2] == 2
    assert found[5].min() >= 0 and found[5].max() <= 4  # 4: padding
