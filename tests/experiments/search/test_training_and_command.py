"""Real trainings as trials, and the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from etils import epath

from data.config import DataConfig, SourceConfig, TokenizerConfig
from experiments.search.definition import Search
from experiments.search.space import read_space
from experiments.search.storage import SearchStore
from experiments.search.worker import Training, work
from experiments.study.storage import TrialStore
from model.config import MLPConfig
from tests.experiments.command_line import call, refusal, tiny_overrides, write_folder
from tests.train.small_runs import TINY, StopAt
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig
from train.records import read_metrics
from train.signals import StopSignal

ROOT = Path(__file__).parents[3]
RATE = "optimizer.learning_rate=log:1e-3:1e-1"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Experiment:
    folder = tmp_path_factory.mktemp("text")
    return Experiment(
        name="tiny",
        model=replace(TINY, mlp=MLPConfig(hidden_dim=16), num_layers=1),
        data=DataConfig(sources=(SourceConfig(name="code", path=str(write_folder(folder / "corpus"))),),
                        tokenizer=TokenizerConfig(kind="byte"), sequence_length=32, batch_size=8, holdout_fraction=0.1,
                        cache_dir=str(folder / "cache")),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
        train=TrainConfig(steps=12, eval_every=4, eval_windows=4, checkpoint_every=4, log_every=1),
        samples=SampleConfig(count=0),
    )  # fmt: skip


def test_trainings_report_their_evaluations_and_share_a_program(base, tmp_path):
    """Three trials: one is stopped and continues, one diverges, one is pruned. The median needs finished trials, so the
    pruned one is ended by a report that raises."""
    made = Search("tiny", "tiny", base, read_space(["optimizer.learning_rate=0.02,1e30,1e-6"]), sampler="grid",
                  pruner="none")  # fmt: skip
    training = Training(epath.Path(tmp_path / "trials"), lambda text: None)
    stopped: list[int] = []

    def objective(attempt, stop):
        rate = attempt.experiment.optimizer.learning_rate
        if rate == 0.02 and not stopped:
            stopped.append(attempt.index)
            with StopAt(7) as early:
                assert training(attempt, early) is None
            with StopSignal() as again:
                return training(attempt, again)
        if rate == 1e-6:

            def report(step, value):
                attempt.report(step, value)
                if step == 8:
                    raise optuna.TrialPruned("pruned at step 8")

            return training(replace(attempt, report=report), stop)
        return training(attempt, stop)

    with SearchStore(f"sqlite:///{tmp_path}/trials.db", made) as kept:
        assert work(kept, 3, objective, log=lambda text: None)
        by_rate = {r.values["optimizer.learning_rate"]: r for r in kept.results()}
    finished = by_rate["0.02"]
    assert finished.state == "complete" and list(finished.curve) == [4, 8, 12]
    assert finished.value == finished.figures["bits_per_byte"]
    folder = next((tmp_path / "trials").glob(f"{finished.index:04d}-*"))
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "eval"]
    assert finished.curve == {row["step"]: row["bits_per_byte"] for row in rows}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["12"]
    assert by_rate["1e30"].state == "diverged" and by_rate["1e30"].value > finished.value
    pruned = by_rate["1e-6"]
    assert pruned.state == "pruned" and list(pruned.curve) == [4, 8] and pruned.value == pruned.curve[8]
    folder = next((tmp_path / "trials").glob(f"{pruned.index:04d}-*"))
    assert (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()
    assert len(training._programs._programs) == 1


@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_dry_run_prints_the_space_and_leaves_nothing(empty, capsys):
    code, out, _ = call(
        capsys, "search", "smoke", "--space", RATE, "--space", "model.mlp.kind=swiglu,relu", "--dry-run"
    )
    assert code == 0 and "log:0.001:0.1" in out and "swiglu,relu" in out and "20 trials of 100 steps" in out
    assert not list(empty.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["smok", "--space", RATE], "did you mean 'smoke'"),
        (["smoke"], "--space: nothing varies"),
        (["smoke", "--space", "optimizer.lr_rate=log:1e-3:1e-1"], "unknown field 'optimizer.lr_rate'"),
        (["smoke", "--space", RATE, "--name", "a/b"], "--name a/b: it names a folder"),
        (["smoke", "--space", RATE, "--steps", "40"], "train.eval_every = 50 with train.steps = 40"),
        (["smoke", "--space", RATE, "--storage", "postgresql+nodriver://u:secret@127.0.0.1:1/x"], "cannot be opened"),
        (["smoke", "--space", RATE, "--to", "file/report"], "--to file/report: search.json cannot be written"),
        (["smoke", "--report"], "--report: search 'smoke' is neither in --storage"),
        (["smoke", "--space", RATE, "--set", "model.num_layer=1"], "did you mean 'model.num_layers'"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(empty, capsys, arguments, expected):
    write_folder(empty / "corpus")
    (empty / "file").write_text("")
    message = refusal(capsys, "search", *arguments, *tiny_data(empty))
    assert expected in message and "secret" not in message
    assert not (empty / "runs" / "searches").exists() and not (empty / "cache").exists()


def tiny_data(root: Path) -> list[str]:
    """Return overrides for a small corpus, so that nothing is prepared for long."""
    pairs = {"data.sources.0.name": "folder", "data.sources.0.path": root / "corpus", "data.cache_dir": root / "cache",
             "data.tokenizer.kind": "byte", "data.tokenizer.vocab_size": 256}  # fmt: skip
    return [argument for name, value in pairs.items() for argument in ("--set", f"{name}={value}")]


@pytest.mark.slow
def test_a_search_runs_continues_and_reports_from_the_command_line(empty):
    """Two workers in processes; a study in the same database is left alone."""
    write_folder(empty / "corpus")
    with TrialStore("sqlite:///runs/studies.db", "other/cpu"):
        pass
    space = ["--space", "space.json", "--pruner", "hyperband", "--workers", "2"]
    (empty / "space.json").write_text(
        json.dumps({"optimizer.learning_rate": "log:1e-3:1e-1", "model.mlp.kind": "relu,silu"})
    )

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "experiments", "search", "smoke", *arguments]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    for trials in ("3", "5"):
        done = run(*space, *tiny_overrides(empty), "--trials", trials)
        assert done.returncode == 0, done.stderr
        assert f"[{trials} of {trials} trials" in done.stdout
    folder = empty / "runs/searches/smoke"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert before["trials.csv"].count(b"\n") == 6 and {"report.md", "history.png", "slices.png"} <= set(before)
    for name in ("report.md", "history.png"):
        (folder / name).unlink()
    assert run("--report").returncode == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (empty / "runs/studies.db").unlink()
    assert run("--report").returncode == 0  # from the records alone
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
