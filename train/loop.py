"""The training loop, which dispatches step t before it reads the metrics of step t - 1 as NumPy.

`train` assembles a run from its parts. `Trainer` advances it and calls its hooks (train/hooks.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from data.batch import Batch
from data.pipeline import TrainBatches, train_batches
from data.prepare import Prepared
from model.transformer import Transformer
from sharding.mesh import put_batch, put_replicated, use_mesh
from train.ahead import StepCompilation
from train.checkpoint import Checkpointer
from train.goodput import Goodput, RecordGoodput
from train.hooks import Evaluator, HeldOut, Hook, NonfiniteError, NonfiniteGuard, Recorder, ShowProgress, StepResult
from train.peer_watch import wait_for_peers
from train.program import Program
from train.progress import Progress, duration
from train.records import MetricsWriter, RunFolder
from train.routing import RouterProbe
from train.rows import Rows
from train.saving import Saver, Start, start_or_resume
from train.signals import StopSignal, Watchdog
from train.step import TrainState


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
    """

    def __init__(
        self, program: Program, start: Start, batches: TrainBatches, rows: Rows, saver: Saver, stop: StopSignal, *,
        watchdog: Watchdog, hooks: Sequence[Hook] = (), evaluators: Sequence[Evaluator] = (),
        goodput: Goodput | None = None,
    ):  # fmt: skip
        self.program, self.experiment = program, program.experiment
        self.state, self.first, self.step = start.state, start.step, start.step
        self.saved, self.stopped, self._written = start.step, False, True
        self._batches, self._rows, self._saver, self._stop, self._watchdog = batches, rows, saver, stop, watchdog
        self._hooks, self._evaluators = hooks, evaluators
        self._goodput = Goodput() if goodput is None else goodput
        self._hyper = put_replicated(program.hyper, program.mesh)
        self._read_step = start.step
        self._pending: tuple[int, dict[str, jax.Array], Batch] | None = None  # dispatched, not yet read

    def fit(self) -> Trained:
        """Run to the end; call `compile` first.

        Raises NonfiniteError, and CheckpointError if the last checkpoint is not on disk.
        """
        steps = self.experiment.train.steps
        try:
            while self.step < steps and not self.stopped:
                with self._goodput.phase("steps"):
                    self._advance(self.program.executables["step"])
                self._evaluate_and_save()
        except NonfiniteError:
            # The refused step and the one dispatched after it changed only the counters. The state is saved under the
            # refused step, so that a run that continues with 'skip' takes the next batch.
            if self.saved < self._read_step:
                behind = self.step - self._read_step
                self._saver.save(self.state._replace(step=self.state.step - behind), self._read_step, wait=True)
            raise
        with self._goodput.phase("checkpoints"):
            self._saver.require(self.state, self.step, self._written)
        finished = self.step >= steps
        for hook in self._hooks:
            hook.on_stop(self, finished)
        return Trained(self.state, self.step, finished, self._saver.seconds)

    def _advance(self, compiled: Callable) -> None:
        """Dispatch the next step, and read the metrics of the previous one."""
        batch = next(self._batches)
        rows = put_batch(batch, self.program.mesh, self.program.batch_spec)
        self.state, values = compiled(self.state, rows, self._hyper)
        self.step += 1
        self._read()
        self._pending = (self.step, values, batch)
        self._watchdog.beat()
        self.stopped = self._stop.agreed(self.step)

    def _read(self) -> None:
        """Fetch the metrics of the last dispatched step, and pass them to the hooks."""
        if self._pending is None:
            return
        (self._read_step, values, batch), self._pending = self._pending, None
        figures: dict[str, np.ndarray] = jax.device_get(values)
        row = self._rows.row(self._read_step, figures)
        result = StepResult(self._read_step, row, batch, int(figures["nonfinite"]))
        for hook in self._hooks:
            hook.on_step(self, result)

    def _evaluate_and_save(self) -> None:
        config, step = self.experiment.train, self.step
        last = step == config.steps
        evaluating = not last and bool(config.eval_every) and step % config.eval_every == 0
        saving = last or self.stopped or step % config.checkpoint_every == 0
        if evaluating or saving:
            with self._goodput.phase("steps"):
                self._read()  # raises before a step that is not finite could be saved as a good one
        metric = None
        if (evaluating or last) and not self.stopped:
            with self._goodput.phase("evaluation"):
                metric = self._evaluate(last)
        if saving:
            self.saved = step
            with self._goodput.phase("checkpoints"):
                self._written = self._saver.save(self.state, step, metric, wait=last or self.stopped)
            self._rows.clock.pause()
            for hook in self._hooks:
                hook.on_save(self, step, self._written)

    def _evaluate(self, last: bool) -> float | None:
        """Run the evaluators, and return the metric by which checkpoints are compared."""
        rows: list[dict[str, Any]] = []
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
        with self._goodput.phase("compilation"):
            compiled = None if ahead is None else ahead.result(*arguments)
            waited = time.monotonic() - began
            if compiled is None:
                ahead, compiled = None, jax.jit(self.program.step, donate_argnums=0).lower(*arguments).compile()
        memory, text = compiled.memory_analysis(), ""
        if memory is not None:
            self._goodput.memory = {
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


class StopMessage(Hook):
    """Reports the step at which a run was stopped."""

    def __init__(self, recorder: Recorder, saver: Saver):
        self._recorder, self._saver = recorder, saver

    def on_stop(self, trainer: Trainer, finished: bool) -> None:
        if finished:
            return
        message = (
            f"stopped at step {trainer.step} after {duration(self._saver.seconds)}; the same command continues there"
        )
        self._recorder.event(trainer.step, "stopped", message)
        self._recorder.log(message)


def train(
    program: Program,
    prepared: Prepared,
    run: RunFolder,
    *,
    log: Callable[[str], None] = print,
    show_progress: bool = True,
    stop: StopSignal | None = None,
    watchdog: Watchdog | None = None,
    checkpoints: Checkpointer | None = None,
    batches: TrainBatches | None = None,
    hooks: Sequence[Hook] = (),
    goodput: Goodput | None = None,
) -> Trained:
    """Train from the newest checkpoint of the run, or from the start, to `train.steps` or the first SIGINT or SIGTERM.

    The losses of a resumed run equal those of an uninterrupted one, bit for bit on the same devices. `stop` (entered
    by the caller), `watchdog`, `checkpoints` and `batches` replace the defaults; `hooks` run after the default ones;
    `goodput` measures the time of this start. Raises NonfiniteError, CheckpointError or DataError; the last checkpoint
    stays in every case.
    """
    experiment, config = program.experiment, program.experiment.train
    process, processes, goodput = jax.process_index(), jax.process_count(), goodput or Goodput()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        recorder = Recorder(enter(MetricsWriter(run, sinks=config.sinks, process_index=process)), log)
        if checkpoints is None:
            checkpoints = Checkpointer(
                run.checkpoints, keep_last=config.keep_last, keep_best=config.keep_best, log=recorder.warn
            )
        enter(checkpoints)
        stop = enter(StopSignal()) if stop is None else stop
        watchdog = enter(Watchdog(config.watchdog_seconds) if watchdog is None else watchdog)
        if batches is None:
            batches = train_batches(prepared, experiment.data, process_index=process, process_count=processes)
        enter(batches)
        enter(use_mesh(program.mesh))
        rows = Rows(experiment, prepared)
        with goodput.phase("initialization"):
            start = start_or_resume(program, run, checkpoints, prepared, batches, recorder, rows)
        goodput.start_step = start.step
        if start.step >= config.steps:
            return Trained(start.state, start.step, True, start.seconds)
        saver = Saver(checkpoints, batches, prepared, start, watchdog.rest)
        progress = Progress(
            config.steps, start_step=start.step, title=experiment.name, enabled=process == 0 and show_progress,
            mfu_convention=rows.convention if rows.peak_known else "",
        )  # fmt: skip
        guard = NonfiniteGuard(run, recorder, config.nonfinite == "stop")
        trainer = Trainer(
            program, start, batches, rows, saver, stop, watchdog=watchdog,
            hooks=[guard, recorder, ShowProgress(progress), StopMessage(recorder, saver),
                   RecordGoodput(goodput, recorder), *hooks],
            evaluators=own_evaluators(program, prepared, run, recorder, watchdog), goodput=goodput,
        )  # fmt: skip
        del start  # its state is donated to the first step
        trainer.compile(log)
        enter(progress)
        return trainer.fit()


def own_evaluators(
    program: Program, prepared: Prepared, run: RunFolder, recorder: Recorder, watchdog: Watchdog
) -> list[Evaluator]:
    """Return the default evaluators: held-out text and, for a mixture of experts, the choices of its routers."""
    if not prepared.heldout_names:
        recorder.log("no text is held out (data.holdout_fraction = 0): nothing is evaluated")
        return []
    held_out = HeldOut(program, prepared, watchdog.beat)
    if program.experiment.model.moe is None:
        return [held_out]
    return [RouterProbe(program, prepared, run, recorder.warn), held_out]
