"""Goodput: how a run spends its wall time, measured by each start of the run and recorded in metrics.jsonl.

A start is one process from its command to its end. A row of kind "goodput" holds the account of a start so far:

    {"kind": "goodput", "step": last step read,
     "start": {"time": unix seconds, "step": first step, "restart": how often the launcher has restarted the job},
     "seconds": {"wall": total, "steps": ..., "evaluation": ..., ...}, "memory": {"arguments": bytes, ...}}

The last row of each start counts, and no resumption supersedes one. A crash loses at most ROW_SECONDS of the account;
experiments/lifetime.py derives from the rows of train steps what those were, and adds the starts up.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from train.hooks import Hook, Recorder, StepResult
from train.records import launcher_restarts

if TYPE_CHECKING:
    from train.trainer import Trainer

# "startup": of the process and its devices. "data": preparation of the data. "data_wait": steps that wait for a batch.
PHASES = ("startup", "data", "initialization", "compilation", "steps", "data_wait", "evaluation", "checkpoints",
          "profile", "other")  # fmt: skip
ROW_SECONDS = 60.0  # between two rows of a start, besides those of evaluations and checkpoints


class Goodput:
    """The seconds of one start by phase. Every moment counts once, in the innermost phase; outside of all, in "other".

    The compilation is that of the train step. Evaluation and sampling programs compile within "evaluation".
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, startup: float = 0.0):
        """`startup`: seconds that the process spent before this call."""
        self.start_time, self.start_step, self.restart = time.time() - startup, 0, launcher_restarts()
        self.memory: dict[str, int] = {}  # bytes per device of the train step
        self._clock, self._phases = clock, ["other"]
        self._seconds = dict.fromkeys(PHASES, 0.0) | {"startup": startup}
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within as `name`, one of PHASES, and no longer as the phase around it."""
        if name not in self._seconds:
            raise ValueError(f"phase {name!r}: unknown; use one of {', '.join(PHASES)}")
        self._count()
        self._phases.append(name)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def _count(self) -> None:
        now = self._clock()
        self._seconds[self._phases[-1]] += now - self._since
        self._since = now

    def row(self, step: int) -> dict[str, Any]:
        """Return the account so far as a row of metrics.jsonl, after `step` steps of the run."""
        self._count()
        seconds = {name: round(value, 3) for name, value in self._seconds.items()}
        row = {
            "kind": "goodput",
            "step": step,
            "start": {"time": self.start_time, "step": self.start_step, "restart": self.restart},
            "seconds": {"wall": round(sum(self._seconds.values()), 3), **seconds},
        }
        return row | ({"memory": self.memory} if self.memory else {})


class RecordGoodput(Hook):
    """Writes a start's account after evaluations and checkpoints, at the end, and every ROW_SECONDS between."""

    def __init__(self, goodput: Goodput, recorder: Recorder, clock: Callable[[], float] = time.monotonic):
        self._goodput, self._recorder, self._clock = goodput, recorder, clock
        self._written = clock()

    def _write(self, step: int) -> None:
        self._written = self._clock()
        self._recorder.record(self._goodput.row(step))

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._clock() - self._written >= ROW_SECONDS:
            self._write(result.step)

    def on_eval(self, trainer: Trainer, step: int, rows: list[dict[str, Any]]) -> None:
        self._write(step)

    def on_save(self, trainer: Trainer, step: int, started: bool) -> None:
        self._write(step)

    def on_stop(self, trainer: Trainer, finished: bool) -> None:
        self._write(trainer.step)
