"""Coordinate processes that prepare data: one leads all that share its cache, and the others help or wait.

The caller provides the `Processes` (from jax.distributed, or a test); this module does not import JAX.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.config import DataError
from data.paths import Folder

SHARING = "sharing-"  # prefix of the folder that shows which processes share a cache
_ERROR_READ_SECONDS = 10.0


class Processes(Protocol):
    """The processes of a run and a key-value store of text that they share."""

    @property
    def index(self) -> int:
        """Return the number of this process, from 0."""
        ...

    @property
    def count(self) -> int:
        """Return the number of processes, at least 1."""
        ...

    def send(self, key: str, text: str) -> None:
        """Publish a text to all processes without waiting for them."""
        ...

    def receive(self, key: str, timeout: float | None = None) -> str:
        """Wait for a text and return it. Raises TimeoutError after `timeout` seconds."""
        ...


@dataclass(frozen=True)
class OneProcess:
    """A single process."""

    index: int = 0
    count: int = 1

    def send(self, key: str, text: str) -> None:
        raise AssertionError("a single process must not send")

    def receive(self, key: str, timeout: float | None = None) -> str:
        raise AssertionError("a single process must not receive")


ONE_PROCESS = OneProcess()


class Rounds:
    """Rounds of work that all processes do in the same order. If one fails, all raise and none keeps waiting.

    Process 0 collects the answers of a round and publishes them together, so that a round costs each process two keys.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self._round = 0

    def together(self, work: Callable[[], str]) -> list[str]:
        """Run `work` in every process and return all results, by process.

        If the work fails in one process, it raises its error and the others raise OtherProcessFailed with its message.
        """
        if self.processes.count == 1:
            return [work()]
        self._round += 1
        try:
            self._answer({"result": work()})
            outcome = self._collect() if self.processes.index == 0 else self._wait()
        except BaseException as error:
            self._fail(error)
            raise
        if "error" in outcome:
            failed = outcome["process"]
            if self.processes.index == 0:
                self._wait_until_read(failed)
            raise OtherProcessFailed(f"process {failed} failed while preparing the data: {outcome['error']}")
        return outcome["results"]

    def _answer(self, answer: dict[str, Any]) -> None:
        """Send this process's answer to process 0, or store it if this is process 0."""
        self._own = answer
        if self.processes.index > 0:
            self.processes.send(f"{self._round}/{self.processes.index}", json.dumps(answer))

    def _collect(self) -> dict[str, Any]:
        """Wait for all answers or the first error, and publish the outcome."""
        results = [self._own["result"]]
        outcome: dict[str, Any] = {"results": results}
        for index in range(1, self.processes.count):
            answer = json.loads(self.processes.receive(f"{self._round}/{index}"))
            if "error" in answer:
                outcome = {"error": answer["error"], "process": index}
                break
            results.append(answer["result"])
        self._publish(outcome)
        return outcome

    def _publish(self, outcome: dict[str, Any]) -> None:
        self.processes.send(f"{self._round}/all", json.dumps(outcome))

    def _wait(self) -> dict[str, Any]:
        """Wait for the outcome that process 0 publishes."""
        outcome = json.loads(self.processes.receive(f"{self._round}/all"))
        if "error" in outcome:
            self.processes.send(f"{self._round}/read/{self.processes.index}", "")
        return outcome

    def _fail(self, error: BaseException) -> None:
        """Send this process's error for this round and, in case its answer was already sent, for the next one."""
        with contextlib.suppress(Exception):  # the store itself may have failed
            for _ in range(2):
                if self.processes.index == 0:
                    self._publish({"error": _message(error), "process": 0})
                else:
                    self._answer({"error": _message(error)})
                self._round += 1
            self._round -= 2
            if self.processes.index == 0 and isinstance(error, Exception):  # an interrupted process leaves at once
                self._wait_until_read()

    def _wait_until_read(self, failed: int = 0) -> None:
        """Wait until the others have read the error, because process 0 serves the store."""
        with contextlib.suppress(TimeoutError):
            for index in range(1, self.processes.count):
                if index != failed:
                    self.processes.receive(f"{self._round}/read/{index}", _ERROR_READ_SECONDS)


class OtherProcessFailed(DataError):
    """An error in another process."""


def _message(error: BaseException) -> str:
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}".removesuffix(": ")


def leaders_of(rounds: Rounds, cache: Folder) -> list[int]:
    """Create the cache folder. Return for every process the lowest one that shares its cache.

    Every process writes a file in the folder and looks for the others' files, so that one host, or several hosts with
    shared storage, have one leader. A process that does not yet see the others (network file systems may cache
    listings) leads itself and prepares the same content, which only costs time. All processes share a bucket.
    """
    index, count = rounds.processes.index, rounds.processes.count
    if not isinstance(cache, Path):
        return [0] * count
    if count == 1:
        cache.mkdir(parents=True, exist_ok=True)
        return [index]
    name = rounds.together(lambda: uuid.uuid4().hex)[0]
    presence = cache / f"{SHARING}{name}"

    def announce() -> str:
        presence.mkdir(parents=True, exist_ok=True)
        (presence / str(index)).touch()
        return ""

    rounds.together(announce)
    lowest = rounds.together(lambda: str(min(int(path.name) for path in presence.iterdir())))
    leaders = list(range(count))
    for process in leaders:
        while int(lowest[leaders[process]]) < leaders[process]:
            leaders[process] = int(lowest[leaders[process]])
    shutil.rmtree(presence, ignore_errors=True)
    return leaders
