"""Several processes that prepare data together: one does the work for all that share its cache, the others wait.

The caller brings the processes (`Processes`: jax.distributed's, or a test's); nothing here imports JAX.
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

SHARING = "sharing-"  # prefix of the folder by which processes find out who shares their cache
_FAREWELL_SECONDS = 10.0


class Processes(Protocol):
    """The processes of a run, and a store of text by key that they share."""

    @property
    def index(self) -> int:
        """Number of this process, from 0."""
        ...

    @property
    def count(self) -> int:
        """Number of processes, at least 1."""
        ...

    def send(self, key: str, text: str) -> None:
        """Make a text known to all processes, without waiting for them."""
        ...

    def receive(self, key: str, timeout: float | None = None) -> str:
        """Wait for a text and return it. Raises TimeoutError after `timeout` seconds."""
        ...


@dataclass(frozen=True)
class OneProcess:
    """A process without others."""

    index: int = 0
    count: int = 1

    def send(self, key: str, text: str) -> None:
        raise AssertionError("one process sends nothing")

    def receive(self, key: str, timeout: float | None = None) -> str:
        raise AssertionError("one process receives nothing")


ONE_PROCESS = OneProcess()


class Rounds:
    """Rounds of work that all processes do in the same order. An error of one is an error of all: nobody waits on.

    Process 0 collects the answers of a round and publishes them together, so that a round costs each process two keys.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self._round = 0

    def together(self, work: Callable[[], str]) -> list[str]:
        """Run `work` in every process and return all results, by process.

        A process whose work fails raises its error; every other process raises OtherProcessFailed with the same words.
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
            raise OtherProcessFailed(f"process {failed} failed while it prepared the data: {outcome['error']}")
        return outcome["results"]

    def _answer(self, answer: dict[str, Any]) -> None:
        """Send this process's answer to process 0, or keep it where this is process 0."""
        self._own = answer
        if self.processes.index > 0:
            self.processes.send(f"{self._round}/{self.processes.index}", json.dumps(answer))

    def _collect(self) -> dict[str, Any]:
        """Wait for all answers, or for the first error, and publish them."""
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
        """Wait for what process 0 publishes."""
        outcome = json.loads(self.processes.receive(f"{self._round}/all"))
        if "error" in outcome:
            self.processes.send(f"{self._round}/read/{self.processes.index}", "")
        return outcome

    def _fail(self, error: BaseException) -> None:
        """Send the error of this process for this round and, if its answer was sent already, for the next one."""
        with contextlib.suppress(Exception):  # the store may be what failed
            for _ in range(2):
                if self.processes.index == 0:
                    self._publish({"error": _words(error), "process": 0})
                else:
                    self._answer({"error": _words(error)})
                self._round += 1
            self._round -= 2
            if self.processes.index == 0 and isinstance(error, Exception):  # an interrupted process leaves at once
                self._wait_until_read()

    def _wait_until_read(self, failed: int = 0) -> None:
        """Stay until the others have read the error: process 0 serves the store, which ends with it."""
        with contextlib.suppress(TimeoutError):
            for index in range(1, self.processes.count):
                if index != failed:
                    self.processes.receive(f"{self._round}/read/{index}", _FAREWELL_SECONDS)


class OtherProcessFailed(DataError):
    """The error of another process."""


def _words(error: BaseException) -> str:
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}".removesuffix(": ")


def leader_of(rounds: Rounds, cache: Path) -> int:
    """Return the lowest process that shares this process's cache folder, which is made.

    Every process leaves a file in the folder and looks for the others' files: one host, or storage that several hosts
    share, has one leader. A process that sees the others late (a network file system may cache a listing) leads itself
    and prepares the same content, so that a wrong answer costs time and nothing else.
    """
    index = rounds.processes.index
    if rounds.processes.count == 1:
        cache.mkdir(parents=True, exist_ok=True)
        return index
    name = rounds.together(lambda: uuid.uuid4().hex)[0]
    marks = cache / f"{SHARING}{name}"

    def mark() -> str:
        marks.mkdir(parents=True, exist_ok=True)
        (marks / str(index)).touch()
        return ""

    rounds.together(mark)
    lowest = rounds.together(lambda: str(min(int(path.name) for path in marks.iterdir())))
    leader = index
    while int(lowest[leader]) < leader:
        leader = int(lowest[leader])
    shutil.rmtree(marks, ignore_errors=True)
    return leader
