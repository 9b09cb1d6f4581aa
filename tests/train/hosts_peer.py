"""A program, started by test_hosts, that is one of several processes which train the run of `small_runs` together.

    python -m tests.train.hosts_peer ADDRESS RANK COUNT FOLDER FAULT

FOLDER.experiment.json is the experiment. The FAULT strikes process 1: "killed" at step 7, "data" (every batch takes
0.4 s, and that of step 20 never comes), "stopped" (SIGSTOP at step 7), "wrong" (from the second checkpoint, its device
computes other bits), or "none". Each process writes the windows that it reads to FOLDER.reads-COUNT-RANK.json.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from jax._src import distributed

from data.pipeline import TrainBatches
from data.prepare import Prepared, prepare
from data.prepared import Windows
from experiments.processes import agree_on_devices, compare_clocks
from tests.train.small_runs import run
from train.config import Experiment
from train.config_io import load_json
from train.device_check import Reading, measure
from train.hooks import Recorder
from train.host_hooks import DeviceCheck
from train.peer_watch import join
from train.program import build
from train.signals import StopSignal, exit_hard_on_exception

SLOW_SECONDS = 0.4  # for a batch of the fault "data"
HUNG_STEP = 20  # whose batch never comes
STRUCK_STEP = 7


class RecordedWindows(Windows):
    """The windows of one source. It notes which are read, and by which thread."""

    def __init__(self, windows: Windows, name: str, reads: list[tuple[int, str, int]]):
        vars(self).update(vars(windows))
        self.name, self.reads = name, reads

    def ranges(self, window):
        self.reads.append((threading.get_ident(), self.name, int(window)))
        return super().ranges(window)


@dataclasses.dataclass(frozen=True)
class Recorded(Prepared):
    """A prepared corpus that notes the windows of training text that are read."""

    reads: list[tuple[int, str, int]] = dataclasses.field(default_factory=list)

    def windows(self, name: str):
        return RecordedWindows(super().windows(name), name, self.reads)


def recorded(prepared: Prepared) -> Recorded:
    """Return the same corpus, which notes what is read."""
    return Recorded(**{field.name: getattr(prepared, field.name) for field in dataclasses.fields(prepared)})


def streamed(reads: list[tuple[int, str, int]]) -> list[tuple[str, int]]:
    """Return the windows that the prefetching thread of the stream has read, in order."""
    return [(name, window) for thread, name, window in reads if thread != threading.main_thread().ident]


class SlowBatches(TrainBatches):
    """A stream on a slow disk, which hangs in the end."""

    def __next__(self):
        time.sleep(SLOW_SECONDS if self._step < HUNG_STEP - 1 else 1e6)
        return super().__next__()


class Struck(StopSignal):
    """Sends this process a signal at STRUCK_STEP, when the checkpoint before it is complete."""

    def __init__(self, number: int, checkpoint: Path | None):
        super().__init__()
        self._strike, self._checkpoint = number, checkpoint

    def agreed(self, step: int) -> bool:
        if step == STRUCK_STEP:
            while self._checkpoint is not None and not self._checkpoint.exists():
                time.sleep(0.05)
            os.kill(os.getpid(), self._strike)
        return super().agreed(step)


class Printer(Recorder):
    """Prints events instead of writing them."""

    def __init__(self) -> None:
        self.log = print

    def event(self, step: int, event: str, message: str, **more: object) -> None:
        print(f"event at step {step}: {event}")


def damaged_check(rank: int, count: int) -> DeviceCheck:
    """Return the hook of a run; from the second checkpoint, the device of process 1 computes other bits."""
    calls = itertools.count()

    def read() -> list[Reading]:
        good = next(calls) == 0 or rank != 1
        return [each if good else dataclasses.replace(each, checksum="0" * 8) for each in measure()]

    return DeviceCheck(Printer(), distributed.global_state.client, rank, count, read)


def main(address: str, rank: int, count: int, folder: Path, fault: str) -> None:
    join(count, rank, address=address, window_seconds=2.0 if fault == "data" else 30.0)
    exit_hard_on_exception()
    compare_clocks(print)
    agree_on_devices(print)
    e = load_json(Experiment, folder.with_suffix(".experiment.json"))
    prepared, parts = recorded(prepare(e.data)), {}
    if rank == 1 and fault == "data":
        parts["batches"] = SlowBatches(prepared, e.data, 0, rank, count)
    if rank == 1 and fault in ("killed", "stopped"):
        number = signal.SIGKILL if fault == "killed" else signal.SIGSTOP
        checkpoint = folder / "checkpoints/5/commit.json" if fault == "killed" else None
        parts["stop"] = Struck(number, checkpoint).__enter__()
    if fault == "wrong":
        parts["hooks"] = [damaged_check(rank, count)]
    trained = run(build(e), prepared, folder, **parts)
    folder.with_suffix(f".reads-{count}-{rank}.json").write_text(json.dumps(streamed(prepared.reads)))
    print("finished" if trained.finished else "stopped", trained.step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
