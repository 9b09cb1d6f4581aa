"""What a search is: an experiment, a space, and how its trials are proposed, stopped early and compared."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import optuna

from experiments.search.space import SearchError, Space, check_space, configured, read_space
from experiments.study.definition import identity
from train.config import Experiment
from train.config_io import from_dict, to_dict

SAMPLERS = ("tpe", "cmaes", "grid", "random")
PRUNERS = ("none", "median", "hyperband")
METRICS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}  # of the first held-out set; name -> unit
DEFAULT_TRIALS = 20
MAX_GRID = 10_000  # points
UNITS_OF_BUDGET = ("train.steps", "train.eval_every")  # pruning compares trials at equal steps


@dataclass(frozen=True)
class Search:
    """A search over one experiment. `validate` checks all of it before anything runs."""

    name: str  # of its folder and, after "search/", in the storage
    experiment: str  # name of the base
    base: Experiment  # with the overrides
    space: Space
    overrides: tuple[str, ...] = ()  # of the named experiment, "FIELD=VALUE"
    sampler: str = "tpe"
    pruner: str = "median"
    metric: str = "bits_per_byte"  # lower is better
    seed: int = 0  # of the sampler
    data: str = ""  # identity of the base's prepared data; "": not known
    software: str = ""  # versions with which the search began

    @property
    def study_name(self) -> str:
        """The name of the trials in the storage."""
        return f"search/{self.name}"

    def validate(self) -> None:
        """Raise SearchError or ConfigError if the search cannot run."""
        configured(self.base, self.space, {}).validate(1)
        check_space(self.base, self.space)
        self._check_sampler()
        self._check_pruner()

    def _check_sampler(self) -> None:
        for dimension in self.space:
            finite = dimension.finite()
            if self.sampler == "grid" and finite is None:
                raise SearchError(
                    f"--sampler grid: {dimension} has infinitely many values; give a number of points, such as "
                    f"{dimension}:5, or another sampler"
                )
            if self.sampler != "grid" and dimension.points:
                raise SearchError(
                    f"--space {dimension}: the last number is the points of a grid; leave it out with --sampler "
                    f"{self.sampler}, or use --sampler grid"
                )
            if self.sampler == "cmaes" and dimension.kind == "choice":
                raise SearchError(
                    f"--sampler cmaes: {dimension} is a list, and CMA-ES varies numbers; use --sampler tpe"
                )
        if self.sampler == "cmaes" and importlib.util.find_spec("cmaes") is None:
            raise SearchError("--sampler cmaes: the package cmaes is not installed; pip install -e '.[study]'")
        if self.sampler == "cmaes" and len(self.space) < 2:
            raise SearchError("--sampler cmaes: it needs two or more fields; use --sampler tpe for one")
        if self.sampler == "grid" and self.grid_size() > MAX_GRID:
            raise SearchError(
                f"--sampler grid: the grid has {self.grid_size():,} points, more than {MAX_GRID:,}; use fewer "
                "values, or --sampler random"
            )

    def _check_pruner(self) -> None:
        if self.pruner == "none":
            return
        train = self.base.train
        if not 0 < train.eval_every < train.steps:
            raise SearchError(
                f"--pruner {self.pruner}: train.eval_every = {train.eval_every} with train.steps = {train.steps} "
                "evaluates nothing before the end; set --set train.eval_every=N to a fraction of the steps, or use "
                "--pruner none"
            )
        if not configured(self.base, self.space, {}).data.holdout_fraction and not self.base.data.evaluation_sources:
            raise SearchError(f"--pruner {self.pruner}: no text is held out; set data.holdout_fraction above 0")
        for dimension in self.space:
            if dimension.field in UNITS_OF_BUDGET:
                raise SearchError(
                    f"--space {dimension}: --pruner {self.pruner} compares trials at equal steps; use --pruner none"
                )

    def grid_size(self) -> int:
        """Return the number of points of the grid."""
        return math.prod(len(dimension.finite() or ()) for dimension in self.space)

    def grid(self) -> list[dict[str, Any]]:
        """Return all points of the grid in the random order of `seed`, so that the first ones cover it evenly."""
        axes = [[(dimension.field, value) for value in dimension.finite() or ()] for dimension in self.space]
        points = [dict(point) for point in itertools.product(*axes)]
        random.Random(self.seed).shuffle(points)
        return points

    def trials(self, wanted: int | None) -> int:
        """Return the number of trials for `--trials`. Raises SearchError."""
        if self.sampler != "grid":
            return wanted or DEFAULT_TRIALS
        size = self.grid_size()
        if wanted is not None and wanted > size:
            raise SearchError(f"--trials {wanted}: the grid has {size} points; give at most that, or leave it out")
        return wanted or size

    def trial(self, values: Mapping[str, Any]) -> Experiment:
        """Return the experiment of a trial, which keeps one checkpoint. Raises ConfigError."""
        experiment = configured(self.base, self.space, values)
        return replace(experiment, train=replace(experiment.train, keep_last=1, keep_best=0))

    def to_json(self, indent: int | None = None) -> str:
        """Return the search as JSON; `indent`: spaces for each level, None: on one line."""
        fields = {name: getattr(self, name) for name in TEXT_FIELDS}
        space = {d.field: str(d).partition("=")[2] for d in self.space}
        return json.dumps(
            {**fields, "overrides": self.overrides, "seed": self.seed, "space": space, "base": to_dict(self.base)},
            indent=indent,
        )

    @classmethod
    def from_json(cls, text: str) -> Search:
        """Return the search of `to_json`. Raises ValueError, KeyError or TypeError for another text."""
        fields = json.loads(text)
        space = read_space([f"{field}={values}" for field, values in fields.pop("space").items()])
        base, overrides = from_dict(Experiment, fields.pop("base")), tuple(fields.pop("overrides"))
        return cls(base=base, space=space, overrides=overrides, **fields)

    def differences(self, other: Search) -> list[str]:
        """Return in which respects another search of the same name would mix unequal trials, each as a phrase."""
        found = []
        for option in ("sampler", "pruner", "metric", "seed"):
            was, now = getattr(self, option), getattr(other, option)
            if was != now:
                found.append(f"--{option} was {was} and is {now}")
        ours, theirs = ([str(dimension) for dimension in search.space] for search in (self, other))
        if set(ours) != set(theirs):
            found.append(f"the space was {' '.join(ours)} and is {' '.join(theirs)}")
        before, after = identity(self.base), identity(other.base)
        for name in sorted(set(before) | set(after)):
            if before.get(name) != after.get(name):
                found.append(f"{name} was {before.get(name, 'absent')} and is {after.get(name, 'absent')}")
        if self.data and other.data and self.data != other.data:
            found.append("the text of the data has changed")
        return found


TEXT_FIELDS = ("name", "experiment", "sampler", "pruner", "metric", "data", "software")


def search_name(experiment: str, name: str | None) -> str:
    """Return the name of a search: that of the experiment, and `--name` after a hyphen. Raises SearchError."""
    if name is None:
        return experiment
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,60}", name):
        raise SearchError(f"--name {name}: it names a folder; use at most 61 letters, digits, '_', '-' and '.'")
    return f"{experiment}-{name}"


def budget(experiment: Experiment, steps: int | None) -> tuple[str, ...]:
    """Return the overrides that set the number of train steps, and no more warmup than that; None: its own steps."""
    if steps is None:
        return ()
    warmup = experiment.optimizer.warmup_steps
    return (f"train.steps={steps}", *((f"optimizer.warmup_steps={steps}",) if warmup > steps else ()))


def software() -> str:
    """Return the versions that decide what a search does."""
    return f"jax {jax.__version__}, optuna {optuna.__version__}"
