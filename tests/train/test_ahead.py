"""A step that was compiled in a thread trains like one compiled in place, is refused for other arguments, and hides no
error."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from data.prepare import prepare
from sharding.mesh import MeshConfig
from tests.data.conftest import byte_config, write_corpus
from tests.train.small_runs import bits, experiment, run, train_rows
from train.ahead import StepCompilation, in_progress
from train.program import build


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("ahead")
    config = byte_config(root, write_corpus(root / "text", 20))
    return config, prepare(config)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=2, fsdp=1)], ids=["one device", "two devices"])
def test_a_run_is_bit_identical_and_compiles_only_in_the_thread(data, mesh, tmp_path):
    config, prepared = data
    devices = jax.devices()[: 1 if mesh == MeshConfig() else 2]
    program = build(dataclasses.replace(experiment(config, steps=3), mesh=mesh), devices=devices)
    messages: list[str] = []
    inline = run(program, prepared, tmp_path / "inline")
    ahead = dataclasses.replace(program, executables={})
    ahead.executables["step"] = StepCompilation(ahead)
    found = run(ahead, prepared, tmp_path / "ahead", messages)
    assert any("beside other work" in line for line in messages)
    assert not in_progress()
    assert bits(found.state) == bits(inline.state)
    assert train_rows(tmp_path / "ahead") == train_rows(tmp_path / "inline")


def test_another_config_is_compiled_in_place(data, tmp_path):
    """The program of a longer window was compiled; the run still trains, with its own."""
    config, prepared = data
    program = build(experiment(config, steps=1), devices=jax.devices()[:1])
    longer = dataclasses.replace(config, sequence_length=2 * config.sequence_length)
    program.executables["step"] = StepCompilation(build(experiment(longer, steps=1), devices=jax.devices()[:1]))
    messages: list[str] = []
    assert run(program, prepared, tmp_path / "run", messages).finished
    assert any(line.startswith("compiled the train step") and "beside" not in line for line in messages)


def test_an_error_of_the_thread_is_raised_by_the_run(data, tmp_path):
    config, prepared = data

    def failing(*_):
        raise ValueError("the step cannot be traced")

    program = dataclasses.replace(build(experiment(config, steps=1), devices=jax.devices()[:1]), step=failing)
    program.executables["step"] = StepCompilation(program)
    with pytest.raises(ValueError, match="cannot be traced"):
        run(program, prepared, tmp_path / "run")
