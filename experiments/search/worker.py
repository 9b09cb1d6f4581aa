"""A worker of a search: claims trials one after another, has their values proposed, and runs them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from etils import epath

from experiments.backend import device_name
from experiments.search.space import shorten
from experiments.search.storage import SearchStore
from experiments.study.definition import Study, StudyError
from experiments.study.execute import Programs, run_trial, trial_clock
from experiments.study.trial_queue import Claimed
from experiments.study.trials import Trial, trial_id
from experiments.study.worker import POLL_SECONDS, Deadline
from train.config import Experiment
from train.hooks import Hook
from train.loop import Trainer
from train.progress import duration
from train.records import RunFolder, read_metrics
from train.signals import StopSignal

Report = Callable[[int, float], None]  # step, metric; raises optuna.TrialPruned


@dataclass(frozen=True)
class Attempt:
    """A trial that an objective runs."""

    index: int
    experiment: Experiment
    metric: str
    keep: Report  # records the metric of a step that was evaluated before
    report: Report  # records the metric of a step, and may end the trial


# Returns an outcome as run_trial does, or None if `stop` ended the trial.
Objective = Callable[[Attempt, StopSignal], Mapping[str, Any] | None]


class Training:
    """The objective of a search: trains the experiment in its run folder, or continues there."""

    def __init__(self, root: epath.Path, log: Callable[[str], None]):
        self._root, self._log, self._programs = root, log, Programs()

    def __call__(self, attempt: Attempt, stop: StopSignal) -> Mapping[str, Any] | None:
        experiment = attempt.experiment
        trial = Trial(str(attempt.index), experiment.train.seed, "compare", (), experiment, trial_id(experiment, ""))
        study = Study(experiment.name, "", "", base=experiment, arms={}, scales={}, claims=())
        folder = self._root / f"{attempt.index:04d}-{trial.id[:8]}"
        for step, value in evaluated(RunFolder(folder), attempt):
            attempt.keep(step, value)
        try:
            return run_trial(
                study, trial, folder, self._programs, log=self._warn, stop=stop, hooks=[ReportEvaluations(attempt)]
            )
        except optuna.TrialPruned:
            checkpoints = RunFolder(folder).checkpoints
            if checkpoints.exists():
                checkpoints.rmtree()  # nobody continues the run
            raise

    def _warn(self, text: str) -> None:
        if text.startswith("warning"):
            self._log(text)


def evaluated(run: RunFolder, attempt: Attempt) -> list[tuple[int, float]]:
    """Return (step, metric) of the evaluations before the end that a run folder records."""
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "eval"] if run.metrics.exists() else []
    rows = [row for row in rows if row["set"] == rows[0]["set"] and row["step"] < attempt.experiment.train.steps]
    return [(row["step"], row[attempt.metric]) for row in rows if row.get(attempt.metric) is not None]


class ReportEvaluations(Hook):
    """Reports the metric of the first held-out set at each evaluation."""

    def __init__(self, attempt: Attempt):
        self._attempt = attempt

    def on_eval(self, trainer: Trainer, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            if row["kind"] == "eval":
                self._attempt.report(step, float(row[self._attempt.metric]))
                return


def work(
    store: SearchStore, number: int, objective: Objective, *, log: Callable[[str], None], seconds: float | None = None
) -> bool:
    """Run the trials 0 to `number` - 1 until none is left or `seconds` have passed. Return whether all are done.

    Trials of dead workers are queued again. Raises StudyError if the storage fails.
    """
    ids = [str(index) for index in range(number)]
    with Deadline(seconds) as stop:
        store.enqueue(number)
        while not stop.requested:
            store.recover()
            claimed = store.claim(ids)
            if claimed is not None:
                if not _run(store, claimed, objective, log, stop):
                    return False
            else:
                counts = store.counts(ids)
                if not counts.running and not counts.waiting:
                    return not counts.failed
                time.sleep(POLL_SECONDS)
            stop.expire()
    return False


def _run(
    store: SearchStore, claimed: Claimed, objective: Objective, log: Callable[[str], None], stop: StopSignal
) -> bool:
    """Run one trial and record it. Return False if it was stopped."""
    began, clock = time.monotonic(), trial_clock()
    spent = clock()
    values: Mapping[str, Any] = {}
    try:
        with store.heartbeat(claimed):
            values = store.propose(claimed)
            experiment = store.search.trial(values)
            attempt = Attempt(
                int(claimed.id), experiment, store.search.metric,
                lambda step, value: store.keep(claimed, step, value),
                lambda step, value: store.report(claimed, step, value),
            )  # fmt: skip
            outcome = objective(attempt, stop)
    except optuna.TrialPruned as error:
        store.prune(claimed, round(clock() - spent, 2), device_name())
        log(_line(store, claimed, values, str(error), time.monotonic() - began))
        return True
    except StudyError:
        raise  # of the storage
    except (ValueError, RuntimeError, OSError) as error:
        # A fault of the trial: the others run, and the report names it.
        store.fail(claimed, f"{type(error).__name__}: {error}")
        log(_line(store, claimed, values, f"failed: {error}", time.monotonic() - began))
        return True
    if outcome is None:
        store.release(claimed)
        log(f"trial {claimed.id}: stopped; the same command continues it")
        return False
    store.finish(claimed, outcome, experiment.train.steps)
    value = outcome["figures"].get(store.search.metric, math.inf)
    shown = "diverged" if outcome["diverged"] else f"{store.search.metric.replace('_', ' ')} {value:.4f}"
    log(_line(store, claimed, values, shown, time.monotonic() - began))
    return True


def _line(store: SearchStore, claimed: Claimed, values: Mapping[str, Any], result: str, seconds: float) -> str:
    shown = ", ".join(f"{d.short} {shorten(values[d.field])}" for d in store.search.space if d.field in values)
    return f"trial {claimed.id}: {result}  ({duration(seconds)}; {shown})"
