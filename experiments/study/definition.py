"""What a study is: a question, a base experiment, the arms that differ from it, and the claims that the arms decide.

    STUDY = Study(
        name="swiglu",
        question="Does SwiGLU learn faster than ReLU at equal parameters?",
        source="Shazeer 2020, table 1",
        base=small(),
        arms={"relu": {"model.mlp.kind": "relu"}, "swiglu": {"model.mlp.kind": "swiglu"}},
        scales=SCALES,
        claims=(Claim("SwiGLU is better", "swiglu", "lower", than="relu"),),
    )

An arm is a set of changes of the base experiment, by dotted name: {"optimizer.learning_rate": 1e-3}. `grid`, `zipped`
and `chain` write many of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from experiments.resolve import fill_vocabulary
from train.config import Experiment
from train.config_io import ConfigError, flatten, replace_fields, to_dict

if TYPE_CHECKING:
    from experiments.study.figures import StudyFigure
    from experiments.study.measures import Measure
    from experiments.study.records import Table

Changes = Mapping[str, Any]  # dotted field of an Experiment -> value
Arms = Mapping[str, Changes]  # label -> changes
SCALE_NAMES = ("ci", "cpu", "gpu", "tpu")
# Fields that describe a run, or decide how it is stored and shown, but not what it computes.
INERT = (
    "name", "question", "source", "cost", "train.checkpoint_every", "train.keep_last", "train.keep_best",
    "train.local_checkpoint_every", "train.local_checkpoint_dir", "train.log_every", "train.sinks",
    "train.watchdog_seconds", "train.check_devices", "data.cache_dir", "data.prefetch", "samples.count",
    "samples.prompt_tokens", "samples.new_tokens", "samples.temperature", "samples.top_p",
)  # fmt: skip


class StudyError(ValueError):
    """A study, or the storage of its trials, cannot be used; the message is one paragraph for the user."""


# ---- combinators ----


def grid(**axes: Mapping[str, Changes]) -> dict[str, Changes]:
    """Return every combination of the axes' options: labels joined by ", ", changes merged.

    grid(norm={"plain": {...}, "normed": {...}}, rate=values("optimizer.learning_rate", 1e-3, 1e-2)) has four arms. A
    later axis may not change a field of an earlier one.
    """
    arms: dict[str, Changes] = {}
    for options in itertools.product(*(axis.items() for axis in axes.values())):
        merged: dict[str, Any] = {}
        for _, changes in options:
            if both := sorted(set(merged) & set(changes)):
                raise StudyError(f"grid({', '.join(axes)}): two axes change {both[0]}; let one axis do it")
            merged |= changes
        arms[", ".join(label for label, _ in options)] = merged
    return arms


def zipped(first: Arms, *others: Arms) -> dict[str, Changes]:
    """Return the arms of `first`, each with the changes of the arms at the same position in `others`."""
    if any(len(other) != len(first) for other in others):
        raise StudyError(
            f"zipped: {len(first)} arms beside {', '.join(str(len(o)) for o in others)}; give equal numbers"
        )
    return {
        label: {name: value for part in (changes, *rest) for name, value in part.items()}
        for (label, changes), *rest in zip(first.items(), *(other.values() for other in others), strict=True)
    }


def chain(*groups: Arms) -> dict[str, Changes]:
    """Return the arms of all groups. Raises StudyError for a label that two groups have."""
    arms: dict[str, Changes] = {}
    for group in groups:
        if both := sorted(set(arms) & set(group)):
            raise StudyError(f"chain: two groups have an arm {both[0]!r}; give it another label")
        arms |= group
    return arms


def values(name: str, *options: Any, label: str = "{}") -> dict[str, Changes]:
    """Return one arm for each value of a field, labelled by the value."""
    return {label.format(f"{x:g}" if isinstance(x, float) else x): {name: x} for x in options}


# ---- a study ----


@dataclass(frozen=True)
class Scale:
    """The size at which a study runs: changes of its base, a budget of tokens for each trial, and seeds."""

    tokens: int  # of training, per trial
    seeds: int  # trials of each arm: seeds 0, 1, ...
    changes: Changes = field(default_factory=dict)
    tune_seeds: int = 1  # trials of each value of `Study.tune`; their seeds are not those of the comparison

    def with_changes(self, changes: Changes) -> Scale:
        """Return the scale with further changes of the base."""
        return replace(self, changes={**self.changes, **changes})


# The figures of one seed, by arm and metric.
SeedFigures = Mapping[str, Mapping[str, float]]
Quantity = str | Callable[[SeedFigures], float]  # an arm, whose metric is meant, or a function of a seed's figures


@dataclass(frozen=True)
class Published:
    """What a paper measured: the value of the claim's arm, and of what it is compared with."""

    arm: float
    than: float
    where: str = ""  # table or figure, where it is not that of the study
    unit: str = "nats"


@dataclass(frozen=True)
class Claim:
    """A statement that the trials decide, written down before they run.

    The difference is that of `arm` minus `than`, paired by seed. "lower" and "higher" must be shown to exceed `margin`;
    "equal" must be shown to lie within it; "not_higher" and "not_lower" may not exceed it.
    """

    text: str
    arm: Quantity
    expected: Literal["lower", "higher", "equal", "not_higher", "not_lower"]
    than: Quantity | float
    margin: float = 0.0  # in units of the metric
    metric: str = ""  # "": that of the study
    published: Published | None = None


@dataclass(frozen=True)
class Study:
    """One question with its trials and claims. `validate` checks all of it before anything runs."""

    name: str
    question: str
    source: str  # paper and table
    base: Experiment
    arms: Arms | Callable[[Experiment], Arms]  # a function if changes depend on the size of the scale's base
    scales: Mapping[str, Scale]
    claims: tuple[Claim, ...]
    metric: str = "bits_per_byte"
    also: tuple[str, ...] = ()  # further metrics of the table
    measures: Mapping[str, Measure] = field(default_factory=dict)  # evaluations of trained weights, by name
    # field -> factors of the arm's own value, of which each arm takes its best
    tune: Mapping[str, Sequence[float]] = field(default_factory=dict)
    data_differs: bool = False  # whether arms may differ in their data; otherwise that is refused
    figures: tuple[StudyFigure, ...] = ()
    analysis: Callable[[Table], Sequence[str]] | None = None  # returns a section of the report in Markdown, as lines
    notes: str = ""  # for the report: protocol, deviations from the paper
    confidence: float = 0.95
    # Custom trials train nothing: they return their figures from the resolved experiment.
    run: Callable[[Experiment], Mapping[str, float]] | None = None

    def scale(self, name: str) -> Scale:
        """Return the scale `name`. Raises StudyError."""
        if name not in self.scales:
            raise StudyError(
                f"--scale {name}: study {self.name!r} has no budget for it; its scales are {', '.join(self.scales)}"
            )
        scale = self.scales[name]
        for what in ("tokens", "seeds", "tune_seeds"):
            if getattr(scale, what) < 1:
                raise StudyError(f"study {self.name!r}, scale {name!r}: {what} = {getattr(scale, what)}; at least 1")
        return scale

    def experiments(self, scale_name: str) -> dict[str, Experiment]:
        """Return the experiment of each arm at a scale, without a seed. Raises StudyError or ConfigError."""
        scale = self.scale(scale_name)
        base = _changed(self.base, scale.changes, f"study {self.name!r}, scale {scale_name!r}")
        arms = self.arms(base) if callable(self.arms) else self.arms
        found = {}
        for label, changes in arms.items():
            changed = _changed(base, changes, f"study {self.name!r}, arm {label!r}")
            found[label] = fill_vocabulary(changed if "train.steps" in changes else _with_budget(changed, scale.tokens))
        self._validate(scale_name, found)
        return found

    def _validate(self, scale_name: str, arms: Mapping[str, Experiment]) -> None:
        where = f"study {self.name!r}"
        if not arms:
            raise StudyError(f"{where}: it has no arms; give at least one")
        if bad := [label for label in arms if not label or not label.isprintable() or "/" in label]:
            raise StudyError(f"{where}: arm {bad[0]!r} is not a label; use printable characters without '/'")
        seen: dict[str, str] = {}
        for label, experiment in arms.items():
            experiment.validate(1)
            content = str(identity(experiment))
            if content in seen:
                raise StudyError(f"{where}: arms {seen[content]!r} and {label!r} are equal; remove one")
            seen[content] = label
        first = next(iter(arms.values()))
        for label, experiment in arms.items():
            if not self.data_differs and data_identity(experiment) != data_identity(first):
                raise StudyError(
                    f"{where}: arm {label!r} changes the data, so that its trials are not paired with the others; keep "
                    "the data fields, or set data_differs=True if that is the question"
                )
        for name, factors in self.tune.items():
            if len(factors) < 2 or len(set(factors)) < len(factors) or not min(factors) > 0:
                raise StudyError(f"{where}: tune[{name!r}] = {factors!r}; give two or more different factors above 0")
            for label, experiment in arms.items():
                if not isinstance(value := flatten(experiment).get(name), float):
                    raise StudyError(f"{where}: tune[{name!r}] is {value!r} in arm {label!r}; tune a number")
        for claim in self.claims:
            for side in (claim.arm, claim.than):
                if isinstance(side, str) and side not in arms:
                    raise StudyError(
                        f"{where}: claim {claim.text!r} names arm {side!r}; the arms are {', '.join(arms)}"
                    )
            if claim.margin < 0 or (claim.expected in ("equal", "not_higher", "not_lower") and not claim.margin > 0):
                raise StudyError(
                    f"{where}: claim {claim.text!r} has margin = {claim.margin:g}; {claim.expected!r} needs a margin "
                    "above 0, the largest difference that does not matter"
                )
        if self.claims and self.scales[scale_name].seeds < 2:
            raise StudyError(
                f"{where}, scale {scale_name!r}: seeds = 1, but a claim needs at least 2 for its interval; 5 are usual"
            )


def _changed(experiment: Experiment, changes: Changes, where: str) -> Experiment:
    try:
        return replace_fields(experiment, changes)
    except ConfigError as error:
        raise StudyError(f"{where}: {error}") from error


def _with_budget(experiment: Experiment, tokens: int) -> Experiment:
    """Return the experiment with as many steps as its batches need for the tokens."""
    steps = max(round(tokens / (experiment.data.batch_size * experiment.data.sequence_length)), 1)
    warmup = min(experiment.optimizer.warmup_steps, steps)
    return replace(
        experiment,
        train=replace(experiment.train, steps=steps),
        optimizer=replace(experiment.optimizer, warmup_steps=warmup),
    )


def identity(experiment: Experiment) -> dict[str, Any]:
    """Return the fields that decide what an experiment computes, by dotted name."""
    return {name: value for name, value in flatten(to_dict(experiment)).items() if name not in INERT}


def data_identity(experiment: Experiment) -> dict[str, Any]:
    """Return the fields that decide which batches an experiment sees."""
    return {name: value for name, value in identity(experiment).items() if name.startswith("data.")}
