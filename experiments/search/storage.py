"""The queue and the record of a search's trials (experiments/study/trial_queue.py).

A trial is identified by its index, 0 to the number of trials - 1. Its values are proposed when it is claimed and kept
in the storage, so that a trial which is continued or repeated has the same ones.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from experiments.search.definition import Search
from experiments.search.records import Result
from experiments.search.samplers import make_pruner, make_sampler
from experiments.search.space import Dimension, SearchError
from experiments.study.trial_queue import HEARTBEAT_SECONDS, RETRIES, Claimed, TrialQueue, open_storage
from experiments.study.trials import RECIPE


class SearchStore(TrialQueue):
    """The trials of one search. Every method may raise StudyError if the storage fails."""

    def __init__(self, url: str, search: Search, heartbeat_seconds: int = HEARTBEAT_SECONDS):
        super().__init__(url, search.study_name, RECIPE, heartbeat_seconds)
        self.search = self._recorded(search)
        self._study.pruner = make_pruner(self.search)

    def _recorded(self, search: Search) -> Search:
        """Record the search, or return the recorded one. Raises SearchError if they differ."""
        with self._failures(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            text = self._study.user_attrs.get("search")
            if text is None:
                self._study.set_user_attr("search", search.to_json())
                self._study.set_metric_names([search.metric])
                return search
            recorded = _read(text, search.name)
            refuse_others(recorded, search)
            if search.data and not recorded.data:
                recorded = replace(recorded, data=search.data)
                self._study.set_user_attr("search", recorded.to_json())
            return recorded

    def enqueue(self, number: int) -> int:
        """Queue the trials 0 to `number` - 1 that are not recorded yet, in order. Return how many were queued."""
        points = self.search.grid() if self.search.sampler == "grid" else [{}] * number
        return self.add([(str(index), {}, points[index]) for index in range(number)])

    def propose(self, claimed: Claimed) -> dict[str, Any]:
        """Return the values of a trial by field: those that it already has, or new ones from the sampler."""
        with self._failures(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = self._open(int(claimed.id))
            trial = optuna.trial.Trial(study, claimed.key)
            return {dimension.field: _suggested(trial, dimension) for dimension in self.search.space}

    def _open(self, index: int) -> optuna.Study:
        """Return the study of Optuna with the sampler of a trial and the newest trials."""
        study = optuna.load_study(
            study_name=self.name, storage=self._storage, sampler=make_sampler(self.search, index),
            pruner=self._study.pruner,
        )  # fmt: skip
        study.get_trials(deepcopy=False)  # Optuna's cache may write to trials that it has read
        return study

    def keep(self, claimed: Claimed, step: int, value: float) -> None:
        """Record the metric of a running trial at a step."""
        with self._failures():
            self._storage.set_trial_intermediate_value(claimed.key, step, value)

    def report(self, claimed: Claimed, step: int, value: float) -> None:
        """Record the metric of a running trial at a step. Raises optuna.TrialPruned if the trial should end."""
        self.keep(claimed, step, value)
        if self.search.pruner == "none":
            return
        with self._failures(), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self._study.pruner.prune(self._study, self._storage.get_trial(claimed.key)):
                raise optuna.TrialPruned(f"pruned at step {step}")

    def finish(self, claimed: Claimed, outcome: Mapping[str, Any], step: int) -> None:
        """Record the outcome of a trial at its last step, as of experiments.study.execute.run_trial."""
        value = outcome["figures"].get(self.search.metric, float("inf"))
        kept = {name: outcome[name] for name in ("figures", "diverged", "seconds", "device")}
        curve = {} if outcome["diverged"] else {step: value}
        self.record(claimed, TrialState.COMPLETE, value, {"outcome": kept}, curve)

    def prune(self, claimed: Claimed, seconds: float, device: str) -> None:
        """Record that a trial ended at its last report."""
        with self._failures():
            curve = self._storage.get_trial(claimed.key).intermediate_values
        kept = {"figures": {}, "diverged": False, "seconds": seconds, "device": device}
        last = curve[max(curve)]
        self.record(claimed, TrialState.PRUNED, math.inf if math.isnan(last) else last, {"outcome": kept}, {})

    def results(self) -> list[Result]:
        """Return what is recorded of the trials that ended, by index."""
        failures = self.failures()
        with self._failures():
            ended = {
                int(t.user_attrs["id"]): t
                for t in self._trials()
                if t.state.is_finished() and "duplicate_of" not in t.user_attrs
            }
            waiting = {int(t.user_attrs["id"]) for t in self._trials() if not t.state.is_finished()}
        return [
            _result(index, trial, failures.get(str(index), f"its worker died {RETRIES + 1} times"))
            for index, trial in sorted(ended.items())
            if index not in waiting
        ]


def _suggested(trial: optuna.trial.Trial, dimension: Dimension) -> Any:
    if dimension.kind == "choice":
        return trial.suggest_categorical(dimension.field, dimension.choices)
    if dimension.kind == "int":
        return trial.suggest_int(dimension.field, int(dimension.low), int(dimension.high), step=dimension.step)
    return trial.suggest_float(dimension.field, dimension.low, dimension.high, log=dimension.kind == "log")


def _result(index: int, trial: FrozenTrial, error: str) -> Result:
    if trial.state == TrialState.FAIL:
        return Result(index, "failed", trial.params, None, {}, {}, error=error)
    outcome = trial.user_attrs["outcome"]
    state = "diverged" if outcome["diverged"] else "pruned" if trial.state == TrialState.PRUNED else "complete"
    ended = trial.datetime_complete
    return Result(
        index, state, trial.params, trial.value, dict(sorted(trial.intermediate_values.items())), outcome["figures"],
        outcome["seconds"], outcome["device"], date="" if ended is None else ended.date().isoformat(),
    )  # fmt: skip


def recorded_search(url: str, name: str) -> Search | None:
    """Return the search of a name that a storage holds, or None. Raises StudyError if the storage cannot be used."""
    storage = open_storage(url)
    try:
        study_id = storage.get_study_id_from_name(f"search/{name}")
        text = storage.get_study_user_attrs(study_id).get("search")
        return None if text is None else _read(text, name)
    except KeyError:
        return None
    finally:
        storage.remove_session()
        storage.engine.dispose()


def refuse_others(recorded: Search, search: Search) -> None:
    """Raise SearchError if two searches of one name would mix unequal trials."""
    if differences := recorded.differences(search):
        raise SearchError(
            f"search {search.name!r} exists with other trials: {'; '.join(differences)}. Give this search a name with "
            "--name NAME, or repeat the first command to continue that one"
        )


def _read(text: str, name: str) -> Search:
    try:
        return Search.from_json(text)
    except (ValueError, KeyError, TypeError) as error:
        raise SearchError(
            f"search {name!r} was recorded by another version of this code, and cannot continue ({error}). Give this "
            "search another name with --name NAME"
        ) from error
