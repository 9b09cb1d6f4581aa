"""The records of a search, from which its report is made: search.json (what it is) and trials.csv (a row per trial).

Columns of trials.csv: trial, state ("complete", "pruned", "diverged" or "failed"), the metric at the last step or when
the trial was pruned, the value of each field, seconds, device, date, the other figures, the curve as "step:metric"
pairs with spaces between them, and the error of a trial that failed.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.paths import write_whole
from experiments.search.definition import Search
from experiments.search.space import Dimension, SearchError

DEFINITION, TRIALS = "search.json", "trials.csv"
BEFORE, AFTER = ("trial", "state"), ("seconds", "device", "date")
LAST = ("curve", "error")


@dataclass(frozen=True)
class Result:
    """What is recorded of a trial that ended."""

    index: int
    state: str  # "complete", "pruned", "diverged" or "failed"
    values: Mapping[str, Any]  # by field
    value: float | None  # of the metric: at the end, or when it was pruned
    curve: Mapping[int, float]  # the metric by step
    figures: Mapping[str, float]  # further metrics at the end
    seconds: float = 0.0  # processor time on a CPU, else wall time
    device: str = ""
    error: str = ""
    date: str = ""  # of its end, year-month-day

    @property
    def score(self) -> float:
        """The metric, or infinity without one."""
        return math.inf if self.value is None else self.value


@dataclass(frozen=True)
class Table:
    """A search and its trials that ended, by index."""

    search: Search
    results: tuple[Result, ...]

    def ended(self, *states: str) -> list[Result]:
        """Return the trials in these states."""
        return [result for result in self.results if result.state in states]

    def best(self) -> Result | None:
        """Return the trial with the lowest metric among those that ran to their end."""
        return min(self.scored(), key=lambda r: (r.score, r.index), default=None)

    def scored(self) -> list[Result]:
        """Return the trials that ran to their end with a finite metric."""
        return [r for r in self.ended("complete") if math.isfinite(r.score)]


def write_definition(search: Search, folder: Path) -> None:
    """Write search.json. Raises SearchError if the folder cannot be written."""
    _write(folder, DEFINITION, search.to_json(indent=1) + "\n")


def export(search: Search, results: Sequence[Result], folder: Path) -> None:
    """Write search.json and trials.csv to a folder. Raises SearchError."""
    write_definition(search, folder)
    fields = [dimension.field for dimension in search.space]
    figures = sorted({name for r in results for name in r.figures} - {search.metric})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*BEFORE, search.metric, *fields, *AFTER, *figures, *LAST])
    for r in results:
        values = [_cell(r.values.get(field)) for field in fields]
        more = [_cell(r.figures.get(name)) for name in figures]
        curve = " ".join(f"{step}:{value!r}" for step, value in r.curve.items())
        writer.writerow([r.index, r.state, _cell(r.value), *values, r.seconds, r.device, r.date, *more, curve, r.error])
    _write(folder, TRIALS, text.getvalue())


def _cell(value: Any) -> str:
    return "" if value is None else repr(value) if isinstance(value, float) else str(value)


def _write(folder: Path, name: str, text: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, text)
    except OSError as error:
        raise SearchError(
            f"--to {folder}: {name} cannot be written ({error}); free the disk, fix the permissions, or choose another "
            "folder with --to. Finished trials are kept in the storage"
        ) from error


def read(folder: Path) -> Table:
    """Return the records of a folder. Raises SearchError, with the line, if they cannot be read."""
    try:
        search = Search.from_json((folder / DEFINITION).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SearchError(f"{folder / DEFINITION}: not the record of a search ({error}); run the search") from error
    path = folder / TRIALS
    try:
        rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")))
    except (OSError, ValueError, csv.Error) as error:
        raise SearchError(f"{path}: cannot be read ({error}); run the search with --report") from error
    results = []
    for number, cells in enumerate(rows[1:], start=2):
        try:
            results.append(_result(search, rows[0], cells))
        except (ValueError, KeyError) as error:
            raise SearchError(f"{path}, line {number}: not a record of a trial ({error}); restore the file") from error
    return Table(search, tuple(results))


def _result(search: Search, header: Sequence[str], cells: Sequence[str]) -> Result:
    row = dict(zip(header, cells, strict=True))
    known = {*BEFORE, search.metric, *(d.field for d in search.space), *AFTER, *LAST}
    pairs = [pair.split(":") for pair in row["curve"].split()]
    return Result(
        index=int(row["trial"]),
        state=row["state"],
        values={d.field: _parsed(d, row[d.field]) for d in search.space if row[d.field]},
        value=float(row[search.metric]) if row[search.metric] else None,
        curve={int(step): float(value) for step, value in pairs},
        figures={name: float(text) for name, text in row.items() if name not in known and text},
        seconds=float(row["seconds"]),
        device=row["device"],
        error=row["error"],
        date=row["date"],
    )


def _parsed(dimension: Dimension, text: str) -> Any:
    return text if dimension.kind == "choice" else int(text) if dimension.kind == "int" else float(text)
