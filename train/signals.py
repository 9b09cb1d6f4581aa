"""Leaving a run: stop requests that all processes obey at the same step, hangs, and exceptions of one peer.

Exit codes: 128 + signal at the second request (130 for Ctrl-C, 143 for SIGTERM), `EXIT_HUNG` from the watchdog, 1 after
an exception under `exit_hard_on_exception`.
"""

import faulthandler
import itertools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Any, ClassVar, Self

import jax
from jax._src import distributed  # the coordination service has no public client

EXIT_HUNG = 75  # sysexits.h EX_TEMPFAIL: a launcher may start the run again
SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.5

# One number a `StopSignal` in each process, the same everywhere because every process makes them in the same order.
_generation = itertools.count()


def _exit_now(code: int, message: str) -> None:
    os.write(2, f"{message}\n".encode())  # not print: a handler may have interrupted one
    os._exit(code)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a request; the second ends the process at once.

    A context manager for the main thread (signals reach no other); the handlers before it return on leaving.
    `requested` is this process's own flag; a loop that runs under several processes asks `agreed(step)`.
    `number` is the signal that asked, and `last_number` that of the newest object, for an exit code: None where none
    arrived here.
    """

    last_number: ClassVar[int | None] = None

    def __init__(self) -> None:
        self.requested = False
        self.number: int | None = None
        self._previous: dict[int, Any] = {}
        self._agreement: _Agreement | None = None

    def __enter__(self) -> Self:
        StopSignal.last_number = None
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        if jax.process_count() > 1:
            self._agreement = _Agreement(self)
        return self

    def __exit__(self, *_: object) -> None:
        if self._agreement is not None:
            self._agreement.leave()
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python (jax.distributed's), which Python cannot set back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            _exit_now(128 + number, f"{name} again: leaving at once, without saving")
        self.requested = True
        self.number = StopSignal.last_number = number
        os.write(2, f"{name}: will stop after this step, save and exit; once more to leave at once\n".encode())

    def agreed(self, step: int) -> bool:
        """Whether to stop after `step`: the same answer for the same step on every process.

        Every process asks once for each step, in ascending order. With one process the answer is `requested`. With
        several it costs a lock; a request takes effect within about a second, at the step after the furthest
        one that any process had asked for by then.
        """
        return self.requested if self._agreement is None else self._agreement.reached(step)


class _Agreement:
    """The step at which several processes stop, found over jax.distributed's key-value store.

    A thread in each process watches for a request, its own or a peer's. On seeing one it holds the main thread at its
    next question, tells the last step that was answered with "go on", and waits for the peers' threads to tell theirs.
    The step after the highest is one that no process has passed. Only the main threads may wait for each other through
    collectives of the steps, never these threads, so that the wait always ends.
    """

    def __init__(self, stop: StopSignal):
        self._stop = stop
        self._client: Any = distributed.global_state.client
        self._prefix = f"meshwork/stop/{next(_generation)}"
        self._lock = threading.Lock()
        self._answered = -1
        self._told = False
        self._stop_step: int | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-agreement", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> bool:
        with self._lock:
            if self._stop_step is None:
                self._answered = step
                return False
            return step >= self._stop_step

    def leave(self) -> None:
        """Ends the thread; peers that still ask learn this process's last step."""
        self._left.set()
        self._thread.join()
        self._tell()

    def _tell(self) -> None:
        if not self._told:
            self._client.key_value_set(f"{self._prefix}/at/{jax.process_index()}", str(self._answered))
            self._told = True

    def _values(self, folder: str) -> list[str]:
        return [value for _, value in self._client.key_value_dir_get(f"{self._prefix}/{folder}/")]

    def _watch(self) -> None:
        announced = False
        while not self._left.wait(POLL_SECONDS):
            if self._stop.requested and not announced:
                self._client.key_value_set(f"{self._prefix}/request/{jax.process_index()}", "")
                announced = True
            if announced or self._values("request"):
                self._settle()
                return

    def _settle(self) -> None:
        with self._lock:
            self._tell()
            while len(steps := self._values("at")) < jax.process_count():
                time.sleep(POLL_SECONDS / 20)
            self._stop_step = max(map(int, steps)) + 1


class Watchdog:
    """Ends a process whose loop stands still: no `beat()` for `seconds` dumps every thread's stack and exits hard.

    A context manager. The clock starts at the first `beat()`, so that compilation does not count; evaluation and
    saving must beat too. seconds = 0 watches nothing. It exits with `EXIT_HUNG`.
    """

    def __init__(self, seconds: float):
        if seconds < 0:
            raise ValueError(f"watchdog seconds = {seconds}: set the longest time a step may take, or 0 for no watch")
        self._seconds = seconds
        self._beaten: float | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        if self._seconds:
            self._thread.join()

    def beat(self) -> None:
        """Says that the loop goes on."""
        self._beaten = time.monotonic()

    def rest(self) -> None:
        """Stops the clock until the next beat: for work whose length is its own, such as a save that is waited for."""
        self._beaten = None

    def _watch(self) -> None:
        while not self._left.wait(self._seconds / 10):
            if self._beaten is not None and time.monotonic() - self._beaten > self._seconds:
                os.write(2, f"no step for {self._seconds:g} s; the stacks of all threads:\n".encode())
                faulthandler.dump_traceback(2, all_threads=True)
                _exit_now(EXIT_HUNG, f"leaving with exit code {EXIT_HUNG}")


def exit_hard_on_exception() -> None:
    """From now on an uncaught exception prints, flushes and exits 1 without waiting for peers (130 for Ctrl-C).

    For processes under jax.distributed: an orderly exit waits at a barrier for peers that wait for this process.
    """

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        traceback.print_exception(kind, error, trace)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = leave
