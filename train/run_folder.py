"""Paths of a run folder, and a reader that returns its metrics as one timeline.

    runs/NAME/config.json       the resolved config
              overrides.json    what was set on the command line, as typed ("model.num_layers=4")
              environment.json  versions, devices, commit and command line of the latest start and, below, earlier ones
              metrics.jsonl     one JSON row per line, only appended to; the report is made from it
              samples.jsonl     completions of held-out files
              wandb_id          the run's id at Weights & Biases, once it was reported there
              local_id          part of the name of its folder of local checkpoints (train/tiers.py)
              checkpoints/  tokenizer/  plots/  report.html
              .lock             the lease of the job that writes here (train/lease.py); empty if there is none

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
    """A run folder or its records are unusable; the message is one paragraph for the user."""


@dataclass(frozen=True, init=False)
class RunFolder:
    """The paths of a run, local or gs://. The constructor touches no disk; `open_run` creates and locks the folder.

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
    frozen = property(lambda self: self.path / "frozen")  # weights that are never updated
    tokenizer = property(lambda self: self.path / "tokenizer")
    plots = property(lambda self: self.path / "plots")
    routing = property(lambda self: self.path / "routing")  # the routers' choices, by step
    wandb_id = property(lambda self: self.path / "wandb_id")
    local_id = property(lambda self: self.path / "local_id")
    lock = property(lambda self: self.path / ".lock")

    @property
    def begun(self) -> bool:
        """Whether the run has metrics or a checkpoint. Before that, nothing depends on its config."""
        return self.metrics.exists() or bool(committed_steps(self.checkpoints))

    @property
    def finished(self) -> bool:
        """Whether the run has its `final` row, was not resumed after it, and has the checkpoint of that step."""
        return self.finished_step is not None

    @property
    def finished_step(self) -> int | None:
        """The step at which the run finished, or None if it has not."""
        if not self.metrics.exists():
            return None
        step = next((row.get("step") for row in read_metrics(self.metrics) if row["kind"] == "final"), None)
        return step if type(step) is int and (self.checkpoints / str(step) / COMMIT_FILE).exists() else None

    def recorded_without_checkpoint(self) -> int | None:
        """Return the last train step in the metrics if no checkpoint exists, and None if there is nothing to report.

        A run with local checkpoints (train/tiers.py) may have one there, which this machine may not see.
        """
        if not self.metrics.exists() or self.local_id.exists() or committed_steps(self.checkpoints):
            return None
        steps = [row["step"] for row in read_metrics(self.metrics) if row["kind"] == "train"]
        return max((step for step in steps if isinstance(step, int)), default=None)


LASTING = ("event", "goodput")  # kinds of rows that a later row never replaces


def _survives_resume(row: dict[str, Any], resumed_step: int) -> bool:
    return row["kind"] in LASTING or (row["kind"] != "final" and (row.get("step") or 0) <= resumed_step)


def read_metrics(path: str | os.PathLike, *, superseded: bool = False) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl as one timeline; with `superseded`, all rows as they were written.

    A row replaces an earlier one of the same kind, step and set. An event "resumed" or "rewound" at step s removes the
    earlier final row and all earlier rows of steps after s, except events and goodput rows. A last line cut off by a
    crash is skipped. Raises RunFolderError, with the line number, for any other line that is not a row.
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
            if superseded or kind in LASTING:
                if not superseded and row.get("event") in ("resumed", "rewound"):
                    kept = {k: r for k, r in kept.items() if _survives_resume(r, row["step"])}
                kept[kind, number] = row
                continue
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise RunFolderError(f"{path}, line {number}: not a metrics row ({error!r}); remove that line") from error
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())
