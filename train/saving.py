"""Checkpoints of a run: the state and metadata that are saved, and the state from which a run starts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from data.pipeline import TrainBatches
from data.prepare import Prepared
from data.tokenizer import Tokenizer
from train.checkpoint import Checkpointer, CheckpointError, Restored
from train.checkpoint_reader import process_zero
from train.frozen import keep_frozen
from train.hooks import Recorder
from train.program import Program, initial_state, load_weights, restore, with_teacher
from train.records import RunFolder
from train.rewind import Rewinder
from train.rows import Rows
from train.step import TrainState


class Start(NamedTuple):
    """The state from which a run starts or resumes."""

    state: TrainState
    step: int
    seconds: float  # of training, evaluation and saving before this start
    frozen: str = ""  # digest of the frozen weights
    owes_evaluation: bool = False  # the last start was stopped at a step that is evaluated, before its evaluation
    skipped: int = 0  # batches that rewinds have skipped (train/rewind.py)
    rewinds: dict[str, Any] | None = None  # what the checkpoint keeps for the next rewind; None without train.rewind


def start_or_resume(
    program: Program, run: RunFolder, checkpoints: Checkpointer, prepared: Prepared, batches: TrainBatches,
    recorder: Recorder, rows: Rows,
) -> Start:  # fmt: skip
    """Return the state of the newest good checkpoint, with the data stream at its position, or a new state."""
    tokenizer = prepared.tokenizer
    restored = restore(program, checkpoints, tokenizer, frozen=run.frozen, log=recorder.warn)
    if restored is None:
        counts = rows.counts
        recorder.log(f"initializing {counts.total:,} parameters ({counts.active:,} active per token)")
        state, kept = _with_frozen(program, initial_state(program), run, tokenizer, recorder)
        recorder.event(
            0, "started", f"{counts.total:,} parameters", parameters_total=counts.total,
            parameters_active=counts.active, mfu_convention=rows.convention, flops_per_token=rows.flops_per_token,
        )  # fmt: skip
        return Start(state, 0, 0.0, kept)
    # The count of refused updates restarts, so that the refusal that ended the last start does not end this one.
    state = restored.state._replace(nonfinite=jnp.zeros_like(restored.state.nonfinite))
    if "data" in restored.metadata:
        batches.set_state(restored.metadata["data"])
    recorder.log(f"resuming from step {restored.step}")
    recorder.event(restored.step, "resumed", f"from step {restored.step}")
    kept = restored.metadata.get("frozen", "")
    if not kept:  # the checkpoint held only weights
        state, kept = _with_frozen(program, state, run, tokenizer, recorder)
    metadata = restored.metadata
    return Start(
        state, restored.step, metadata["seconds"], kept, metadata.get("owes_evaluation", False),
        metadata["data"]["step"] - restored.step if "data" in metadata else 0, metadata.get("rewinds"),
    )  # fmt: skip


def _with_frozen(
    program: Program, state: TrainState, run: RunFolder, tokenizer: Tokenizer, recorder: Recorder
) -> tuple[TrainState, str]:
    """Write the frozen weights to disk. Return (the state with its teacher, the digest of its frozen weights or '')."""
    if program.teacher is not None:
        teacher = RunFolder(program.experiment.train.teacher)
        with Checkpointer(teacher.checkpoints, read_only=True, log=recorder.warn) as checkpoints:
            weights = load_weights(program.teacher, checkpoints, tokenizer, frozen=teacher.frozen, log=recorder.warn)
        if weights is None:
            raise CheckpointError(
                f"train.teacher = {str(teacher.path)!r}: the run has no checkpoint yet; train it first"
            )
        recorder.log(f"teacher: {teacher.path} at step {weights.step}")
        state = with_teacher(state, jax.tree.map(lambda w: w.astype(jnp.float32), weights.model))
    return state, "" if state.frozen is None else keep_frozen(run.frozen, state.frozen, recorder.warn)


def make_rewinder(
    program: Program, run: RunFolder, checkpoints: Checkpointer, prepared: Prepared, recorder: Recorder, start: Start
) -> Rewinder | None:
    """Return the hook that returns to an earlier checkpoint when the loss diverges, or None without train.rewind."""

    def restore_earlier(at_most: int) -> Restored:
        restored = restore(program, checkpoints, prepared.tokenizer, at_most=at_most, log=recorder.warn)
        if restored is None:
            raise CheckpointError(f"{run.checkpoints}: the checkpoint of step {at_most} is gone. Start the run again")
        checkpoints.abandon_after(restored.step)
        return restored

    config = program.experiment.train.rewind
    return None if config is None else Rewinder(config, checkpoints, recorder, start.rewinds, restore_earlier)


class Saver:
    """Saves train states with the data position, the tokenizer's identity, the seconds spent and a digest.

    The digest is that of the frozen weights, which are written once for all steps.
    """

    def __init__(
        self, checkpoints: Checkpointer, batches: TrainBatches, prepared: Prepared, start: Start,
        pause_watchdog: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        self.skipped = start.skipped  # batches that rewinds have skipped so far
        self._checkpoints, self._batches, self._tokenizer = checkpoints, batches, prepared.tokenizer
        self._seconds_before, self._began = start.seconds, time.monotonic()
        self._frozen = {"frozen": start.frozen} if start.frozen else {}
        self._pause_watchdog = pause_watchdog

    @property
    def seconds(self) -> float:
        """Seconds of training, evaluation and saving, over all the run's starts."""
        return self._seconds_before + time.monotonic() - self._began

    def save(
        self, state: TrainState, step: int, metric: float | None = None, wait: bool = False,
        owes_evaluation: bool = False, rewinds: dict[str, Any] | None = None,
    ) -> bool:  # fmt: skip
        """Start to save `state` as `step`. Return whether the save started or, with `wait`, whether it succeeded."""
        metadata = {
            "data": {**self._batches.get_state(), "step": step + self.skipped},
            "tokenizer": self._tokenizer.identity,
            "seconds": self.seconds,
            **self._frozen,
            **({"owes_evaluation": True} if owes_evaluation else {}),
            **({"rewinds": rewinds} if rewinds is not None else {}),
        }
        self._pause_watchdog()
        return self._checkpoints.save(step, state._replace(frozen=None), metadata=metadata, metric=metric, wait=wait)

    def require(self, state: TrainState, step: int, written: bool) -> None:
        """Raise CheckpointError unless `state` is on disk as `step` and reads back intact.

        A run whose last weights are lost is not finished. `written`: the result of `save`, equal on every process.
        """
        self._pause_watchdog()
        if written:
            return self._checkpoints.verify(step, state._replace(frozen=None))
        last = ""
        if process_zero():  # only process 0 lists the folder
            with contextlib.suppress(Exception):  # the save may have failed because the folder is gone
                steps = self._checkpoints.steps()
                last = f"; step {steps[-1]} is the last good one" if steps else "; no step was saved"
        raise CheckpointError(
            f"the checkpoint of step {step} was not written, and its weights are lost{last}. Free the disk, or restore "
            "the permissions, and start the same command again: it continues from there"
        )
