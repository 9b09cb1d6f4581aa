"""The end of a run: a stop in its last evaluation, no held-out text, full disks, and sampling on other devices."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.resolve import resolve
from experiments.run import prepare_data, run_experiment
from sharding.mesh import use_mesh
from tests.experiments.command_line import final_row, tiny_overrides, write_folder
from train.checkpoint import Checkpointer
from train.program import build
from train.records import RunFolder, RunFolderError, open_run, read_metrics
from train.signals import StopSignal

ROOT = Path(__file__).parents[2]
TINY = ["model.num_layers=1", "train.steps=2", "samples.count=0", "optimizer.warmup_steps=1"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    write_folder(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tiny(place, *settings: str):
    return resolve("smoke", [*(word for word in tiny_overrides(place) if word != "--set"), *TINY, *settings], None)


def test_a_run_stopped_in_its_last_evaluation_can_be_finished(place):
    experiment, lines = tiny(place, "model.moe=none", "model.mlp.hidden_dim=32"), []

    def log(text: str) -> None:
        lines.append(text)
        if "evaluating on all held-out files" in text and not any("stopped" in line for line in lines):
            os.kill(os.getpid(), signal.SIGTERM)

    start = lambda: run_experiment(experiment, place / "run", overrides=[], override=False, log=log)
    assert start() is False and StopSignal.last_number == signal.SIGTERM
    rows = read_metrics(place / "run" / "metrics.jsonl")
    assert [row["event"] for row in rows if row["kind"] == "event"][-1] == "stopped"
    assert not any(row["kind"] == "final" for row in rows)
    assert start() is True
    assert final_row(place / "run")["step"] == 2 and StopSignal.last_number is None


def test_a_run_with_experts_finishes_without_held_out_text(place):
    lines: list[str] = []
    experiment = tiny(place, "data.holdout_fraction=0")
    assert experiment.model.moe is not None
    assert run_experiment(experiment, place / "run", overrides=[], override=False, log=lines.append)
    assert final_row(place / "run")["sets"] == {} and any("no text is held out" in line for line in lines)


@pytest.mark.slow
def test_a_run_of_eight_devices_is_sampled_and_evaluated_on_one(place):
    experiment = tiny(place, "mesh.fsdp=4", "mesh.data=2")
    prepared, program = prepare_data(experiment, lambda text: None), build(experiment)
    with open_run(place / "runs" / "mine", experiment) as run, use_mesh(program.mesh):
        prepared.tokenizer.save(run.tokenizer)
        with Checkpointer(str(run.checkpoints)) as checkpoints:
            metadata = {"data": {}, "tokenizer": prepared.tokenizer.identity, "seconds": 1.0}
            checkpoints.save(2, jax.jit(program.make_state)(), metadata=metadata)
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    for words in (["generate", "mine", "--prompt", "x", "--max-new-tokens", "2"], ["eval", "mine"]):
        done = subprocess.run(
            [sys.executable, "-m", "experiments", *words], cwd=place, env=environment, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        assert "does not fit 1 devices; using one device" in done.stdout


def test_an_unwritable_file_of_the_run_ends_it_with_a_sentence(place):
    """At its start and at its end; a directory in place of the file simulates a full disk."""
    experiment, lines = tiny(place, "model.moe=none", "model.mlp.hidden_dim=32"), []
    folder = place / "run"

    def log(text: str) -> None:
        lines.append(text)
        if "evaluating on all held-out files" in text and len(lines) < 20:
            (folder / "samples.jsonl").mkdir()

    start = lambda: run_experiment(experiment, folder, overrides=[], override=False, log=log)
    (folder / "environment.json").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"run folder .* cannot be written .*start the same command again"):
        start()
    (folder / "environment.json").rmdir()
    with pytest.raises(RunFolderError, match=r"cannot be written .*samples\.jsonl.*start the same command again"):
        start()
    assert not RunFolder(folder).finished
    (folder / "samples.jsonl").rmdir()
    lines[:] = [""] * 20
    assert start() is True and RunFolder(folder).finished_step == 2
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "event", "event": "a row without a step"}\n')
    assert start() is True and "is finished" in lines[-1]
