"""The loop around a job: start it, wait, and start it again after a failure, with a growing pause and a limit.

A dead host ends the whole job, because the others wait for it in their collectives; a restarted job resumes from its
last checkpoint. Errors that a restart cannot fix are not repeated.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

LONGEST_PAUSE = 300.0  # seconds between two attempts
HEALTHY_SECONDS = 3600.0  # an attempt that lasts as long has worked: its failure counts as the first one
MEANINGS = {
    1: "an error", 2: "arguments that cannot be parsed", 75: "a step hangs, or another process is lost",
    76: "a device computes wrong", 126: "the program cannot be run", 127: "the program cannot be found",
    130: "stopped by Ctrl-C", 137: "killed (SIGKILL), often for lack of memory", 143: "stopped by SIGTERM",
}  # fmt: skip
NEVER_AGAIN = (2, 76, 126, 127)  # exit codes that a restart on the same hosts cannot change


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: the exit code of the job, and whether another attempt may help."""

    code: int
    again: bool = False
    reason: str = ""


class StopRequests:
    """Counts SIGINT and SIGTERM instead of ending this process. A context manager for the main thread."""

    def __init__(self) -> None:
        self.count = 0
        self.number = signal.SIGTERM  # the first that arrived
        self._arrived = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.count:
            self.number = signal.Signals(number)
        self.count += 1
        self._arrived.set()

    def wait(self, seconds: float) -> bool:
        """Sleep, but not longer than until the first signal. Return whether one has arrived."""
        return self._arrived.wait(seconds)

    @property
    def code(self) -> int:
        """The exit code of a job that a signal stopped."""
        return 128 + self.number


def say(text: str) -> None:
    """Print a line of the launcher, on stderr: stdout is the job's."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def describe(code: int) -> str:
    """Return an exit code with its meaning."""
    if code > 128 and code not in MEANINGS:
        try:
            return f"exit code {code} ({signal.Signals(code - 128).name})"
        except ValueError:
            pass
    return f"exit code {code}" + (f" ({MEANINGS[code]})" if code in MEANINGS else "")


def keep_running(
    attempt: Callable[[int], Outcome],
    stop: StopRequests,
    restarts: int,
    backoff: float,
    log: Callable[[str], None] = say,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Call `attempt(number of restarts so far)` until it succeeds, and return the exit code of the job.

    There are at most `restarts` restarts in a row. The pause before the n-th of them is `backoff` * 2**(n - 1) seconds,
    at most LONGEST_PAUSE. An attempt that lasts HEALTHY_SECONDS starts the count again.
    """
    total = failures = 0
    while True:
        began = clock()
        outcome = attempt(total)
        if outcome.code == 0 or stop.count:
            return outcome.code
        if clock() - began >= HEALTHY_SECONDS:
            failures = 0
        if not outcome.again:
            log(f"{outcome.reason}; a restart would not help")
            return outcome.code
        if failures >= restarts:
            log(f"{outcome.reason}; no restart is left (--restarts {restarts}); the same command continues")
            return outcome.code
        failures, total = failures + 1, total + 1
        pause = min(backoff * 2 ** (failures - 1), LONGEST_PAUSE)
        log(f"{outcome.reason}; restart {failures} of {restarts} in {pause:g} s")
        if stop.wait(pause):
            return stop.code
