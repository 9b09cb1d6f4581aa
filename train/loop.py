"""The training loop of one run: `assemble` makes its trainer (train/trainer.py) from its parts, and `train` runs it.

train/together.py advances the trainers of several runs by one step of all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from data.pipeline import TrainBatches, train_batches
from data.prepare import Prepared
from sharding.mesh import use_mesh
from train.checkpoint import Checkpointer
from train.config import TrainConfig
from train.goodput import Goodput, RecordGoodput
from train.hooks import Evaluator, HeldOut, Hook, NonfiniteGuard, Recorder, ShowProgress
from train.host_hooks import host_hooks
from train.program import Program
from train.progress import Progress, duration
from train.records import MetricsWriter, RunFolder
from train.routing import RouterProbe
from train.rows import Rows
from train.saving import Saver, make_rewinder, start_or_resume
from train.signals import StopSignal, Watchdog
from train.tiers import TieredCheckpointer, local_folder
from train.trainer import Trained, Trainer

__all__ = ["Assembled", "StopMessage", "Trained", "Trainer", "assemble", "own_evaluators", "train"]


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


class Assembled(NamedTuple):
    """A trainer that is ready to `compile` and `fit`, and its progress display, to be entered in between."""

    trainer: Trainer
    progress: Progress


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
    `goodput` measures the time of this start. Raises DivergedError, DeviceError, CheckpointError or DataError; the
    last checkpoint stays in every case.
    """
    with contextlib.ExitStack() as stack:
        made = assemble(
            stack, program, prepared, run, log=log, show_progress=show_progress, stop=stop, watchdog=watchdog,
            checkpoints=checkpoints, batches=batches, hooks=hooks, goodput=goodput,
        )  # fmt: skip
        if isinstance(made, Trained):
            return made
        made.trainer.compile(log)
        stack.enter_context(made.progress)
        return made.trainer.fit()


def assemble(
    stack: contextlib.ExitStack,
    program: Program,
    prepared: Prepared,
    run: RunFolder,
    *,
    log: Callable[[str], None],
    show_progress: bool = False,
    stop: StopSignal | None = None,
    watchdog: Watchdog | None = None,
    checkpoints: Checkpointer | None = None,
    batches: TrainBatches | None = None,
    hooks: Sequence[Hook] = (),
    goodput: Goodput | None = None,
) -> Assembled | Trained:
    """Return the trainer of a run at its newest checkpoint or start, or its result if no step is left.

    The parts of the run are entered in `stack`, which the caller closes. The other arguments are those of `train`.
    Raises CheckpointError or DataError.
    """
    experiment, config = program.experiment, program.experiment.train
    process, processes, goodput = jax.process_index(), jax.process_count(), goodput or Goodput()
    enter = stack.enter_context
    recorder = Recorder(MetricsWriter(run, sinks=config.sinks, process_index=process), log)
    stack.callback(recorder.close)
    if checkpoints is None:
        checkpoints = _checkpointer(run, config, recorder.warn)
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
    recorder.record(goodput.row(start.step))  # a start that dies soon is counted, too
    if start.step >= config.steps:
        return Trained(start.state, start.step, True, start.seconds)
    saver = Saver(checkpoints, batches, prepared, start, watchdog.rest)
    progress = Progress(
        config.steps, start_step=start.step, title=experiment.name, enabled=process == 0 and show_progress,
        mfu_convention=rows.convention if rows.peak_known else "",
    )  # fmt: skip
    guard = NonfiniteGuard(run, recorder, config.nonfinite == "stop")
    rewinder = make_rewinder(program, run, checkpoints, prepared, recorder, start)
    trainer = Trainer(
        program, start, batches, rows, saver, stop, watchdog=watchdog,
        hooks=[guard, recorder, ShowProgress(progress), StopMessage(recorder, saver),
               RecordGoodput(goodput, recorder), *host_hooks(recorder, config.check_devices), *hooks],
        evaluators=own_evaluators(program, prepared, run, recorder, watchdog), goodput=goodput, rewinder=rewinder,
    )  # fmt: skip
    return Assembled(trainer, progress)


def _checkpointer(run: RunFolder, config: TrainConfig, log: Callable[[str], None]) -> Checkpointer:
    older = 0 if config.rewind is None else config.rewind.keep_older
    keep: dict[str, Any] = {"keep_last": config.keep_last, "keep_best": config.keep_best, "keep_older": older}
    if not config.local_checkpoint_every:
        return Checkpointer(run.checkpoints, log=log, **keep)
    local = local_folder(run, config.local_checkpoint_dir)
    return TieredCheckpointer(run.checkpoints, local, every=config.checkpoint_every, log=log, **keep)


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
