"""The router probe records the choices of experts at each evaluation."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from data.config import DataConfig
from data.prepare import Prepared, prepare
from model.config import MoEConfig
from sharding.collectives import read_collectives
from sharding.mesh import MeshConfig, use_mesh
from tests.data.conftest import byte_config, write_corpus
from tests.models import random_model, tiny_config
from train.config import Experiment
from train.program import build_network
from train.records import RunFolder
from train.routing import RouterProbe, first_rows, read_choices

CONFIG = tiny_config(vocab_size=272, moe=MoEConfig(4, 2, 8))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[DataConfig, Prepared]:
    root = tmp_path_factory.mktemp("routing")
    data = byte_config(root, write_corpus(root / "code", 20, longest=80))
    return data, prepare(data)


def probe_of(prepared, folder, mesh: MeshConfig, devices: int, warnings: list[str], tokens: int = 2048) -> RouterProbe:
    data, text = prepared
    experiment = Experiment(name="probe", model=CONFIG, data=replace(data, batch_size=8), mesh=mesh)
    network = build_network(experiment, devices=jax.devices()[:devices])
    return RouterProbe(network, text, RunFolder(folder), warnings.append, tokens)


def test_choices_are_recorded_for_the_same_tokens_every_time(prepared, tmp_path):
    probe, model = probe_of(prepared, tmp_path, MeshConfig(), 1, []), random_model(CONFIG)
    probe(model, 5)
    probe(jax.tree.map(lambda w: w * 1.5, model), 10)
    probe(model, 15)
    found = read_choices(RunFolder(tmp_path))
    assert list(found) == [5, 10, 15]
    np.testing.assert_array_equal(found[5], found[15])
    assert (found[5] != found[10]).any()
    assert found[5].shape[0] == 2 and found[5].shape[2] == 2
    assert found[5].min() >= 0 and found[5].max() <= 4  # 4: padding


def test_only_the_recorded_rows_leave_the_devices(prepared, tmp_path):
    """On a mesh, the choices equal those on one device, and the probe sends only the recorded rows, not the batch."""
    model = random_model(CONFIG)
    alone = probe_of(prepared, tmp_path / "one", MeshConfig(), 1, [], 64)  # two rows of 32
    spread = probe_of(prepared, tmp_path / "eight", MeshConfig(fsdp=8), 8, [], 64)
    assert alone.rows == spread.rows == 2
    for probe, folder in ((alone, "one"), (spread, "eight")):
        (tmp_path / folder).mkdir()
        network = probe._network
        there = jax.tree.map(lambda w, x: jax.device_put(w, x.sharding), model, network.abstract_model)
        probe(there, 1)
    one, eight = (read_choices(RunFolder(tmp_path / folder))[1] for folder in ("one", "eight"))
    np.testing.assert_array_equal(one, eight)
    with use_mesh(network.mesh):
        sharding = NamedSharding(network.mesh, P(None, "fsdp"))
        choices = jax.ShapeDtypeStruct((2, 8, 32, 2), np.int32, sharding=sharding)
        text = jax.jit(lambda x: first_rows(x, 2)).lower(choices).compile().as_text()
    assert 0 < read_collectives(text).output_bytes <= 4 * one.size < 4 * choices.size


def test_a_full_disk_loses_choices_but_does_not_stop_the_run(prepared, tmp_path):
    warnings: list[str] = []
    probe = probe_of(prepared, tmp_path, MeshConfig(), 1, warnings)
    (tmp_path / "routing").write_text("in the way")  # raises OSError, as a full disk does
    assert probe(random_model(CONFIG), 5) == []
    assert len(warnings) == 1 and "choices at step 5 were not written" in warnings[0]
