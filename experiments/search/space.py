"""The space of a search: the fields of an experiment that vary, and their values.

optimizer.learning_rate=log:1e-4:1e-1      a number, uniform in its logarithm
optimizer.weight_decay=uniform:0:0.3       a number
model.num_layers=int:2:6                   a whole number; int:2:6:2 takes 2, 4 and 6
model.mlp.kind=swiglu,relu                 one of a list, each written as for --set
optimizer.learning_rate=log:1e-4:1e-1:5    five points, for the sampler `grid`
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from experiments.resolve import fill_in
from experiments.study.definition import INERT, StudyError
from train.config import Experiment

MAX_CHECKED = 64  # values of a finite dimension that are checked before anything runs; of a longer one, its ends
SYNTAX = "write FIELD=log:LOW:HIGH, FIELD=uniform:LOW:HIGH, FIELD=int:LOW:HIGH[:STEP] or FIELD=A,B,C"
Kind = Literal["log", "uniform", "int", "choice"]


class SearchError(StudyError):
    """A search cannot be used; the message is one paragraph for the user."""


@dataclass(frozen=True)
class Dimension:
    """A field that varies."""

    field: str  # dotted name
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    step: int = 1  # of "int"
    points: int = 0  # of "log" and "uniform" in a grid; 0: any value
    choices: tuple[str, ...] = ()  # as for --set

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"{self.field}={','.join(self.choices)}"
        ends = ":".join(short if float(short := f"{end:.12g}") == end else repr(end) for end in (self.low, self.high))
        more = f":{self.points}" if self.points else f":{self.step}" if self.step > 1 else ""
        return f"{self.field}={self.kind}:{ends}{more}"

    @property
    def short(self) -> str:
        """The field without the part of the config that has it: "mlp.kind"."""
        return self.field.partition(".")[2] or self.field

    def distribution(self) -> BaseDistribution:
        """Return the dimension as a distribution of Optuna."""
        if self.kind == "choice":
            return CategoricalDistribution(self.choices)
        if self.kind == "int":
            return IntDistribution(int(self.low), int(self.high), step=self.step)
        return FloatDistribution(self.low, self.high, log=self.kind == "log")

    def finite(self) -> list[Any] | None:
        """Return all values, or None if there are infinitely many."""
        if self.kind == "choice":
            return list(self.choices)
        if self.kind == "int":
            return list(range(int(self.low), int(self.high) + 1, self.step))
        if not self.points:
            return None
        spaced = np.geomspace if self.kind == "log" else np.linspace
        return [min(max(float(x), self.low), self.high) for x in spaced(self.low, self.high, self.points)]

    def checked(self) -> list[Any]:
        """Return the values that are checked before anything runs: all of a short list, or the ends."""
        values = self.finite()
        return values if values is not None and len(values) <= MAX_CHECKED else [self.low, self.high]

    def override(self, value: Any) -> str:
        """Return "FIELD=VALUE" as for --set."""
        return f"{self.field}={int(value) if self.kind == 'int' else value}"


Space = tuple[Dimension, ...]


def read_space(arguments: Sequence[str]) -> Space:
    """Return the space that `--space` describes: FIELD=VALUES each, or a JSON file of them. Raises SearchError."""
    texts: list[str] = []
    for argument in arguments:
        texts += [argument] if "=" in argument else _in_file(argument)
    if not texts:
        raise SearchError(f"--space: nothing varies; {SYNTAX}")
    space = tuple(_parse(text) for text in texts)
    fields = [dimension.field for dimension in space]
    for dimension in space:
        if fields.count(dimension.field) > 1:
            raise SearchError(f"--space {dimension}: the field is given twice; give it once")
    return space


def _in_file(name: str) -> list[str]:
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise SearchError(
            f"--space {name}: cannot be read as a file ({error.strerror or error}); give a JSON file, or {SYNTAX}"
        ) from error
    except ValueError as error:
        raise SearchError(f'--space {name}: not JSON ({error}); write {{"FIELD": "log:LOW:HIGH", ...}}') from error
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise SearchError(f'--space {name}: not an object of strings; write {{"FIELD": "log:LOW:HIGH", ...}}')
    return [f"{field}={value}" for field, value in content.items()]


def _parse(text: str) -> Dimension:
    field, _, values = (part.strip() for part in text.partition("="))
    if not field or not values:
        raise SearchError(f"--space {text}: it has no {'values' if field else 'field'}; {SYNTAX}")
    kind, *numbers = values.split(":")
    if kind not in ("log", "uniform", "int"):
        return _choices(text, field, values)
    if len(numbers) not in (2, 3):
        raise SearchError(f"--space {text}: {kind} takes LOW:HIGH and one optional number; {SYNTAX}")
    if kind == "int":
        low, high, step = (*(_whole(text, number) for number in numbers), 1)[:3]
        _check_order(text, low, high)
        if step < 1 or low + step > high:
            raise SearchError(f"--space {text}: the step {step} leaves fewer than two values; lower it")
        return Dimension(field, "int", low, low + (high - low) // step * step, step=step)
    lowest, highest = (_number(text, number) for number in numbers[:2])
    _check_order(text, lowest, highest)
    if kind == "log" and lowest <= 0:
        raise SearchError(f"--space {text}: LOW = {lowest:g} has no logarithm; set it above 0, or use uniform")
    points = _whole(text, numbers[2]) if len(numbers) == 3 else 0
    if len(numbers) == 3 and points < 2:
        raise SearchError(f"--space {text}: {points} points; give 2 or more")
    return Dimension(field, "log" if kind == "log" else "uniform", lowest, highest, points=points)


def _choices(text: str, field: str, values: str) -> Dimension:
    # Commas in parentheses belong to a value: optimizer.betas=(0.9,0.95),(0.9,0.99).
    choices = tuple(each.strip() for each in re.split(r",(?![^(]*\))", values))
    if len(set(choices)) < max(len(choices), 2):
        raise SearchError(f"--space {text}: {values!r} is not a list of two or more different values; {SYNTAX}")
    return Dimension(field, "choice", choices=choices)


def _check_order(text: str, low: float, high: float) -> None:
    if not low < high:
        raise SearchError(f"--space {text}: LOW = {low:g} is not below HIGH = {high:g}; exchange or separate them")


def _whole(text: str, number: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,15}", number):
        raise SearchError(f"--space {text}: {number!r} is not a whole number; write one such as 4")
    return int(number)


def _number(text: str, number: str) -> float:
    try:
        value = float(number) if number.isascii() else float("nan")
    except ValueError:
        value = float("nan")
    if not abs(value) < float("inf"):
        raise SearchError(f"--space {text}: {number!r} is not a number; write one such as 1e-3")
    return value


def configured(base: Experiment, space: Space, values: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a trial, unchecked. `values`: by field; a field without one keeps that of `base`."""
    overrides = [dimension.override(values[dimension.field]) for dimension in space if dimension.field in values]
    return fill_in(base, overrides)


def check_space(base: Experiment, space: Space) -> None:
    """Raise SearchError unless every checked value gives a valid experiment, with the other fields of `base`."""
    for dimension in space:
        if dimension.field in INERT:
            raise SearchError(f"--space {dimension}: the field does not change what is learned; leave it out")
        for value in dimension.checked():
            try:
                configured(base, space, {dimension.field: value}).validate(1)
            except ValueError as error:
                refused = "" if str(error).startswith("unknown field") else f"the config refuses {value}: "
                raise SearchError(f"--space {dimension}: {refused}{error}") from error


def shorten(value: Any) -> str:
    """Return a value of a field for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
