"""Rewinding: a run whose loss diverges returns to an earlier checkpoint and skips the batches since.

Chowdhery et al. 2022 (PaLM), sec. 5.1, did this by hand: the same batches did not diverge from other weights, so a
spike needs both. The run keeps its number of updates, and reads as many further batches as it skips. The losses that
it compares are saved with each checkpoint, so that a resumed run rewinds where an uninterrupted one does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from train.checkpoint import Checkpointer, Restored
from train.config import RewindConfig
from train.hooks import DivergedError, Hook, Recorder, StepResult

if TYPE_CHECKING:
    from train.trainer import Trainer


class RewindRequest(Exception):
    """Asks the trainer to return to the newest good checkpoint up to `step`."""

    def __init__(self, step: int):
        super().__init__(f"rewind to step {step} or earlier")
        self.step = step


class LossWatch:
    """Finds where losses diverge: `patience` in a row exceed the median of the `window` losses before them by `rise`.

    A loss that is not finite counts as such a loss. Nothing diverges before the first window is full.
    """

    def __init__(self, config: RewindConfig, usual: list[float] | None = None, high: int = 0):
        self._config, self._usual, self._high = config, list(usual or []), high

    @property
    def state(self) -> dict[str, Any]:
        """The arguments, besides the config, that continue this watch."""
        return {"usual": list(self._usual), "high": self._high}

    @property
    def median(self) -> float:
        """The median of the losses before a rise."""
        return statistics.median(self._usual)

    def add(self, loss: float) -> bool:
        """Add the loss of the next step, and return whether the losses have diverged."""
        config = self._config
        # `not <=` also holds for NaN.
        if len(self._usual) >= config.window and not loss <= self.median + config.rise:
            self._high += 1
            return self._high >= config.patience
        self._high = 0
        if math.isfinite(loss):
            self._usual = [*self._usual, loss][-config.window :]
        return False

    def clear(self) -> None:
        """Forget all losses."""
        self._usual, self._high = [], 0


class Rewinder(Hook):
    """Watches the loss, and raises RewindRequest where it diverges. `saved`: its metadata in the checkpoint from
    which the run starts; `restore(step)` returns the newest good checkpoint up to a step and sets the later ones aside.

    The trainer calls it after all other hooks, which would miss the step. Raises DivergedError if the run has rewound
    `config.limit` times already.
    """

    def __init__(
        self, config: RewindConfig, checkpoints: Checkpointer, recorder: Recorder, saved: Mapping[str, Any] | None,
        restore: Callable[[int], Restored],
    ):  # fmt: skip
        self.restore = restore
        self._config, self._checkpoints, self._recorder = config, checkpoints, recorder
        self.count = 0 if saved is None else saved["count"]
        self._watch = LossWatch(config, **({} if saved is None else saved["losses"]))

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rewinds and losses before it."""
        return {"count": self.count, "losses": self._watch.state}

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        config, loss = self._config, result.row["loss"]
        if not self._watch.add(loss):
            return
        first = result.step - config.patience + 1
        what = (
            f"the loss rose from {self._watch.median:.3f} to {loss:.3f} and stayed there for {config.patience} steps "
            f"from step {first}"
        )
        if self.count >= config.limit:
            raise DivergedError(
                f"{what}, after {self.count} rewinds (train.rewind.limit = {config.limit}). Lower "
                "optimizer.learning_rate in a new run (--run NEWNAME), or raise train.rewind.limit to continue"
            )
        earlier = self._checkpoints.newest(first - config.margin)
        if earlier is None:
            self._recorder.warn(f"{what}; no checkpoint is {config.margin} steps older, so the run continues")
            self._watch.clear()
            return
        self._recorder.warn(what)
        raise RewindRequest(earlier)

    def rewound(self, saved: Mapping[str, Any] | None, step: int, diverged: int, skipped: int) -> None:
        """Continue from the checkpoint of `step`, whose metadata is `saved`, and record the rewind.

        diverged: the last step before the rewind; skipped: batches that all rewinds have skipped.
        """
        self.count += 1
        self._watch = LossWatch(self._config, **({} if saved is None else saved["losses"]))
        message = (
            f"rewind {self.count} of {self._config.limit}: from step {diverged} to the checkpoint of step {step}; the "
            f"{diverged - step} batches between are skipped"
        )
        self._recorder.event(step, "rewound", message, diverged=diverged, skipped=skipped)
        self._recorder.log(message)
