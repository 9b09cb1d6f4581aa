"""The trainer, which dispatches step t before it reads the metrics of step t - 1 as NumPy.

It decides when a run is evaluated and saved, and calls the hooks (train/hooks.py). train/loop.py assembles it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from data.batch import Batch
from data.pipeline import TrainBatches
from model.transformer import Transformer
from sharding.mesh import put_batch, put_replicated
from train.activity import activity
from train.ahead import StepCompilation
from train.goodput import Goodput
from train.hooks import Evaluator, Hook, NonfiniteError, StepResult
from train.peer_watch import wait_for_peers
from train.program import Program
from train.rewind import Rewinder, RewindRequest
from train.rows import Rows
from train.saving import Saver, Start
from train.signals import StopSignal, Watchdog
from train.step import TrainState
from train.trace import STEP


@dataclass(frozen=True)
class Trained:
    """The state of a run when `train` returns."""

    state: TrainState
    step: int
    finished: bool  # False: stopped on request
    seconds: float  # of training, evaluation and saving, over all the run's starts

    @property
    def model(self) -> Transformer:
        """The weights for evaluation and sampling: their average if the run keeps one."""
        return self.state.weights


class Trainer:
    """Advances a run from its start to `train.steps`, or to the step at which all processes agree to `stop`.

    After every step, it decides whether to evaluate and to save, and calls the hooks. `evaluators` return rows of
    metrics, `rows` makes the rows of train steps, and `saver` saves checkpoints. Use it for one run only.

    `fit` does all of it. A caller that computes the steps itself calls `catch_up`, then `next_batch`, `advanced` and
    `evaluate_and_save` for each step, `save_refused` after a NonfiniteError, and `finish` at the end. It sets `state`
    before the last three.
    """

    def __init__(
        self, program: Program, start: Start, batches: TrainBatches, rows: Rows, saver: Saver, stop: StopSignal, *,
        watchdog: Watchdog, hooks: Sequence[Hook] = (), evaluators: Sequence[Evaluator] = (),
        goodput: Goodput | None = None, rewinder: Rewinder | None = None,
    ):  # fmt: skip
        self.program, self.experiment = program, program.experiment
        self.state, self.first, self.step = start.state, start.step, start.step
        self.saved, self.stopped, self._written = start.step, False, True
        self._owes_evaluation = start.owes_evaluation
        self.goodput = Goodput() if goodput is None else goodput
        self._batches, self._rows, self._saver, self._stop, self._watchdog = batches, rows, saver, stop, watchdog
        self._hooks = [*hooks, *([] if rewinder is None else [rewinder])]
        self._evaluators = evaluators
        self._hyper = put_replicated(program.hyper, program.mesh)
        self._read_step = start.step
        self._rewinder = rewinder
        # Dispatched, not yet read: the step, a function that returns its metrics, its batch.
        self._pending: tuple[int, Callable[[], dict[str, np.ndarray]], Batch] | None = None

    @property
    def ended(self) -> bool:
        """Whether the run has reached `train.steps` or was stopped."""
        return self.stopped or self.step >= self.experiment.train.steps

    def fit(self) -> Trained:
        """Run to the end; call `compile` first.

        Raises DivergedError, DeviceError, and CheckpointError if the last checkpoint is not on disk.
        """
        self.catch_up()
        try:
            while not self.ended:
                try:
                    for hook in self._hooks:
                        hook.before_step(self)
                    with self.goodput.phase("steps"), jax.profiler.StepTraceAnnotation(STEP, step_num=self.step + 1):
                        self._advance(self.program.executables["step"])
                    for hook in self._hooks:
                        hook.after_step(self)
                    self.evaluate_and_save()
                except RewindRequest as request:
                    with self.goodput.phase("initialization"):
                        self._rewind(request.step)
        except NonfiniteError:
            self.save_refused()
            raise
        return self.finish()

    def catch_up(self) -> None:
        """Evaluate the state of the start if the last start was stopped before it could."""
        if self._owes_evaluation:
            with self.goodput.phase("evaluation"):
                self._evaluate(last=False)

    def _advance(self, compiled: Callable) -> None:
        """Dispatch the next step, and read the metrics of the previous one."""
        batch = self.next_batch()
        rows = put_batch(batch, self.program.mesh, self.program.batch_spec)
        activity.begin("step", self.step + 1)
        self.state, values = compiled(self.state, rows, self._hyper)
        self.advanced(batch, lambda: jax.device_get(values))
        self.stopped = self._stop.agreed(self.step)

    def _rewind(self, at_most: int) -> None:
        """Return to the newest good checkpoint up to step `at_most`. The stream of batches continues where it is."""
        assert self._rewinder is not None, "only a Rewinder raises RewindRequest"
        self._watchdog.rest()
        if self.step == self._read_step:  # read at once for an evaluation or checkpoint, not after the next dispatch
            self.next_batch()
            self.step += 1
        self._pending, diverged = None, self.step
        # The frozen weights stay on the devices. The count of refused updates continues, since hooks compare it with
        # the last one. The rest is freed before the restore, so that the devices never hold two states.
        kept = {"nonfinite": self.state.nonfinite, "frozen": self.state.frozen}
        del self.state
        restored = self._rewinder.restore(at_most)
        self.state = restored.state._replace(**kept)
        self.step = self.saved = self._read_step = restored.step
        self._written = True
        self._saver.skipped += diverged - restored.step
        self._rewinder.rewound(restored.metadata.get("rewinds"), restored.step, diverged, self._saver.skipped)
        self._rows.clock.pause()

    def next_batch(self) -> Batch:
        """Return this host's rows of the next batch."""
        activity.begin("data", self.step)
        with self.goodput.phase("data_wait"):
            return next(self._batches)

    @contextlib.contextmanager
    def paused(self, phase: str) -> Iterator[None]:
        """Count the time within as `phase`, not in the rates, and not as a step that hangs."""
        self._watchdog.rest()
        with self.goodput.phase(phase):
            yield
        self._rows.clock.pause()

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the model FLOPs utilization at this rate, or None where the devices' peak is unknown."""
        return self._rows.clock.mfu(tokens_per_second)

    def advanced(self, batch: Batch, read: Callable[[], dict[str, np.ndarray]]) -> None:
        """Count a dispatched step on `batch`, and pass the metrics of the step before it to the hooks.

        `read` returns the metrics of the new step; it is called one step later. Raises NonfiniteError.
        """
        self.step += 1
        self._read()
        self._pending = (self.step, read, batch)
        self._watchdog.beat()

    def _read(self) -> None:
        """Fetch the metrics of the last dispatched step, and pass them to the hooks."""
        if self._pending is None:
            return
        (self._read_step, read, batch), self._pending = self._pending, None
        figures = read()
        activity.begin("hooks", self.step)
        row = self._rows.row(self._read_step, figures)
        result = StepResult(self._read_step, row, batch, int(figures["nonfinite"]))
        for hook in self._hooks:
            hook.on_step(self, result)

    @property
    def evaluating(self) -> bool:
        """Whether the run is evaluated at this step. The last step is evaluated on all held-out text by the caller."""
        every = self.experiment.train.eval_every
        return self.step < self.experiment.train.steps and bool(every) and self.step % every == 0

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is saved at this step."""
        config = self.experiment.train
        local = config.local_checkpoint_every
        return self.ended or self.step % config.checkpoint_every == 0 or (local > 0 and self.step % local == 0)

    def evaluate_and_save(self) -> None:
        """Evaluate and save the state of this step where that is due. Raises NonfiniteError."""
        evaluating, saving = self.evaluating, self.saving
        last = self.step == self.experiment.train.steps
        if evaluating or saving:
            with self.goodput.phase("steps"):
                self._read()  # raises before a step that is not finite could be saved as a good one
        metric = None
        if (evaluating or last) and not self.stopped:
            with self.goodput.phase("evaluation"):
                metric = self._evaluate(last)
        if saving:
            self.saved = self.step
            activity.begin("checkpoint", self.step)
            with self.goodput.phase("checkpoints"):
                if self.ended or self.step % self.experiment.train.checkpoint_every == 0:
                    for hook in self._hooks:
                        hook.before_save(self, self.step)
                self._written = self._saver.save(
                    self.state,
                    self.step,
                    metric,
                    wait=last or self.stopped,
                    owes_evaluation=evaluating and self.stopped,
                    rewinds=self._rewinds,
                )
            self._rows.clock.pause()
            for hook in self._hooks:
                hook.on_save(self, self.step, self._written)

    def save_refused(self) -> None:
        """Save the state under the step that a NonfiniteError refused.

        The refused step and the one dispatched after it changed only the counters. A run that continues with 'skip'
        therefore takes the next batch.
        """
        if self.saved < self._read_step:
            behind = self.step - self._read_step
            state = self.state._replace(step=self.state.step - behind)
            self._saver.save(state, self._read_step, wait=True, rewinds=self._rewinds)

    @property
    def _rewinds(self) -> dict[str, Any] | None:
        """What a checkpoint keeps for the next rewind."""
        return None if self._rewinder is None else self._rewinder.metadata

    def finish(self) -> Trained:
        """Check the last checkpoint, call the hooks, and return the result. Raises CheckpointError."""
        with self.goodput.phase("checkpoints"):
            self._saver.require(self.state, self.step, self._written)
        finished = self.step >= self.experiment.train.steps
        for hook in self._hooks:
            hook.on_stop(self, finished)
        return Trained(self.state, self.step, finished, self._saver.seconds)

    def _evaluate(self, last: bool) -> float | None:
        """Run the evaluators, and return the metric by which checkpoints are compared."""
        rows: list[dict[str, Any]] = []
        activity.begin("evaluation", self.step)
        for evaluator in self._evaluators:
            if evaluator.at_end or not last:
                self._watchdog.rest()  # the first evaluation compiles
                rows += evaluator(self.state.weights, self.step)
        self._rows.clock.pause()
        for hook in self._hooks:
            hook.on_eval(self, self.step, rows)
        return rows[0]["bits_per_byte"] if rows else None

    def compile(self, log: Callable[[str], None]) -> None:
        """Compile the step ahead of its first call unless the program already holds it. The step donates the state."""
        executables = self.program.executables
        if isinstance(executables.get("step"), jax.stages.Compiled):
            return
        ahead: StepCompilation | None = executables.get("step")
        began = time.monotonic()
        batch = put_batch(self._batches.batch_at(self.first), self.program.mesh, self.program.batch_spec)
        arguments = self.state, batch, self._hyper
        with self.goodput.phase("compilation"):
            compiled = None if ahead is None else ahead.result(*arguments)
            waited = time.monotonic() - began
            if compiled is None:
                ahead, compiled = None, jax.jit(self.program.step, donate_argnums=0).lower(*arguments).compile()
        memory, text = compiled.memory_analysis(), ""
        if memory is not None:
            self.goodput.memory = {
                "arguments": memory.argument_size_in_bytes,
                "updated in place": memory.alias_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
            }
            text = (
                f"; per device: state and batch {memory.argument_size_in_bytes / 1e6:,.0f} MB "
                f"({memory.alias_size_in_bytes / 1e6:,.0f} MB updated in place), temporaries "
                f"{memory.temp_size_in_bytes / 1e6:,.0f} MB"
            )
        seconds = f"{time.monotonic() - began:.1f} s"
        if ahead is not None:
            seconds = f"{ahead.seconds:.1f} s, {max(ahead.seconds - waited, 0):.1f} s of them beside other work"
        log(f"compiled the train step in {seconds}{text}")
        executables["step"] = compiled
        wait_for_peers("compiled")
