"""`upcycle` turns a dense run into one with experts that has the same loss and can be trained."""

from __future__ import annotations

import json
import re

import jax
import pytest

from experiments.resolve import find_run, load_experiment, resolve
from experiments.run import prepare_data
from experiments.upcycle import upcycle_run, with_experts
from sharding.mesh import use_mesh
from tests.experiments.command_line import call, final_row, refusal, tiny_overrides, write_folder
from train.checkpoint import Checkpointer, CheckpointError
from train.program import build
from train.records import open_run, read_metrics

FINE = ("--set", "model.moe.num_experts=8", "--set", "model.moe.hidden_dim=16", "--set", "model.moe.top_k=4")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working directory with an untrained dense run, whose only checkpoint is step 7."""
    root = tmp_path_factory.mktemp("place")
    write_folder(root / "corpus")
    settings = [word for word in tiny_overrides(root) if word != "--set"]
    experiment = resolve(
        "smoke",
        [*settings, "model.moe=none", "model.mlp.hidden_dim=32", "train.steps=2", "optimizer.warmup_steps=2"],
        None,
    )
    prepared = prepare_data(experiment, lambda text: None)
    program = build(experiment)
    with open_run(root / "runs" / "dense", experiment) as run, use_mesh(program.mesh):
        prepared.tokenizer.save(run.tokenizer)
        with Checkpointer(str(run.checkpoints)) as checkpoints:
            metadata = {"data": {}, "tokenizer": prepared.tokenizer.identity, "seconds": 1.0}
            checkpoints.save(7, jax.jit(program.make_state)(), metadata=metadata)
    return root


@pytest.fixture(autouse=True)
def working_directory(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def output(place):
    """The output of the command; the run is runs/fine."""
    from contextlib import redirect_stdout
    from io import StringIO

    from experiments.__main__ import main

    out = StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.chdir(place)
        assert main(["upcycle", "dense", "--run", "fine", *FINE]) == 0
    return out.getvalue()


def test_the_new_run_matches_the_dense_one_and_records_its_origin(place, output):
    assert float(re.findall(r"largest difference of the logits .*: ([0-9.e+-]+) ", output)[0]) < 1e-5
    run = place / "runs" / "fine"
    moe = load_experiment(find_run("fine")).model.moe
    assert (moe.num_experts, moe.top_k, moe.hidden_dim) == (8, 4, 16)
    origin = {"run": "runs/dense", "step": 7, "name": "smoke"}
    (started,) = read_metrics(run / "metrics.jsonl")
    assert (
        started["event"] == "started"
        and started["upcycled_from"] == origin
        and "1/2 of its layer's MLP" in started["message"]
    )
    (step,) = (run / "checkpoints").iterdir()
    metadata = json.loads((step / "commit.json").read_text())["body"]["metadata"]
    assert step.name == "0" and metadata["upcycled_from"] == origin and metadata["data"]["step"] == 0
    assert sorted(p.name for p in (place / "runs").iterdir()) == ["dense", "fine"]


def test_runs_that_cannot_be_upcycled_are_refused_in_one_paragraph(capsys, output):
    assert "runs/fine exists already" in refusal(capsys, "upcycle", "dense", "--run", "fine", *FINE)
    assert "top_k = 3" in refusal(capsys, "upcycle", "dense", "--run", "new", *FINE, "--set", "model.moe.top_k=3")
    assert "already has experts" in refusal(capsys, "upcycle", "fine", "--run", "new")
    assert "model.num_layers = 3" in refusal(capsys, "upcycle", "dense", "--run", "new", "--set", "model.num_layers=3")
    assert "'dance' is not a run" in refusal(capsys, "upcycle", "dance", "--run", "new")


@pytest.mark.slow
def test_differing_logits_leave_no_run(place, monkeypatch):
    monkeypatch.setattr("experiments.upcycle.TOLERANCE", -1.0)
    run, dense = find_run("dense"), load_experiment(find_run("dense"))
    experiment = with_experts(dense, FINE[1::2])
    with pytest.raises(CheckpointError, match="upcycled logits differ from those of runs/dense"):
        upcycle_run(run, dense, experiment, place / "runs" / "wrong", overrides=FINE[1::2], log=lambda text: None)
    assert not (place / "runs" / "wrong").exists()


@pytest.mark.slow
def test_the_new_run_trains_from_step_0_like_any_other(place, output, capsys):
    code, out, _ = call(capsys, "train", "smoke", "--resume", "fine")
    assert code == 0 and "resuming from step 0" in out
    assert final_row(place / "runs" / "fine")["step"] == 2
    events = [row["event"] for row in read_metrics(place / "runs" / "fine" / "metrics.jsonl") if row["kind"] == "event"]
    assert events == ["started", "resumed"]


def test_without_held_out_text_the_logits_are_compared_on_training_windows(place, capsys):
    tokenizer = ("--set", "data.tokenizer.kind=saved", "--set", "data.tokenizer.path=runs/dense/tokenizer")
    code, out, err = call(
        capsys, "upcycle", "dense", "--run", "blind", *FINE, *tokenizer, "--set", "data.holdout_fraction=0"
    )
    assert code == 0, err
    assert re.search(r"largest difference of the logits .* training windows: ", out) and "blind is ready" in out


def test_a_path_below_a_file_is_refused_in_a_sentence(capsys):
    message = refusal(capsys, "upcycle", "dense", "--run", "runs/dense/config.json/new", *FINE)
    assert "runs/dense/config.json" in message
