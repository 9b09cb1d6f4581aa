"""Profiler traces of a few train steps, written into the run's folder.

    RUN/profile/plugins/profile/steps_10-15/HOST.xplane.pb      for xprof and TensorBoard
                                            HOST.trace.json.gz  for Perfetto
                                            operations.txt      the printed table

A trace changes no result: before and after it the trainer waits for the device, and nothing else. Every process traces
its devices; the files of all are in one folder, and process 0 prints the table of its devices.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import jax
from etils import epath

from data.paths import is_local, write_whole
from train.hooks import Hook
from train.operation_kinds import read_program
from train.peer_watch import wait_for_peers
from train.profile_steps import ProfileSteps
from train.records import RunFolder
from train.trace import read_trace, table

if TYPE_CHECKING:
    from train.trainer import Trainer

LARGE_BYTES = 1_000_000_000  # of a trace: above, users are warned, and the table is left out
FAILURES = (OSError, RuntimeError, ValueError)  # of a trace, which must not end a run


class Profile(Hook):
    """Traces the steps of one start, and prints where their time went. A context manager: leaving it ends the trace.

    If the run ends or fails before the last of the steps, the trace ends there. A process that is killed leaves no
    trace. A trace that cannot be written is reported, and the run continues.
    """

    def __init__(self, steps: ProfileSteps, run: RunFolder, log: Callable[[str], None]):
        self._asked, self._run, self._log = steps, run, log
        self._range: tuple[int, int] | None = None
        self._resolved = False
        self._folder: Path | None = None  # where the trace is written; None: nothing is traced now
        self._began = self._tokens = 0.0
        self._traced = (0, 0)  # first and last step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None:
            self._export(None, time.monotonic())

    def before_step(self, trainer: Trainer) -> None:
        if self._folder is not None and trainer.step < self._traced[1]:  # the run returned to an earlier checkpoint
            with trainer.paused("profile"):
                self._export(trainer, time.monotonic())
        if not self._resolved:
            self._resolved, total = True, trainer.experiment.train.steps
            self._range = self._asked.after(trainer.step, total)
            if self._range is None:
                self._log(
                    f"--profile {self._asked}: nothing is traced, because this start begins after step {trainer.step} "
                    f"of {total}. Try --profile with later steps, or a longer run (--set train.steps=N)"
                )
        if self._folder is None and self._range is not None and trainer.step + 1 == self._range[0]:
            with trainer.paused("profile"):
                self._begin(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if self._folder is None or self._range is None:
            return
        self._traced = self._traced[0], trainer.step
        if trainer.step == self._range[1] or trainer.ended:
            jax.block_until_ready(trainer.state)
            now = time.monotonic()
            with trainer.paused("profile"):
                self._export(trainer, now)
                wait_for_peers("profiled")  # process 0 takes longer, since it reads the trace

    def _begin(self, trainer: Trainer) -> None:
        """Start the trace once the device has done all earlier work."""
        jax.block_until_ready(trainer.state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # tracing Python calls slows the steps, and multiplies the size
        parent = self._run.path / "profile"
        try:
            prefix = f".trace-{jax.process_index()}-"
            if is_local(parent):
                parent.mkdir(exist_ok=True)
                for stale in Path(parent).glob(f"{prefix}*"):  # of a start that was killed
                    shutil.rmtree(stale, ignore_errors=True)
            self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=os.fspath(parent) if is_local(parent) else None))
            jax.profiler.start_trace(self._folder, profiler_options=options)
        except FAILURES as error:
            self._forget()
            self._log(f"warning: --profile {self._asked}: no trace was started ({error}); the run continues")
            return
        self._traced = trainer.step + 1, trainer.step
        data = trainer.experiment.data
        self._tokens = float(data.batch_size * data.sequence_length)
        self._began = time.monotonic()

    def _forget(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def _export(self, trainer: Trainer | None, now: float) -> None:
        """End the trace, write it to the run's folder, and print the table. `trainer` is None if the run failed."""
        folder, (first, last) = self._folder, self._traced
        assert folder is not None
        try:
            jax.profiler.stop_trace()
            if last < first:
                self._log(f"--profile {self._asked}: the run ended before a step was traced")
                return
            early = "" if trainer is not None and self._range == self._traced else "; the run ended there"
            target = self._run.path / "profile" / "plugins" / "profile" / f"steps_{first}-{last}"
            traces = sorted(folder.rglob("*.xplane.pb"))
            size = sum(file.stat().st_size for file in traces)
            copied = [
                copy_trace(file, target)
                for pattern in ("*.xplane.pb", "*.trace.json.gz") for file in sorted(folder.rglob(pattern))
            ]  # fmt: skip
            if is_local(target):
                traces = [Path(path) for path in copied if path.name.endswith(".xplane.pb")]
            if jax.process_index() == 0:
                lines = self._described(trainer, traces, size, now - self._began)
                write_whole(target / "operations.txt", "".join(f"{line}\n" for line in lines))
                for line in [f"profile of steps {first} to {last}{early}", *lines, *self._how_to_open(copied)]:
                    self._log(line)
        except Exception as error:  # bucket clients raise their own exception classes
            self._log(f"warning: --profile {self._asked}: the trace was not written or not read ({error})")
        finally:
            self._range = None  # a run that returns to an earlier checkpoint is not traced again
            self._forget()

    def _described(self, trainer: Trainer | None, traces: list[Path], size: int, seconds: float) -> list[str]:
        """Return the table of the trace as lines, below a line on the steps."""
        if size > LARGE_BYTES:
            return [
                f"warning: the trace has {size / 1e9:.1f} GB, too much for a table here and slow to open. "
                "Try fewer steps"
            ]
        text = trainer.program.executables["step"].as_text() if trainer is not None else None
        program = read_program(text or "")
        breakdowns = [read_trace(jax.profiler.ProfileData.from_file(str(file)), *program) for file in traces]
        found = next((each for each in breakdowns if each is not None), None)
        if found is None:
            return ["the trace has no operations of a device that this code knows; open it to see what it has"]
        steps, rate = len(found.steps), ""
        if trainer is not None and steps and (mfu := trainer.mfu(steps * self._tokens / seconds)) is not None:
            rate = f", MFU {mfu:.1%}"
        many = f"{found.devices} devices" if found.devices > 1 else "1 device"
        processes = f" of process 0 of {jax.process_count()}" if jax.process_count() > 1 else ""
        head = f"{steps} steps in {seconds:.2f} s on {many}{processes}{rate}; the trace has {size / 1e6:.1f} MB"
        return [head, "", *table(found)]

    def _how_to_open(self, copied: list[epath.Path]) -> list[str]:
        folder = self._run.path / "profile"
        perfetto = next((f", or open {path} at https://ui.perfetto.dev" for path in copied if path.suffix == ".gz"), "")
        return [
            "",
            f"trace: {copied[0] if copied else 'the profiler wrote none'}",
            f"to see it: pip install xprof; xprof --logdir {folder}{perfetto}",
        ]


def copy_trace(file: Path, target: epath.Path) -> epath.Path:
    """Copy a file into the folder `target`, or move it to a local one. Return its path there, which names the host."""
    host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
    if jax.process_count() > 1:
        host += f"-process-{jax.process_index()}"  # processes may share a host
    suffix = ".xplane.pb" if file.name.endswith(".xplane.pb") else ".trace.json.gz"
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{host}{suffix}"
    if is_local(target):
        os.replace(file, path)
    else:
        with open(file, "rb") as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink)
    return path
