"""Ways to end a run: stop requests that all processes obey at the same step, a watchdog for hangs, and exceptions.

Exit codes: 128 + signal at the second request (130 for Ctrl-C, 143 for SIGTERM), `EXIT_HUNG` from the watchdog, and 1
after an exception under `exit_hard_on_exception`.
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

from train.peer_watch import leave_lost, let_peers_read, report_failure, report_hang

EXIT_HUNG = 75  # sysexits.h EX_TEMPFAIL: a launcher may restart the run
SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.5  # between reads of the key-value store

# Numbers the `StopSignal`s of a process. All processes agree because they create them in the same order.
_generation = itertools.count()


def _exit_now(code: int, message: str) -> None:
    os.write(2, f"{message}\n".encode())  # not print: a handler may have interrupted one
    os._exit(code)


class StopSignal:
    """Turns the first SIGINT or SIGTERM into a stop request; the second ends the process at once.

    A context manager for the main thread, the only one that handles signals. It restores the previous handlers on exit.
    `requested` is the flag of this process; a loop that runs in several processes calls `agreed(step)`. `number` is the
    signal that arrived, or None; `last_number` is that of the newest object, for the exit code.
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
            # None is a handler that was not set from Python (that of jax.distributed) and that Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.requested:
            _exit_now(128 + number, f"{name} again: exiting at once, without saving")
        self.requested = True
        self.number = StopSignal.last_number = number
        os.write(2, f"{name}: will stop after this step, save and exit; send it again to exit at once\n".encode())

    def agreed(self, step: int) -> bool:
        """Return whether to stop after `step`, with the same answer for the same question on every process.

        Every process asks once per step, in the same order; after a rewind, steps repeat. With one process, the answer
        is `requested`. With several, a call costs a lock, and a request takes effect within about a second: at the step
        after the latest one for which any process has asked by then.
        """
        return self.requested if self._agreement is None else self._agreement.reached(step)


class _Agreement:
    """Agreement of several processes on the step at which they stop, through jax.distributed's key-value store.

    A thread in each process watches for a request from this process or a peer. When it finds one, it blocks the main
    thread at its next call of `reached`, publishes the last step that was answered with "continue", and waits until the
    threads of all peers have published theirs. No process has passed the step after the highest of these. Only the main
    threads may wait for each other, in the collectives of a step, and these threads never do, so the wait always ends.
    """

    def __init__(self, stop: StopSignal):
        self._stop = stop
        self._client: Any = distributed.global_state.client
        self._prefix = f"meshwork/stop/{next(_generation)}"
        self._lock = threading.Lock()
        self._asked = -1  # number of the last question: its step, or one more than the last one's if that is higher
        self._answered = -1  # the last one that was answered with "continue"
        self._published = False
        self._stop_step: int | None = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop-agreement", daemon=True)
        self._thread.start()

    def reached(self, step: int) -> bool:
        with self._lock:
            self._asked = max(step, self._asked + 1)
            if self._stop_step is None:
                self._answered = self._asked
                return False
            return self._asked >= self._stop_step

    def leave(self) -> None:
        """End the thread, and publish the last step of this process for peers that have yet to agree."""
        self._left.set()
        self._thread.join()
        self._publish()

    def _publish(self) -> None:
        if not self._published:
            self._client.key_value_set(f"{self._prefix}/at/{jax.process_index()}", str(self._answered))
            self._published = True

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
            self._publish()
            while len(steps := self._values("at")) < jax.process_count():
                time.sleep(POLL_SECONDS / 20)
            self._stop_step = max(map(int, steps)) + 1


class Watchdog:
    """Ends a process whose loop hangs: after `seconds` without `beat()`, it dumps all stacks and exits (`EXIT_HUNG`).

    If several processes run, the last line names the one for which the others wait (train/peer_watch.py).

    A context manager. The clock starts at the first `beat()`, so that compilation does not count. Evaluation and saving
    must call `beat` too. seconds = 0 disables it.
    """

    def __init__(self, seconds: float):
        if seconds < 0:
            raise ValueError(f"watchdog seconds = {seconds}: set the longest time a step may take, or 0 to disable it")
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
        """Report that the loop is alive."""
        self._beaten = time.monotonic()

    def rest(self) -> None:
        """Stop the clock until the next beat, for work of unpredictable length such as a blocking save."""
        self._beaten = None

    def _watch(self) -> None:
        while not self._left.wait(self._seconds / 10):
            if self._beaten is not None and time.monotonic() - self._beaten > self._seconds:
                reason = f"no step for {self._seconds:g} s"
                sentence = report_hang(reason)
                os.write(2, f"{reason}; the stacks of all threads:\n".encode())
                faulthandler.dump_traceback(2, all_threads=True)
                let_peers_read()
                _exit_now(EXIT_HUNG, sentence or f"exiting with code {EXIT_HUNG}")


def exit_hard_on_exception() -> None:
    """Make an uncaught exception print, flush and exit with code 1 (130 for Ctrl-C) without waiting for peers.

    This is for processes under jax.distributed, where an orderly exit waits at a barrier for peers that wait for this
    process. A failed collective is reported in one sentence as the loss of a peer (train/peer_watch.py).
    """

    def leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if (sentence := report_failure(error)) is not None:
            logging.shutdown()
            leave_lost(sentence)
        traceback.print_exception(kind, error, trace)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(128 + signal.SIGINT if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = leave
