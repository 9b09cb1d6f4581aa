"""Trials of a study: which there are, in which order they run, and what identifies them.

The order is seed-major: all arms of seed 0, then all of seed 1. An interrupted study is therefore balanced and paired.
A study with `tune` has two stages: each arm is first trained with every value and other seeds; the comparison
then takes the best value of each arm, and is planned once those trials are done.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.study.definition import Study, identity
from train.config import Experiment
from train.config_io import flatten, replace_fields

# Raise it when the same config no longer trains the same weights, up to rounding: trials of two recipes are not mixed.
RECIPE = 1
TUNE_SEED = 1000  # the first seed of the tuning stage
Stage = Literal["tune", "compare"]


@dataclass(frozen=True)
class Trial:
    """One training run of a study."""

    arm: str
    seed: int
    stage: Stage
    tuned: tuple[tuple[str, Any], ...]  # the values of the tuned fields
    experiment: Experiment
    id: str  # 16 hex digits of everything that decides its result

    @property
    def label(self) -> str:
        """The arm, tuned values and seed, for people."""
        tuned = "".join(f", {name.rpartition('.')[2]} {value:g}" for name, value in self.tuned)
        return f"{self.arm}{tuned}, seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What is recorded of a finished trial."""

    arm: str
    seed: int
    stage: Stage
    id: str
    tuned: Mapping[str, Any]
    figures: Mapping[str, float]  # at the end, by metric
    curves: Mapping[str, Sequence[float]]  # by metric, beside "step" and "tokens"
    arrays: Mapping[str, Any]  # nested lists, such as the load of the experts
    diverged: bool
    seconds: float  # of compilation, training, evaluation and saving: processor time on a CPU, else wall time
    device: str = ""  # on which it ran
    together: int = 1  # trials that were trained under one vmap with it; `seconds` is its share of theirs


def seeded(experiment: Experiment, seed: int) -> Experiment:
    """Return the experiment with a seed for the weights and another, equal one for the order of the data."""
    return replace(
        experiment, train=replace(experiment.train, seed=seed), data=replace(experiment.data, seed=seed)
    )  # fmt: skip


def trial_id(experiment: Experiment, fingerprint: str) -> str:
    """Return the identity of a trial: of its config, the content of its data, and the recipe of the code."""
    content = {"config": identity(experiment), "data": fingerprint, "recipe": RECIPE}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def plan(
    study: Study, scale: str, fingerprint: Callable[[Experiment], str], outcomes: Sequence[Outcome]
) -> tuple[list[Trial], bool]:
    """Return the trials that can be planned, in order, and whether more will follow them.

    `fingerprint` returns the identity of an experiment's prepared data. `outcomes`: what is recorded so far.
    """
    arms = study.experiments(scale)
    budget = study.scale(scale)
    chosen: dict[str, tuple[tuple[str, Any], ...]] = dict.fromkeys(arms, ())
    trials = []
    if study.tune:
        for seed in range(TUNE_SEED, TUNE_SEED + budget.tune_seeds):
            for arm, experiment in arms.items():
                for tuned in _options(study, experiment):
                    changed = seeded(replace_fields(experiment, dict(tuned)), seed)
                    trials.append(Trial(arm, seed, "tune", tuned, changed, trial_id(changed, fingerprint(changed))))
        done = {outcome.id: outcome for outcome in outcomes}
        if any(trial.id not in done for trial in trials):
            return trials, True
        chosen = {arm: best_tuned(arm, trials, done, study.metric) for arm in arms}
    for seed in range(budget.seeds):
        for arm, experiment in arms.items():
            changed = seeded(replace_fields(experiment, dict(chosen[arm])), seed)
            trials.append(
                Trial(arm, seed, "compare", chosen[arm], changed, trial_id(changed, fingerprint(changed)))
            )  # fmt: skip
    return trials, False


def _options(study: Study, experiment: Experiment) -> list[tuple[tuple[str, Any], ...]]:
    """Return every combination of the tuned values of an arm."""
    own = flatten(experiment)
    axes = [[(name, own[name] * factor) for factor in factors] for name, factors in study.tune.items()]
    return list(itertools.product(*axes))


def best_tuned(
    arm: str, trials: Sequence[Trial], outcomes: Mapping[str, Outcome], metric: str
) -> tuple[tuple[str, Any], ...]:
    """Return the tuned values with the lowest mean of the metric over the seeds of the tuning stage."""
    sums: dict[tuple[tuple[str, Any], ...], float] = {}
    for trial in trials:
        if trial.arm == arm and trial.stage == "tune":
            value = outcomes[trial.id].figures.get(metric, math.inf)
            sums[trial.tuned] = sums.get(trial.tuned, 0.0) + (value if math.isfinite(value) else math.inf)
    return min(sums, key=sums.__getitem__)
