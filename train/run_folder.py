"""The folder of a run: the paths in it, and its metrics read back as one timeline.

    runs/NAME/config.json       the resolved config
              overrides.json    what was set on the command line, as typed ("model.num_layers=4")
              environment.json  versions, devices, commit, command line of the latest start, earlier ones below it
              metrics.jsonl     one JSON row a line, only ever appended to: the source of truth of the report
              samples.jsonl     completions of held-out files
              wandb_id          the run's own id at Weights & Biases, once it was reported there
              checkpoints/  tokenizer/  plots/  report.html
              .lock             the lease of the job that writes here (train/lease.py); empty when none does

A row has `kind` ("train", "eval", "event", "goodput", "final"), `step` and `time` (unix seconds); an eval row also has
`set`.
"""

import json
import os
from dataclasses import dataclass
from typing import Any

from etils import epath

from data.paths import PathError, parse_path
from train.commit import COMMIT_FILE, committed_steps


class RunFolderError(ValueError):
    """A run folder or its records cannot be used; the message is one paragraph for the user."""


@dataclass(frozen=True, init=False)
class RunFolder:
    """The paths of a run, local or gs://. Making one touches no disk: `open_run` creates and locks, readers just look.

    Raises RunFolderError for a path that cannot name a run.
    """

    path: epath.Path

    def __init__(self, path: str | os.PathLike[str]):
        try:
            object.__setattr__(self, "path", parse_path(path, "run"))
        except PathError as error:
            raise RunFolderError(str(error)) from error

    config = property(lambda self: self.path / "config.json")
    overrides = property(lambda self: self.path / "overrides.json")
    environment = property(lambda self: self.path / "environment.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    samples = property(lambda self: self.path / "samples.jsonl")
    report = property(lambda self: self.path / "report.html")
    checkpoints = property(lambda self: self.path / "checkpoints")
    frozen = property(lambda self: self.path / "frozen")  # weights that no step changes
    tokenizer = property(lambda self: self.path / "tokenizer")
    plots = property(lambda self: self.path / "plots")
    routing = property(lambda self: self.path / "routing")  # choices of the experts, by step
    wandb_id = property(lambda self: self.path / "wandb_id")
    lock = property(lambda self: self.path / ".lock")

    @property
    def begun(self) -> bool:
        """Whether the run has metrics or a checkpoint: before that, nothing depends on its config."""
        return self.metrics.exists() or bool(committed_steps(self.checkpoints))

    @property
    def finished(self) -> bool:
        """Whether the run has its `final` row, was not resumed after it, and has the checkpoint of that step."""
        return self.finished_step is not None

    @property
    def finished_step(self) -> int | None:
        """The step at which the run is `finished`, else None."""
        if not self.metrics.exists():
            return None
        step = next((row.get("step") for row in read_metrics(self.metrics) if row["kind"] == "final"), None)
        return step if type(step) is int and (self.checkpoints / str(step) / COMMIT_FILE).exists() else None

    def recorded_without_checkpoint(self) -> int | None:
        """Return the last train step in the metrics if there is no checkpoint at all; None where all is well."""
        if not self.metrics.exists() or committed_steps(self.checkpoints):
            return None
        steps = [row["step"] for row in read_metrics(self.metrics) if row["kind"] == "train"]
        return max((step for step in steps if isinstance(step, int)), default=None)


LASTING = ("event", "goodput")  # kinds of rows that a later row never supersedes


def _stands(row: dict[str, Any], resumed_step: int) -> bool:
    return row["kind"] in LASTING or (row["kind"] != "final" and (row.get("step") or 0) <= resumed_step)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl as one timeline.

    A row of the same kind, step and set supersedes an earlier one, and an event "resumed" at step s supersedes the
    earlier final row and all earlier rows above s; events and goodput rows stay. A last line torn by a crash is left
    out. Raises RunFolderError, with the line number, for any other line that is not a row.
    """
    content = parse_path(path).read_bytes()
    kept: dict[tuple, dict[str, Any]] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            kind, key = row["kind"], (row["kind"], row.get("step"), row.get("set"))
            hash(key)
            if kind in LASTING:
                if row.get("event") == "resumed":
                    kept = {k: r for k, r in kept.items() if _stands(r, row["step"])}
                kept[kind, number] = row
                continue
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise RunFolderError(f"{path}, line {number}: not a metrics row ({error!r}); remove that line") from error
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())
