"""Detection of lost peer processes, which ends this process with a one-sentence error.

Each process increments a counter in the key-value store of jax.distributed and watches the counters of the others. JAX
also detects a lost process, but then it aborts in C++ with a stack trace, and a collective raises whatever Gloo, NCCL
or the TPU runtime reports. This module turns both into the same sentence.
"""

import atexit
import ctypes
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed  # the coordination service has no public client

EXIT_PEER_LOST = 75  # sysexits.h EX_TEMPFAIL, as after a hang: a launcher may restart the run
BEAT_SECONDS = 1.0  # between beats
LOST_SECONDS = 30.0  # without a beat, after which a process counts as lost
HEARTBEAT_SECONDS = 60  # after which JAX aborts without naming the process; longer than LOST_SECONDS
JOIN_SECONDS = 120  # for all processes to start
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


def describe(lost: list[int], count: int, reason: str) -> str:
    """Return the sentence with which the run ends. `lost` is empty if the lost process is unknown."""
    if lost:
        names = ", ".join(map(str, lost))
        who = f"process {names}" if len(lost) == 1 else f"processes {names}"
    else:
        who = "a process (which one is unknown)"
    return f"error: {who} of {count} was lost: {reason}. {REMEDY}"


class PeerWatch:
    """A thread that publishes this process's beats, and ends this process when the beats of another one stop.

    Processes that left in order are not reported. `client` is that of jax.distributed; `leave` ends the process.
    """

    def __init__(
        self,
        client: Any,
        index: int,
        count: int,
        leave: Callable[[str], None],
        lost_seconds: float = LOST_SECONDS,
        beat_seconds: float = BEAT_SECONDS,
    ):
        self._client, self.index, self.count, self._leave = client, index, count, leave
        self._lost_seconds, self._beat_seconds = lost_seconds, beat_seconds
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

    def _set(self, folder: str, value: str) -> None:
        try:
            self._client.key_value_set(f"meshwork/peers/{folder}/{self.index}", value, allow_overwrite=True)
        except jax.errors.JaxRuntimeError:
            pass  # the coordinator is gone, so no process can read the value

    def _values(self, folder: str) -> dict[int, str]:
        rows = self._client.key_value_dir_get(f"meshwork/peers/{folder}/")
        return {int(key.rpartition("/")[2]): value for key, value in rows}

    def _run(self) -> None:
        pause = self._beat_seconds * max(1.0, self.count / 64)  # one coordinator answers all processes
        for beat in itertools.count():
            if self._stopped.wait(pause if beat else 0.0):
                return
            try:
                self._client.key_value_set(f"meshwork/peers/beat/{self.index}", str(beat), allow_overwrite=True)
                beats, left, failed = self._values("beat"), self._values("left"), self._values("failed")
            except jax.errors.JaxRuntimeError:
                if not self._stopped.is_set():
                    self._leave(describe([0], self.count, "the coordinator that it runs does not answer"))
                return
            self._look(beats, left, failed)

    def _look(self, beats: dict[int, str], left: dict[int, str], failed: dict[int, str]) -> None:
        now = time.monotonic()
        for index in left:
            self._beats.pop(index, None)
        for index, (value, _) in self._beats.items():
            if (beat := beats.get(index, "")) != value:
                self._beats[index] = (beat, now)
        if failed:
            self._stopped.wait(3 * self._beat_seconds)  # an error in this process takes precedence
            if not self._stopped.is_set():
                index, reason = min(failed.items())
                self._leave(describe([index], self.count, f"it ended with {reason}"))
        elif lost := self.silent(self._lost_seconds):
            self._leave(describe(lost, self.count, f"no heartbeat for {self._lost_seconds:g} s"))


def join(count: int | None, index: int | None, seconds: int = JOIN_SECONDS, address: str | None = None) -> None:
    """Join a run of `count` processes as process `index`, and watch the others.

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
    watch_peers()


def watch_peers() -> None:
    """Start to watch the other processes. Every process calls this once, after jax.distributed.initialize."""
    global _watch
    state = distributed.global_state
    _watch = PeerWatch(state.client, state.process_id, state.num_processes, leave_lost)
    _watch.start()
    atexit.register(_watch.stop)  # before JAX's own barrier, which runs later
    end_aborts_with(_lost_at_abort)


def _lost_at_abort() -> tuple[str, int]:
    assert _watch is not None
    lost = _watch.silent(6 * BEAT_SECONDS) or ([0] if _watch.index else [])
    return describe(lost, _watch.count, "JAX aborted this process, see its messages above"), EXIT_PEER_LOST


def report_failure(error: BaseException) -> str | None:
    """Publish that `error` ends this process. If a lost peer caused it, return the sentence to end with."""
    if _watch is None:
        return None
    if not is_collective_failure(error):
        _watch.fail(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None
    deadline = time.monotonic() + 10 * BEAT_SECONDS
    while not (lost := _watch.silent(6 * BEAT_SECONDS)) and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)  # the watching thread may end the process first
    first_line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    return describe(lost, _watch.count, first_line.rstrip("."))


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
    if _watch.index == 0:
        time.sleep(5 * BEAT_SECONDS)


def leave_lost(sentence: str) -> None:
    """Print the sentence as the last output and end this process."""
    _leave(sentence, EXIT_PEER_LOST)


def _leave(sentence: str, code: int) -> None:
    sys.stdout.flush()
    os.write(2, f"{sentence}\n".encode())  # not print: another thread may be printing
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
