"""Evaluators, which the trainer calls for metrics, and hooks, which it notifies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from data.array_files import write_arrays
from data.batch import Batch
from data.prepare import Prepared
from model.transformer import Transformer
from train.evaluate import evaluate_all
from train.program import Network
from train.progress import Progress
from train.records import MetricsWriter, RunFolder

if TYPE_CHECKING:
    from train.trainer import Trainer


class DivergedError(RuntimeError):
    """The run diverged, and its config ends it there."""


class NonfiniteError(DivergedError):
    """The loss or the gradient is not finite, and `train.nonfinite` is 'stop'."""


class StepResult(NamedTuple):
    """The result of a train step, available after the next step was dispatched."""

    step: int
    row: dict[str, Any]  # of metrics.jsonl
    batch: Batch  # this host's rows
    refused: int  # updates skipped so far because they were not finite


class Hook:
    """Base class of hooks, whose methods the trainer calls. Override any of them."""

    def before_step(self, trainer: Trainer) -> None:
        """Called before step `trainer.step` + 1 is dispatched."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after step `trainer.step` was dispatched, before evaluation and saving. The device may still run."""

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        """Called after the metrics of a step were read."""

    def on_eval(self, trainer: Trainer, step: int, rows: list[dict[str, Any]]) -> None:
        """Called after the weights of `step` were evaluated."""

    def before_save(self, trainer: Trainer, step: int) -> None:
        """Called before a checkpoint of `step` in the run's folder is started."""

    def on_save(self, trainer: Trainer, step: int, started: bool) -> None:
        """Called after a checkpoint of `step` was started (the last one: written) or failed to start."""

    def on_stop(self, trainer: Trainer, finished: bool) -> None:
        """Called when the run ends with its last checkpoint on disk: `finished`, or stopped on request."""


class Recorder(Hook):
    """Writes rows to metrics.jsonl and messages to `log`. A full disk loses rows but does not stop the run."""

    def __init__(self, metrics: MetricsWriter, log: Callable[[str], None]):
        self._metrics, self.log = metrics, log
        self._step = 0

    def record(self, row: dict[str, Any]) -> None:
        """Write a row."""
        self._step = row["step"]
        try:
            self._metrics.write(row)
        except OSError as error:
            self.log(f"warning: the metrics of step {row['step']} were not written ({error})")

    def close(self) -> None:
        """Close the metrics."""
        try:
            self._metrics.close()
        except OSError as error:
            self.log(f"warning: the last metrics were not written ({error})")

    def event(self, step: int, event: str, message: str, **more: Any) -> None:
        """Write an event."""
        self.record({"kind": "event", "step": step, "event": event, "message": message, **more})

    def warn(self, text: str) -> None:
        """Log a warning and write it as an event of the newest step."""
        self.log(f"warning: {text}")
        self.event(self._step, "warning", text)

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        config, step = trainer.experiment.train, result.step
        if step % config.log_every == 0 or step in (trainer.first + 1, config.steps):
            self.record(result.row)
        self._step = step

    def on_eval(self, trainer: Trainer, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self.record(row)

    def before_save(self, trainer: Trainer, step: int) -> None:
        """Write all rows up to the step, since a run that resumes from it does not make them again."""
        try:
            self._metrics.flush()
        except OSError as error:
            self.log(f"warning: the metrics up to step {step} were not written ({error})")


class NonfiniteGuard(Hook):
    """Saves the batch of an update that was not finite, and ends the run if its config says so."""

    def __init__(self, run: RunFolder, recorder: Recorder, stop: bool):
        self._run, self._recorder, self._stop = run, recorder, stop
        self._refused = 0

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if result.refused <= self._refused:
            return
        self._refused = result.refused
        path = self._run.path / f"nonfinite_step_{result.step}_process_{jax.process_index()}.npz"
        try:
            write_arrays(path, result.batch.arrays())
            kept = f"the batch is in {path.name}"
        except OSError as error:
            kept = f"the batch could not be saved ({error})"
        row = result.row
        message = (
            f"step {result.step}: loss {row['loss']}, gradient norm {row['grad_norm']}; the weights were left "
            f"unchanged, {kept}"
        )
        self._recorder.event(result.step, "nonfinite", message)
        if self._stop:
            raise NonfiniteError(
                f"{message}. train.nonfinite = 'stop' ended the run: skip such batches with "
                "--set train.nonfinite=skip, or lower optimizer.learning_rate in a new run (--run NEWNAME)"
            )
        self._recorder.log(message)


class ShowProgress(Hook):
    """Updates the progress panel or prints progress lines."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        self._progress.update(result.step, result.row)

    def on_eval(self, trainer: Trainer, step: int, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            self._progress.update(step, row)


class Evaluator(ABC):
    """Base class of evaluators: `evaluator(model, step)` returns rows, the first of which ranks the checkpoints.

    `at_end`: also called at the last step, which `experiments.run.finish` evaluates on all held-out text.
    """

    at_end = False

    @abstractmethod
    def __call__(self, model: Transformer, step: int) -> list[dict[str, Any]]: ...


class HeldOut(Evaluator):
    """Evaluates bits per byte on every held-out set."""

    def __init__(self, network: Network, prepared: Prepared, between: Callable[[], object]):
        self._network, self._prepared, self._between = network, prepared, between

    def __call__(self, model: Transformer, step: int) -> list[dict[str, Any]]:
        results = evaluate_all(self._network, model, self._prepared, full=False, between=self._between)
        return [{"kind": "eval", "step": step, "set": name, **result.row()} for name, result in results.items()]
