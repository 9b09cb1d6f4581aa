"""Several runs under one vmapped step: runs whose programs are equal and that differ only in traced scalars.

Every run has its own trainer, batches, hooks and checkpoints, as if it ran alone; only the step is common. A run can
therefore be continued alone, and a run that was stopped alone can join others, at any step.

The runs are generators (`_course`): each yields its next batch, and receives the result of the common step. The rows of
the common state are independent: a run that ends or diverges leaves its row in place, and the others are not affected.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import Batch
from data.prepare import Prepared
from train.hooks import NonfiniteError
from train.hyper import stack
from train.loop import assemble
from train.program import Program
from train.run_folder import RunFolder
from train.signals import StopSignal, Watchdog
from train.step import TrainState
from train.trainer import Trained, Trainer

FAULTS = (ValueError, RuntimeError, OSError)  # that end a run; NonfiniteError is one of them


class Member(NamedTuple):
    """A run to train together with others. The programs of all members are copies of one (`dataclasses.replace`)."""

    program: Program  # with the experiment and the hyperparameters of this run
    run: RunFolder
    log: Callable[[str], None]


def train_together(members: Sequence[Member], prepared: Prepared, *, stop: StopSignal) -> list[Trained | Exception]:
    """Train runs to their ends, or to the first step at which `stop` is requested, on one device.

    Return what `train` (train/loop.py) would return or raise for each: its result, or the exception that ended it, a
    NonfiniteError where it diverged. Its last checkpoint stays in every case. Losses equal those of a run alone up to
    rounding, which batched matmuls do in another order.

    Raises ValueError for programs on several devices and for train.rewind, and what the common step raises, such as
    RuntimeError if its memory does not suffice: every run is then as a crash would have left it.
    """
    if any(member.program.mesh is not None for member in members) or jax.process_count() > 1:
        raise ValueError("train_together: the programs use several devices; build them with devices=[one device]")
    if any(member.program.experiment.train.rewind is not None for member in members):
        raise ValueError(
            "train.rewind: a run that returns to an earlier checkpoint cannot train together with others. Set "
            "train.rewind=none, or train it alone (study --vectorize 1)"
        )
    limit = max(member.program.experiment.train.watchdog_seconds for member in members)
    with Watchdog(limit) as watchdog:
        courses = [_Course(_course(member, prepared, stop, watchdog)) for member in members]
        try:
            for course in courses:
                course.proceed(None)
            if running := [course for course in courses if course.result is None]:
                group = _Group(running, stop, members[0].log)
                while group.running():
                    group.advance()
        finally:
            for course in courses:
                course.generator.close()
    return [course.result for course in courses if course.result is not None]


class _Waiting(NamedTuple):
    """What a course yields: its trainer, and the batch of its next step."""

    trainer: Trainer
    batch: Batch


class _Advanced(NamedTuple):
    """What a course receives: the result of the step."""

    read: Callable[[], dict[str, np.ndarray]]  # returns the metrics
    state: Callable[[], TrainState]  # returns the state of this run
    stopped: bool  # whether this was the last step


def _course(
    member: Member, prepared: Prepared, stop: StopSignal, watchdog: Watchdog
) -> Generator[_Waiting, _Advanced, Trained]:
    """Run one member: what `Trainer.fit` does, with a step that is computed elsewhere."""
    with contextlib.ExitStack() as parts:
        made = assemble(parts, member.program, prepared, member.run, log=member.log, stop=stop, watchdog=watchdog)
        if isinstance(made, Trained):
            return made
        trainer = made.trainer
        trainer.catch_up()
        while not trainer.ended:
            batch = trainer.next_batch()
            advanced = yield _Waiting(trainer, batch)
            try:
                with trainer.goodput.phase("steps"):
                    trainer.advanced(batch, advanced.read)
                trainer.stopped = advanced.stopped
                if due := trainer.evaluating or trainer.saving:
                    trainer.state = advanced.state()
                trainer.evaluate_and_save()
                if due and not trainer.ended:
                    del trainer.state  # a copy of a row
            except NonfiniteError:
                trainer.state = advanced.state()
                trainer.save_refused()
                raise
        return trainer.finish()


class _Course:
    """A generator of `_course` with what it yielded last, and its result once it has ended."""

    def __init__(self, generator: Generator[_Waiting, _Advanced, Trained]):
        self.generator = generator
        self.waiting: _Waiting | None = None  # kept after the end: the row computes on with its last batch
        self.result: Trained | Exception | None = None

    def proceed(self, advanced: _Advanced | None) -> None:
        """Run to the next step or to the end."""
        try:
            self.waiting = next(self.generator) if advanced is None else self.generator.send(advanced)
        except StopIteration as end:
            self.result = end.value
        except FAULTS as error:
            self.result = error


class _Group:
    """The common state of several runs, [runs, ...] in every leaf, and the step that advances it."""

    def __init__(self, courses: Sequence[_Course], stop: StopSignal, log: Callable[[str], None]):
        self._courses, self._stop = courses, stop
        trainers = [trainer for trainer, _ in self._waiting()]
        self._hyper = jax.device_put(stack([trainer.program.hyper for trainer in trainers]))
        self._state = _stacked([trainer.state for trainer in trainers])
        for trainer in trainers:
            del trainer.state  # the common state holds it
        self._figures: Callable[[], Any] = dict  # returns the metrics of the newest step; reads them once
        with self._phase("compilation"):
            self._step = _compiled(trainers[0].program, (self._state, self._rows(), self._hyper), len(trainers), log)

    def running(self) -> bool:
        """Return whether a run has steps left."""
        return any(course.result is None for course in self._courses)

    def advance(self) -> None:
        """Dispatch a step of all runs, wait for the one before, and pass the results to those that have not ended."""
        with self._phase("steps"):
            self._state, values = self._step(self._state, self._rows(), self._hyper)
            self._figures()
        self._figures = figures = functools.cache(lambda: jax.device_get(values))
        running = [(row, course) for row, course in enumerate(self._courses) if course.result is None]
        # One process asks once per step of all; its answer does not depend on the number of the step.
        stopped = self._stop.agreed(max(trainer.step for trainer, _ in self._waiting()) + 1)
        for row, course in running:
            read = lambda row=row: jax.tree.map(lambda value: np.asarray(value[row]), figures())
            course.proceed(_Advanced(read, functools.partial(_row, self._state, np.int32(row)), stopped))

    def _waiting(self) -> list[_Waiting]:
        return [course.waiting for course in self._courses if course.waiting is not None]

    def _rows(self) -> Batch:
        """Return the batches of all runs on the device, [runs, B, T]."""
        return jax.device_put(jax.tree.map(lambda *rows: np.stack(rows), *(batch for _, batch in self._waiting())))

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Count the time within as phase `name` of every run that has not ended."""
        with contextlib.ExitStack() as phases:
            for course in self._courses:
                if course.result is None and course.waiting is not None:
                    phases.enter_context(course.waiting.trainer.goodput.phase(name))
            yield


@jax.jit
def _stacked(states: Sequence[TrainState]) -> TrainState:
    """Return the states as one, with a leading axis over them in every leaf."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@jax.jit
def _row(state: TrainState, row: Any) -> TrainState:
    """Return one of the stacked states; `row` is an int32."""
    return jax.tree.map(lambda leaf: leaf[row], state)


def _compiled(
    program: Program, arguments: tuple[TrainState, Batch, Any], runs: int, log: Callable[[str], None]
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return the vmapped step, compiled unless the program already holds it. It donates the state."""
    name = f"step of {runs} runs"
    if name not in program.executables:
        began = time.monotonic()
        step = jax.jit(jax.vmap(program.step), donate_argnums=0)
        program.executables[name] = step.lower(*arguments).compile()
        log(f"compiled the train step of {runs} runs in {time.monotonic() - began:.1f} s")
    return program.executables[name]
