"""Detection of lost peer processes, which ends this process with a one-sentence error.

Each process publishes a beat in the key-value store of jax.distributed, a counter with a report of its activity, and
watches the beats of the others. JAX also detects a lost process, but then it aborts in C++ with a stack trace, and a
collective raises whatever Gloo, NCCL or the TPU runtime reports. This module turns both into the same sentence. The
reports name the process for which the others wait, if a step hangs or is slow (train/activity.py).
"""

import atexit
import contextlib
import ctypes
import itertools
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed  # the coordination service has no public client

from train.activity import Report, activity, behind, name_processes, straggler

EXIT_PEER_LOST = 75  # sysexits.h EX_TEMPFAIL, as after a hang: a launcher may restart the run
BEAT_SECONDS = 1.0  # between beats
LOST_SECONDS = 30.0  # without a beat, after which a process counts as lost
HEARTBEAT_SECONDS = 60  # after which JAX aborts without naming the process; longer than LOST_SECONDS
JOIN_SECONDS = 120  # for all processes to start
WINDOW_SECONDS = 30.0  # over which the activities of the processes are compared
WARN_SECONDS = 300.0  # between two warnings about a straggler
# Parts of the messages of a collective, or of the coordination service that it needs, when another process is gone.
LOST_TEXTS = (
    "gloo", "coordination service", "coordinationservice", "connection closed by peer", "connection reset by peer",
    "socket closed", "nccl", "task is unhealthy", "failed to connect to remote host", "heartbeat",
)  # fmt: skip
REMEDY = "The last checkpoint is good; start the same command again on every host to resume."

_watch: "PeerWatch | None" = None
_meetings = itertools.count()


def is_collective_failure(error: BaseException) -> bool:
    """Return whether JAX raised `error` because a process, or the network between processes, failed."""
    text = str(error).lower()
    return isinstance(error, jax.errors.JaxRuntimeError) and any(part in text for part in LOST_TEXTS)


def describe(lost: list[int], count: int, reason: str, hosts: Mapping[int, str] | None = None) -> str:
    """Return the sentence with which the run ends. `lost` is empty if the lost process is unknown."""
    who = name_processes(lost, hosts or {}) if lost else "a process (which one is unknown)"
    return f"error: {who} of {count} was lost: {reason}. {REMEDY}"


class PeerWatch:
    """A thread that publishes this process's beats, and ends this process when the beats of another one stop.

    Processes that left in order are not reported. `client` is that of jax.distributed; `leave` ends the process. In
    process 0, `warn` receives a sentence about a process that delays the others, and `stragglers` queues it.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        leave: Callable[[str], None],
        lost_seconds: float = LOST_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
        window_seconds: float = WINDOW_SECONDS,
        warn: Callable[[str], None] = lambda sentence: None,
    ):
        self._client, self.index, self.count, self._leave = client, index, count, leave
        self._lost_seconds, self._beat_seconds, self._window_seconds = lost_seconds, beat_seconds, window_seconds
        self._warn, self._host = warn, socket.gethostname()
        self._pause = beat_seconds * max(1.0, count / 64)  # one coordinator answers all processes
        self.stragglers: queue.SimpleQueue[str] = queue.SimpleQueue()  # sentences, for the run's record
        self.reports: dict[int, Report] = {}  # the newest of each process
        self._earlier: tuple[float, dict[int, Report]] = time.monotonic(), {}  # when the window began
        self._warned = -WARN_SECONDS
        # The last beat of each other process, and the time it was first read. A process may be lost before its first.
        self._beats = {other: ("", time.monotonic()) for other in range(count) if other != index}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Leave in order, so that the others do not report this process as lost."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._thread.join()
            self._set("left", "")

    def fail(self, reason: str) -> None:
        """Publish the reason why this process ends, so that the others need not wait for its beats."""
        self._stopped.set()
        self._set("failed", reason)

    def silent(self, seconds: float) -> list[int]:
        """Return the processes whose beat has not changed for `seconds`."""
        now = time.monotonic()
        return sorted(index for index, (_, at) in self._beats.items() if now - at > seconds)

    def lost(self, indices: list[int], reason: str) -> str:
        """Return the sentence with which this process ends because of others."""
        return describe(indices, self.count, reason, {index: report.host for index, report in self.reports.items()})

    def behind(self) -> str:
        """Return a sentence that names the processes for which the others wait, as of the last beats."""
        return behind(self.reports, self.quiet()) if self.reports else ""

    def quiet(self) -> list[int]:
        """Return the processes that have missed six beats."""
        return self.silent(6 * self._pause)

    def _set(self, folder: str, value: str) -> None:
        try:
            self._client.key_value_set(f"meshwork/peers/{folder}/{self.index}", value, allow_overwrite=True)
        except jax.errors.JaxRuntimeError:
            pass  # the coordinator is gone, so no process can read the value

    def _values(self, folder: str) -> dict[int, str]:
        rows = self._client.key_value_dir_get(f"meshwork/peers/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in rows}

    def _run(self) -> None:
        for beat in itertools.count():
            if self._stopped.wait(self._pause if beat else 0.0):
                return
            try:
                text = f"{beat} {activity.report(self._host).text()}"
                self._client.key_value_set(f"meshwork/peers/beat/{self.index}", text, allow_overwrite=True)
                beats, left, failed = self._values("beat"), self._values("left"), self._values("failed")
            except jax.errors.JaxRuntimeError:
                if not self._stopped.is_set():
                    self._leave(self.lost([0], "the coordinator that it runs does not answer"))
                return
            self._look(beats, left, failed)

    def _look(self, beats: dict[int, str], left: dict[int, str], failed: dict[int, str]) -> None:
        now = time.monotonic()
        for index in left:
            self._beats.pop(index, None)
        self.reports = _parsed({index: value for index, value in beats.items() if index not in left})
        for index, (value, _) in self._beats.items():
            if (beat := beats.get(index, "")) != value:
                self._beats[index] = (beat, now)
        if failed:
            self._stopped.wait(3 * self._beat_seconds)  # an error in this process takes precedence
            if not self._stopped.is_set():
                index, reason = min(failed.items())
                self._leave(self.lost([index], f"it ended with {reason}"))
        elif lost := self.silent(self._lost_seconds):
            self._leave(self.lost(lost, f"no heartbeat for {self._lost_seconds:g} s"))
        elif self.index == 0:
            self._compare(now)

    def _compare(self, now: float) -> None:
        """Warn about a process that has delayed the others since the window began, if none was named lately."""
        began, earlier = self._earlier
        if now - began < self._window_seconds:
            return
        self._earlier = now, self.reports
        sentence = straggler(earlier, self.reports, hidden=jax.default_backend() != "cpu")
        if sentence is not None and now - self._warned >= WARN_SECONDS:
            self._warned = now
            self.stragglers.put(sentence)
            self._warn(sentence)


def _parsed(beats: Mapping[int, str]) -> dict[int, Report]:
    found: dict[int, Report] = {}
    for index, value in beats.items():
        with contextlib.suppress(ValueError, TypeError):  # another version of the code, which is refused at the start
            found[index] = Report.parse(value.partition(" ")[2])
    return found


def join(
    count: int | None,
    index: int | None,
    seconds: int = JOIN_SECONDS,
    address: str | None = None,
    window_seconds: float = WINDOW_SECONDS,
) -> None:
    """Join a run of `count` processes as process `index`, and watch the others. A straggler shows after two windows.

    JAX detects arguments that are None on TPU pods, under SLURM and on similar clusters. If the processes do not find
    each other within `seconds`, JAX aborts, which ends this process with one sentence and exit code 1. On CPUs, the
    compilation cache is off: JAX would write it only on process 0, and Gloo gives up after 30 s while the others
    compile.
    """
    shown = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "unset")
    found = [f"{name} = {'unset' if value is None else value}" for name, value in (
        ("JAX_COORDINATOR_ADDRESS", shown), ("JAX_NUM_PROCESSES", count), ("JAX_PROCESS_ID", index))]  # fmt: skip
    end_aborts_with(lambda: (
        f"error: --distributed: the processes did not all join within {seconds} s, or their settings disagree "
        f"({', '.join(found)}). Start exactly JAX_NUM_PROCESSES processes with the IDs 0, 1, ... at the same time, and "
        "check that every host can reach the coordinator's host and port", 1,
    ))  # fmt: skip
    jax.distributed.initialize(
        address,
        num_processes=count,
        process_id=index,
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
    if jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
    watch_peers(window_seconds)


def watch_peers(window_seconds: float = WINDOW_SECONDS) -> None:
    """Start to watch the other processes. Every process calls this once, after jax.distributed.initialize."""
    global _watch
    state = distributed.global_state
    _watch = PeerWatch(
        state.client, state.process_id, state.num_processes, leave_lost, window_seconds=window_seconds,
        warn=lambda sentence: _write(f"warning: {sentence}"),
    )  # fmt: skip
    _watch.start()
    atexit.register(_watch.stop)  # before JAX's own barrier, which runs later
    end_aborts_with(_lost_at_abort)


def _lost_at_abort() -> tuple[str, int]:
    assert _watch is not None
    lost = _watch.quiet() or ([0] if _watch.index else [])
    return _watch.lost(lost, "JAX aborted this process, see its messages above"), EXIT_PEER_LOST


def report_failure(error: BaseException) -> str | None:
    """Publish that `error` ends this process. If a lost peer caused it, return the sentence to end with."""
    if _watch is None:
        return None
    if not is_collective_failure(error):
        _watch.fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None
    deadline = time.monotonic() + 10 * BEAT_SECONDS
    while not (lost := _watch.quiet()) and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)  # the watching thread may end the process first
    first_line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return _watch.lost(lost, first_line.rstrip("."))


def stragglers() -> list[str]:
    """Return the sentences about processes that delay the others, which were printed since the last call."""
    found: list[str] = []
    while _watch is not None and not _watch.stragglers.empty():
        found.append(_watch.stragglers.get())
    return found


def report_hang(reason: str) -> str | None:
    """Publish that this process ends because its loop hangs, and return the sentence to end with.

    It names the process for which the others wait. Return None if this process is alone.
    """
    if _watch is None:
        return None
    found = "; ".join(filter(None, [reason, _watch.behind()]))
    _watch.fail(found)
    return f"error: {found}. {REMEDY}"


def wait_for_peers(reason: str, seconds: int = 3600) -> None:
    """Wait until every process arrives. Some compile for longer than others, and Gloo gives up on them after 30 s."""
    if jax.process_count() > 1:
        name = f"meshwork/meet/{reason}/{next(_meetings)}"  # every process passes the barriers in the same order
        client: Any = distributed.global_state.client
        client.wait_at_barrier(name, 1000 * seconds)


def say_farewell(error: Exception) -> None:
    """Publish that `error` ends this process. If it is the coordinator, give the peers time to read that."""
    if _watch is None:
        return
    _watch.fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    let_peers_read()


def let_peers_read() -> None:
    """If this process is the coordinator, give the peers time to read why it ends."""
    if _watch is not None and _watch.index == 0:
        time.sleep(5 * BEAT_SECONDS)


def leave_lost(sentence: str) -> None:
    """Print the sentence as the last output and end this process."""
    _leave(sentence, EXIT_PEER_LOST)


def _write(sentence: str) -> None:
    os.write(2, f"{sentence}\n".encode())  # not print: another thread may be printing


def _leave(sentence: str, code: int) -> None:
    sys.stdout.flush()
    _write(sentence)
    os._exit(code)


_abort_handler = None  # a C callback must outlive its use


def end_aborts_with(last_words: Callable[[], tuple[str, int]]) -> None:
    """Print a sentence and exit with a code instead of letting JAX abort.

    JAX's client calls abort() if it cannot join the other processes, or if the coordinator is gone. Python signal
    handlers run only in the main thread, which may be waiting in C++ for the lost process. The client's callback for
    missed heartbeats is unusable, because jaxlib 0.10 fails to convert its argument (std::bad_cast).
    """
    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: _leave(*last_words()))
    ctypes.CDLL(None).signal(signal.SIGABRT, _abort_handler)
