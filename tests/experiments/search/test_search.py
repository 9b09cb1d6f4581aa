"""Searches over a formula: proposals, pruning, resuming, several workers, failures."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

from experiments.search.samplers import STARTUP_TRIALS, make_sampler
from experiments.search.storage import SearchStore, recorded_search
from experiments.search.worker import Attempt
from experiments.study.definition import StudyError
from tests.experiments.search.closed_form import LOG, SECONDS, STEPS, loss, objective, search, store, url, work
from train.config_io import flatten

NUMBERS = ("optimizer.learning_rate=log:1e-4:1e-1", "optimizer.weight_decay=uniform:0:0.3")
MEMORY = "sqlite:///:memory:"  # no disk: for searches that one process runs once


def in_memory(made=None) -> SearchStore:
    return SearchStore(MEMORY, search() if made is None else made)


def proposals(kept: SearchStore) -> list[dict]:
    return [dict(result.values) for result in kept.results()]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random"])
@pytest.mark.parametrize("pruner", ["none", "hyperband"])
def test_every_sampler_proposes_values_of_the_space(sampler, pruner):
    space = NUMBERS if sampler == "cmaes" else (*NUMBERS, "model.num_layers=int:2:6:2")
    with in_memory(search(*space, sampler=sampler, pruner=pruner)) as kept:
        assert work(kept, 4)
        for result in kept.results():
            assert 1e-4 <= result.values["optimizer.learning_rate"] <= 1e-1
            assert 0 <= result.values["optimizer.weight_decay"] <= 0.3
            assert result.values.get("model.num_layers", 2) in (2, 4, 6)
        assert len({str(values) for values in proposals(kept)}) == 4


def best(sampler: str, seed: int, trials: int) -> float:
    """Return the lowest loss that a sampler finds, without a database."""
    made = search(sampler=sampler, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study()
        for index in range(trials):
            study.sampler = make_sampler(made, index)
            trial = study.ask({d.field: d.distribution() for d in made.space})
            ignore = lambda step, value: None
            study.tell(trial, loss(Attempt(index, made.trial(trial.params), "loss", ignore, ignore)))
    return study.best_value


def test_tpe_finds_the_optimum_closer_than_random_values_at_equal_trials():
    """The median over 5 seeds: a single search may be lucky."""
    found = {sampler: np.median([best(sampler, seed, 45) for seed in range(5)]) for sampler in ("tpe", "random")}
    assert found["tpe"] < 1.05 and found["tpe"] - 1 < (found["random"] - 1) / 2, found


def test_the_same_seed_proposes_the_same_trials_however_often_it_is_interrupted(tmp_path):
    number = STARTUP_TRIALS + 2  # the last ones depend on the results of the others
    with in_memory() as whole:
        assert work(whole, number)
        expected = proposals(whole)
    for part in (number - 1, number):
        with store(tmp_path) as kept:
            assert work(kept, part)
    with store(tmp_path) as kept, in_memory(search(seed=1)) as other:
        assert proposals(kept) == expected
        assert work(other, 1) and proposals(other)[0] != expected[0]


def test_a_grid_is_covered_exactly_once_by_two_workers(tmp_path):
    made = search("model.num_layers=int:1:3", "model.mlp.kind=swiglu,relu", sampler="grid")
    outcome = {"figures": {"bits_per_byte": 1.0}, "diverged": False, "seconds": 1.0, "device": ""}
    found = []
    with store(tmp_path, made) as first, store(tmp_path, made) as second:
        assert first.enqueue(6) == 6 and second.enqueue(6) == 0
        claimed = [(kept, kept.claim()) for kept in (first, second)]
        while claimed:
            kept, each = claimed.pop(0)
            found.append(tuple(kept.propose(each).values()))
            if (following := kept.claim()) is not None:
                claimed.append((kept, following))
            kept.finish(each, outcome, 500)
    assert sorted(found) == [(n, kind) for n in (1, 2, 3) for kind in ("relu", "swiglu")]


def test_the_median_prunes_bad_trials_and_keeps_the_best():
    with in_memory(search(pruner="median", sampler="random")) as kept:
        assert work(kept, 15)
        results = kept.results()
    pruned = [r for r in results if r.state == "pruned"]
    finished = [r for r in results if r.state == "complete"]
    made = search()
    ignore = lambda step, value: None
    losses = {r.index: loss(Attempt(r.index, made.trial(r.values), "loss", ignore, ignore)) for r in results}
    assert len(pruned) >= 3 and min(losses, key=losses.__getitem__) in [r.index for r in finished]
    for r in pruned:
        step = max(r.curve)
        before = [f.curve[step] for f in finished if f.index < r.index]
        assert r.value == r.curve[step] > np.median(before) and step > 500 // 4 - 100
        assert losses[r.index] > np.median([losses[f.index] for f in finished if f.index < r.index])
    for r in finished:
        assert r.value == losses[r.index] and list(r.curve) == [*STEPS, 500]


def test_the_same_command_continues_and_another_search_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    lines = lambda: (tmp_path / "log").read_text().splitlines()
    with store(tmp_path) as kept:
        assert work(kept, 2) and len(lines()) == 2
    with store(tmp_path, search(data="known")) as kept:
        assert work(kept, 2) and len(lines()) == 2  # done already
        assert work(kept, 3) and len(lines()) == 3
    assert recorded_search(url(tmp_path), "formula") == search(data="known")
    assert recorded_search(url(tmp_path), "other") is None
    with pytest.raises(StudyError, match="--name NAME") as error:
        store(tmp_path, search(NUMBERS[0]))
    assert "the space was" in str(error.value)
    base = replace(search().base, optimizer=replace(search().base.optimizer, epsilon=1e-7))
    with pytest.raises(StudyError, match=r"optimizer\.epsilon was 1e-08 and is 1e-07"):
        store(tmp_path, search(base=base))
    with pytest.raises(StudyError, match="the text of the data has changed"):
        store(tmp_path, search(data="another"))
    with store(tmp_path, search(NUMBERS[0], name="formula-rate")) as separate:
        assert separate.counts([]) == (0, 0, 0, 0)


def test_a_stopped_trial_continues_with_its_values(tmp_path):
    seen = []

    def stops_first(attempt, stop):
        seen.append(flatten(attempt.experiment)["optimizer.learning_rate"])
        return None if len(seen) == 1 else objective(attempt, stop)

    with store(tmp_path) as kept:
        assert not work(kept, 2, objective=stops_first)
        assert kept.counts(["0", "1"]).waiting == 2
        assert work(kept, 2, objective=stops_first)
    assert seen[0] == seen[1] != seen[2]


def test_divergence_is_a_value_and_a_failure_is_named_and_repeated_on_request():
    broken = [True]

    def third_fails(attempt, stop):
        if attempt.index == 2 and broken:
            raise ValueError("too large")
        return objective(attempt, stop)

    with in_memory(search("optimizer.learning_rate=0.01,0.095", sampler="grid")) as kept:
        assert work(kept, 2)
        assert sorted((r.state, r.value) for r in kept.results())[1] == ("diverged", 8.0)
    with in_memory(search("optimizer.learning_rate=log:1e-3:1e-2:4", sampler="grid")) as kept:
        assert not work(kept, 4, objective=third_fails)
        failed = [r for r in kept.results() if r.state == "failed"]
        assert [(r.index, r.error) for r in failed] == [(2, "ValueError: too large")]
        assert kept.counts([str(i) for i in range(4)]).done == 3
        broken.clear()
        assert kept.retry_failed() == 1 and work(kept, 4, objective=third_fails)
        again = kept.results()
        assert [r.state for r in again] == ["complete"] * 4 and again[2].values == failed[0].values
        assert len({result.values["optimizer.learning_rate"] for result in again}) == 4


def worker(folder: Path, number: int, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.experiments.search.closed_form", url(folder), str(number)]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment)


@pytest.mark.slow
def test_killed_workers_lose_no_trial(tmp_path):
    """Random workers are killed; every trial is recorded once, with the values that it had at first."""
    number, kills, chance = 10, 3, random.Random(0)
    start = lambda: worker(tmp_path, number, **{LOG: str(tmp_path / "log"), SECONDS: "1"})
    with store(tmp_path) as kept:
        kept.enqueue(number)
        running, deadline = [start() for _ in range(2)], time.monotonic() + 200
        ids = [str(index) for index in range(number)]
        while kept.counts(ids).done < number and time.monotonic() < deadline:
            if kills and kept.counts(ids).running:
                time.sleep(chance.uniform(0.2, 1.0))
                victim = chance.randrange(len(running))
                running[victim].send_signal(signal.SIGKILL)
                running[victim].wait()
                running[victim], kills = start(), kills - 1
            time.sleep(0.3)
        assert all(process.wait(timeout=60) == 0 for process in running) and not kills
        results = kept.results()
    assert [r.index for r in results] == list(range(number)) and {r.state for r in results} <= {"complete", "diverged"}
    logged = {line.split()[0]: float(line.split()[1]) for line in (tmp_path / "log").read_text().splitlines()}
    assert len(logged) == number and all(logged[str(r.index)] == r.value for r in results if r.state == "complete")


def test_storages_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(StudyError, match="cannot be opened"):
        recorded_search("postgresql+nodriver://user:secret@127.0.0.1:1/x", "formula")
    store(tmp_path)
    with sqlite3.connect(tmp_path / "trials.db") as database:
        database.execute("update study_user_attributes set value_json = '\"{}\"' where key = 'search'")
    with pytest.raises(StudyError, match="recorded by another version of this code"):
        store(tmp_path)
    with sqlite3.connect(tmp_path / "trials.db") as database:
        database.execute("update alembic_version set version_num = 'v2.6.0.a'")
    with pytest.raises(StudyError, match="optuna storage upgrade"):
        store(tmp_path)
