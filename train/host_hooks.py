"""Hooks of a run of several processes: they repeat the check of the devices, and record stragglers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax._src import distributed  # the coordination service has no public client

from train.device_check import DeviceError, Reading, from_text, measure, slow, to_text, wrong
from train.hooks import Hook, Recorder, StepResult
from train.peer_watch import stragglers

if TYPE_CHECKING:
    from train.trainer import Trainer

_generation = itertools.count()


class DeviceCheck(Hook):
    """Reads the devices at every checkpoint, and compares the processes' readings after the next step.

    No process waits for another. When the metrics of the next step are read, all processes have published their
    readings, because that step needed them all; so all raise the same DeviceError. `client` is that of jax.distributed.
    """

    def __init__(
        self, recorder: Recorder, client: Any, index: int, count: int,
        measure: Callable[[], list[Reading]] = measure,
    ):  # fmt: skip
        self._recorder, self._client, self._index, self._count, self._measure = recorder, client, index, count, measure
        generation = next(_generation)
        self._passed: int | None = None  # step of the last check without a fault
        self._pending: int | None = None  # step of the check whose readings are to be compared
        # Every process creates its hooks, and saves, in the same order.
        self._folders = (f"meshwork/device_check/{generation}/{number}/" for number in itertools.count())
        self._published: list[str] = []  # folders with a reading of this process

    def on_save(self, trainer: Trainer, step: int, started: bool) -> None:
        folder = next(self._folders)
        self._client.key_value_set(f"{folder}{self._index}", to_text(self._measure()))
        self._pending = step
        self._published.append(folder)
        if len(self._published) > 2:  # every process has compared the readings in the first of them
            self._client.key_value_delete(f"{self._published.pop(0)}{self._index}")

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        if self._pending is not None:
            self._compare(self._pending)

    def on_stop(self, trainer: Trainer, finished: bool) -> None:
        if self._pending is not None:  # after the last checkpoint, which all processes have verified
            self._compare(self._pending)

    def _compare(self, step: int) -> None:
        self._pending = None
        texts = [text for _, text in self._client.key_value_dir_get(self._published[-1])]
        if len(texts) < self._count:
            return
        readings = [reading for text in texts for reading in from_text(text)]
        if fault := wrong(readings):
            message = f"the devices differ after step {step}: {fault}. {self._advice()}"
            self._recorder.event(step, "wrong device", message)
            raise DeviceError(message)
        self._passed = step
        if self._index == 0 and (late := slow(readings)):
            self._recorder.warn(late)

    def _advice(self) -> str:
        if self._passed is None:
            return "They agreed at the start of this job, so checkpoints of this job may be damaged"
        return f"They agreed after step {self._passed}, so later checkpoints may be damaged"


class RecordStragglers(Hook):
    """Records the warnings about processes that delay the others. The watching thread of process 0 has printed them."""

    def __init__(self, recorder: Recorder, found: Callable[[], list[str]] = stragglers):
        self._recorder, self._found = recorder, found

    def on_step(self, trainer: Trainer, result: StepResult) -> None:
        for sentence in self._found():
            self._recorder.event(result.step, "straggler", sentence)


def host_hooks(recorder: Recorder, check_devices: bool) -> list[Hook]:
    """Return the hooks of this module for a run of several processes; none for one process."""
    if jax.process_count() == 1:
        return []
    client = distributed.global_state.client
    checks = [DeviceCheck(recorder, client, jax.process_index(), jax.process_count())] if check_devices else []
    return [RecordStragglers(recorder), *checks]
