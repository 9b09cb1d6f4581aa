"""Trials under one vmap equal trials alone, in their records too, and do not affect each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from experiments.run import prepare_data
from experiments.study.definition import Scale, Study
from experiments.study.execute import Programs, program_key, run_trial, trial_folder
from experiments.study.records import export, read
from experiments.study.report import write_report
from experiments.study.storage import TrialStore
from experiments.study.together import claim_group, run_together
from experiments.study.trials import Outcome, Trial, plan, seeded, trial_id
from experiments.study.worker import work
from model.config import MoEConfig
from tests.experiments.study.small_study import STUDY, job
from tests.experiments.study.tiny import tiny_study
from tests.train.small_runs import StopAt
from train.config import Experiment
from train.config_io import replace_fields, save_json
from train.program import build
from train.records import read_metrics
from train.run_folder import RunFolder
from train.signals import StopSignal
from train.together import Member, train_together

RATE, DECAY, Z_LOSS = "optimizer.learning_rate", "optimizer.weight_decay", "train.z_loss"
RELATIVE = 1e-5  # batched matmuls add in another order; seen: 1e-6 for losses, 3e-6 for gradient norms
ROUNDED = 1e-5  # of curves, which are recorded with six digits: a last digit may differ, too


def tolerance(name: str) -> float:
    """Return the largest relative difference of a metric. Gradients are sums that cancel."""
    return 10 * RELATIVE if "grad_norm" in name else RELATIVE


def silent(text: str) -> None:
    """Log nothing."""


class Bench:
    """Runs trials of one base alone and together, with programs that are compiled once."""

    def __init__(self, base: Experiment, coefficients: Sequence[dict[str, float]]):
        self.study = Study(name="tiny", question="", source="", base=base, arms={"a": {}},
                           scales={"cpu": Scale(tokens=12 * 8 * 32, seeds=2)}, claims=())  # fmt: skip
        self.base = replace_fields(self.study.experiments("cpu")["a"], coefficients[0])
        self.programs = Programs(jax.devices()[:1])
        self.coefficients = coefficients
        self.fingerprint = prepare_data(self.base, silent).identity

    def trial(self, rate: float, seed: int, decay: float = 0.1, coefficients: int = 0) -> Trial:
        changes = {RATE: rate, DECAY: decay, **self.coefficients[coefficients]}
        made = seeded(replace_fields(self.base, changes), seed)
        assert program_key(made) == program_key(self.base)
        return Trial(f"{rate:g} {decay:g}", seed, "compare", (), made, trial_id(made, self.fingerprint))

    def folder(self, root: Path, trial: Trial) -> epath.Path:
        return trial_folder(epath.Path(root), "tiny", "cpu", trial)

    def alone(self, root: Path, trial: Trial, stop: StopSignal | None = None) -> dict[str, Any] | None:
        with StopSignal() if stop is None else stop as stop:
            return run_trial(
                self.study, trial, self.folder(root, trial), self.programs, log=silent, stop=stop
            )  # fmt: skip

    def together(self, root: Path, *trials: Trial, stop: StopSignal | None = None) -> list[Any]:
        with StopSignal() if stop is None else stop as stop:
            folders = [self.folder(root, trial) for trial in trials]
            return run_together(self.study, trials, folders, self.programs, [silent] * len(trials), stop)

    def rows(self, root: Path, trial: Trial) -> dict[tuple, dict[str, Any]]:
        """Return the train and evaluation rows of a trial without rates and times, by kind and step."""
        rows = read_metrics(RunFolder(self.folder(root, trial)).metrics)
        left_out = ("time", "tokens_per_second", "mfu")
        return {(row["kind"], row["step"]): {k: v for k, v in row.items() if k not in left_out}
                for row in rows if row["kind"] in ("train", "eval")}  # fmt: skip


@pytest.fixture(scope="module", params=["dense", "moe with Muon"])
def bench(request, tmp_path_factory) -> Bench:
    base = tiny_study(tmp_path_factory.mktemp(request.param), seeds=2).base
    if request.param == "dense":
        return Bench(base, [{Z_LOSS: 1e-4}, {Z_LOSS: 1e-2}])
    experts = MoEConfig(num_experts=4, top_k=2, hidden_dim=16)
    coefficients = [{Z_LOSS: z, "model.moe.load_balance": 10 * z, "model.moe.z_loss": z} for z in (1e-3, 1e-2)]
    base = replace(base, model=replace(base.model, moe=experts), optimizer=replace(base.optimizer, name="muon"))
    return Bench(base, coefficients)


@pytest.fixture(scope="module")
def alone(bench, tmp_path_factory) -> tuple[Path, list[Trial], list[dict[str, Any]]]:
    """Trials that differ in all traced scalars, each run alone: their folder and outcomes. The last one diverges."""
    trials = [bench.trial(0.01, 0), bench.trial(0.02, 1, decay=0.5, coefficients=1), bench.trial(0.005, 1),
              bench.trial(1e30, 0)]  # fmt: skip
    root = tmp_path_factory.mktemp("alone")
    return root, trials, [bench.alone(root, trial) for trial in trials]


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare outcomes: figures and curves up to rounding, and what does not round exactly."""
    assert found["diverged"] == expected["diverged"] and list(found["figures"]) == list(expected["figures"])
    for name, value in found["figures"].items():
        assert value == pytest.approx(expected["figures"][name], rel=tolerance(name)), name
    assert list(found["curves"]) == list(expected["curves"])
    for name, curve in found["curves"].items():
        limit = tolerance(name) + ROUNDED
        np.testing.assert_allclose(curve, expected["curves"][name], rtol=limit, err_msg=name)


def assert_rows_equal(found: dict[tuple, dict], expected: dict[tuple, dict]) -> None:
    assert list(found) == list(expected)
    for key, row in found.items():
        assert list(row) == list(expected[key])
        for name, value in row.items():
            if isinstance(value, float):
                assert value == pytest.approx(expected[key][name], rel=tolerance(name)), (key, name)


def test_trials_together_equal_trials_alone(bench, alone, tmp_path):
    root, trials, expected = alone
    first, second, third, bad = trials
    found = bench.together(tmp_path / "with bad", first, second, bad)
    for outcome, want in zip(found, [*expected[:2], expected[3]], strict=True):
        assert_equal(outcome, want)
        assert outcome["together"] == 3
    assert [outcome["diverged"] for outcome in found] == [False, False, True]
    assert len({outcome["seconds"] for outcome in found}) == 1
    for trial in (first, second, bad):
        assert_rows_equal(bench.rows(tmp_path / "with bad", trial), bench.rows(root, trial))
    # The rows of a batched operation are independent: a trial that diverges changes no bit of the others.
    again = bench.together(tmp_path / "without", first, second, third)
    assert [outcome["figures"] for outcome in again[:2]] == [outcome["figures"] for outcome in found[:2]]
    assert_equal(again[2], expected[2])


@pytest.mark.parametrize("bench", ["dense"], indirect=True)
def test_a_trial_moves_between_a_group_and_a_process_of_its_own(bench, alone, tmp_path):
    """At any step: the trials of a group may be at different ones."""
    _, trials, expected = alone
    first, second, third, _ = trials
    assert bench.alone(tmp_path, third, StopAt(2)) is None
    assert bench.together(tmp_path, first, second, third, stop=StopAt(7)) == [None, None, None]
    last = [max(step for kind, step in bench.rows(tmp_path, trial) if kind == "train") for trial in trials[:3]]
    assert last == [5, 5, 7]  # each stopped after five steps of the group
    assert_equal(bench.alone(tmp_path, first), expected[0])
    found = bench.together(tmp_path, first, second, third)  # the first one is finished
    for outcome, want in zip(found, expected[:3], strict=True):
        assert_equal(outcome, want)


def make_foreign(folder: epath.Path, experiment: Experiment) -> None:
    """Make the run folder of another experiment."""
    run = RunFolder(folder)
    run.path.mkdir(parents=True)
    save_json(experiment, run.config)
    run.metrics.write_text('{"kind": "event", "step": 0, "event": "started"}\n')


@pytest.mark.parametrize("bench", ["dense"], indirect=True)
def test_what_ends_one_trial_does_not_end_the_others(bench, alone, tmp_path):
    _, trials, expected = alone
    make_foreign(bench.folder(tmp_path, trials[1]), trials[0].experiment)
    found = bench.together(tmp_path, *trials[:3], trials[3])
    assert "belongs to another config" in str(found[1])
    for i in (0, 2, 3):
        assert_equal(found[i], expected[i])
        assert found[i]["together"] == 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Study:
    return tiny_study(tmp_path_factory.mktemp("tiny"), seeds=2)


def outcomes(study: Study, folder: Path, vectorize: int) -> tuple[list[Outcome], Path]:
    """Return what a worker records that trains up to `vectorize` trials together, and its CSV file."""
    made = job(f"sqlite:///{folder}/{vectorize}.db", folder / str(vectorize), study, vectorize)
    lines: list[str] = []
    assert work(made, log=lines.append, devices=jax.devices()[:1])
    assert sum("bits per byte" in line for line in lines) == 6 and not any("failed" in line for line in lines)
    with TrialStore(made.url, made.name) as store:
        found = store.outcomes()
        trials, _ = plan(study, "cpu", lambda experiment: prepare_data(experiment, silent).identity, found)
        return found, export(made, store, trials, folder / f"docs {vectorize}")


def test_a_vectorized_study_has_the_records_of_a_serial_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.study.launch.load_study", lambda name: tiny)
    (serial, serial_file), (together, file) = (outcomes(tiny, tmp_path, k) for k in (1, 3))
    assert [(o.arm, o.seed, o.id) for o in together] == [(o.arm, o.seed, o.id) for o in serial]
    for found, expected in zip(together, serial, strict=True):
        assert_equal(found.__dict__, expected.__dict__)
    assert {o.together for o in serial} == {1} and {o.together for o in together} == {3}
    assert {o.together for o in read(file).outcomes} == {3}
    assert "together" not in serial_file.read_text()  # as in files that were written before there was --vectorize
    assert "6 of the trials were trained up to 3 at a time" in write_report(tiny, file).read_text()
    assert "at a time" not in write_report(tiny, serial_file).read_text()


def test_a_trial_that_cannot_run_together_runs_alone(tiny, tmp_path):
    """Its fault counts only if it fails there, too."""
    study = replace(tiny, scales={"cpu": Scale(tokens=12 * 8 * 32, seeds=1)})
    made = job(f"sqlite:///{tmp_path}/trials.db", tmp_path, study, vectorize=2)
    trials, _ = plan(study, "cpu", lambda experiment: prepare_data(experiment, silent).identity, [])
    high = trials[1]
    make_foreign(trial_folder(made.root, "tiny", "cpu", high), study.base)
    lines: list[str] = []
    assert not work(made, log=lines.append, devices=jax.devices()[:1])
    assert any("did not end in a group of 2" in line and line.startswith(high.label) for line in lines)
    with TrialStore(made.url, made.name) as store:
        assert store.counts([trial.id for trial in trials]) == (0, 0, 2, 1)
        assert "belongs to another config" in store.failures()[high.id]


def test_a_worker_claims_trials_of_one_program_in_order(tmp_path):
    trials, _ = plan(STUDY, "cpu", lambda experiment: "", [])
    with TrialStore(f"sqlite:///{tmp_path}/trials.db", "small_study/cpu") as store:
        store.enqueue(trials)
        by_id = {trial.id: trial for trial in trials}
        taken = [[by_id[each.id].label for each in claim_group(store, trials, most)] for most in (3, 3, 1, 8)]
        assert taken[0] == ["low, seed 0", "high, seed 0", "low, seed 1"]
        assert taken[1] == ["same, seed 0", "same, seed 1", "same, seed 2"]  # another epsilon, another program
        assert taken[2] == ["high, seed 1"]
        assert taken[3] == ["low, seed 2", "high, seed 2", "low, seed 3", "high, seed 3"]
        assert [by_id[each.id].label for each in claim_group(store, trials, 8)] == ["same, seed 3"]
        assert claim_group(store, trials, 8) == []


def test_several_devices_train_one_trial_at_a_time(tiny, tmp_path):
    lines: list[str] = []
    assert work(job(f"sqlite:///{tmp_path}/trials.db", tmp_path, vectorize=3), log=lines.append)
    assert "--vectorize 3: this worker has 8 devices" in lines[0] and len(lines) == 13
    program, prepared = build(replace_fields(tiny.base, {"data.batch_size": 8})), prepare_data(tiny.base, silent)
    with StopSignal() as stop, pytest.raises(ValueError, match="several devices"):
        train_together([Member(program, RunFolder(tmp_path / "run"), silent)], prepared, stop=stop)
