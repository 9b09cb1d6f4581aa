"""The records of a study as one CSV file, from which its report is made.

Columns: arm, stage ("tune" or "compare"), seed, trial, kind, name, step, value. The kinds are

    figure  a metric at the end of a trial
    curve   a metric at a step
    array   JSON: numbers by layer and expert
    tuned   the value of a tuned field
    status  "complete" or "diverged"
    device  what the trial ran on
    together  how many trials were trained under one vmap with it, if it was not alone
    meta    facts about the study, without an arm
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from data.paths import write_whole
from experiments.study.definition import StudyError
from experiments.study.trials import Outcome, Trial

if TYPE_CHECKING:  # reading needs no database
    from experiments.study.storage import TrialStore
    from experiments.study.worker import Job

COLUMNS = ("arm", "stage", "seed", "trial", "kind", "name", "step", "value")


@dataclass(frozen=True)
class Table:
    """The recorded trials of a study at one scale."""

    meta: dict[str, str]
    outcomes: tuple[Outcome, ...]

    def arms(self) -> list[str]:
        """Return the arms of the comparison, in order."""
        return list(dict.fromkeys(o.arm for o in self.outcomes if o.stage == "compare"))

    def seeds(self) -> list[int]:
        """Return the seeds that every arm of the comparison has finished: the paired ones."""
        by_arm: dict[str, set[int]] = {}
        for o in self.outcomes:
            if o.stage == "compare":
                by_arm.setdefault(o.arm, set()).add(o.seed)
        return sorted(set.intersection(*by_arm.values())) if by_arm else []

    def compared(self, arm: str) -> list[Outcome]:
        """Return the outcomes of an arm in the comparison, by seed."""
        return sorted((o for o in self.outcomes if o.arm == arm and o.stage == "compare"), key=lambda o: o.seed)

    def of_seed(self, seed: int) -> dict[str, dict[str, float]]:
        """Return the figures of a seed, by arm and metric."""
        return {o.arm: dict(o.figures) for o in self.outcomes if o.stage == "compare" and o.seed == seed}


def export(job: Job, store: TrialStore, trials: Sequence[Trial], folder: Path) -> Path:
    """Write the finished ones of `trials` to FOLDER/NAME.csv, or NAME.SCALE.csv unless at scale cpu."""
    done = {outcome.id: outcome for outcome in store.outcomes()}
    # Arms that tuning makes equal share a trial: each has the outcome under its own name.
    outcomes = [
        replace(done[trial.id], arm=trial.arm, seed=trial.seed, stage=trial.stage, tuned=dict(trial.tuned))
        for trial in trials
        if trial.id in done
    ]
    suffix = "" if job.scale == "cpu" else f".{job.scale}"
    path = folder / f"{job.study.name}{suffix}.csv"
    devices = ", ".join(sorted({o.device for o in outcomes if o.device})) or "unknown device"
    software = {**_software(), "device": devices}
    meta = {"study": job.study.name, "scale": job.scale, "planned": str(len(trials)), **software}
    if path.exists():  # the machine and date are those of the trials, not of a later report
        old = read(path)
        if {o.id for o in old.outcomes} == {o.id for o in outcomes}:
            meta |= {name: old.meta[name] for name in software if name in old.meta}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, _written(Table(meta, tuple(outcomes))))
    except OSError as error:
        raise StudyError(f"--to {folder}: {path} cannot be written ({error}); choose another folder") from error
    return path


def _software() -> dict[str, str]:
    """Return the date and the versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _written(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, value in table.meta.items():
        writer.writerow(["", "", "", "", "meta", name, "", value])
    for o in table.outcomes:
        for kind, name, step, value in _rows(o):
            writer.writerow([o.arm, o.stage, o.seed, o.id, kind, name, step, value])
    return text.getvalue()


def _rows(o: Outcome) -> Iterator[tuple[str, str, str | int, str]]:
    yield "status", "", "", "diverged" if o.diverged else "complete"
    yield "device", "", "", o.device
    if o.together > 1:
        yield "together", "", "", str(o.together)
    yield "figure", "seconds", "", _number(o.seconds)
    for name, value in o.tuned.items():
        yield "tuned", name, "", _number(value)
    for name, value in sorted(o.figures.items()):
        yield "figure", name, "", _number(value)
    for name, values in o.curves.items():
        if name in ("step", "train_step"):
            continue
        steps = o.curves["train_step" if name.startswith("train_") else "step"]
        for step, value in zip(steps, values, strict=True):
            yield "curve", name, int(step), _number(value)
    for name, value in o.arrays.items():
        yield "array", name, "", json.dumps(value, separators=(",", ":"))


def _number(value: float) -> str:
    return f"{value:.7g}"


def read(path: Path) -> Table:
    """Return the table of a CSV file. Raises StudyError, with the line, if it is not one."""
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    except (OSError, ValueError) as error:
        raise StudyError(f"{path}: cannot be read ({error}); run the study, or restore the file") from error
    meta: dict[str, str] = {}
    trials: dict[tuple[str, str, str], dict[str, Any]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            if row["kind"] == "meta":
                meta[row["name"]] = row["value"]
                continue
            trial = trials.setdefault((row["arm"], row["stage"], row["trial"]), {
                "arm": row["arm"], "seed": int(row["seed"]), "stage": row["stage"], "id": row["trial"], "tuned": {},
                "figures": {}, "curves": {}, "arrays": {}, "diverged": False, "seconds": 0.0,
            })  # fmt: skip
            _enter(trial, row["kind"], row["name"], row["step"], row["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise StudyError(f"{path}, line {number}: not a record of a study ({error!r}); restore the file") from error
    return Table(meta, tuple(Outcome(**trial) for trial in trials.values()))


def _enter(trial: dict[str, Any], kind: str, name: str, step: str, value: str) -> None:
    if kind == "status":
        trial["diverged"] = value == "diverged"
    elif kind == "device":
        trial["device"] = value
    elif kind == "together":
        trial["together"] = int(value)
    elif kind == "figure" and name == "seconds":
        trial["seconds"] = float(value)
    elif kind in ("figure", "tuned"):
        trial["figures" if kind == "figure" else "tuned"][name] = float(value)
    elif kind == "curve":
        steps = "train_step" if name.startswith("train_") else "step"
        values = trial["curves"].setdefault(name, [])
        values.append(float(value))
        known = trial["curves"].setdefault(steps, [])
        if len(known) < len(values):
            known.append(int(step))
    elif kind == "array":
        trial["arrays"][name] = json.loads(value)
    else:
        raise ValueError(f"kind {kind!r}")
