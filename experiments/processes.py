"""The processes of a run, for packages that do not import JAX (data.processes.Processes)."""

from __future__ import annotations

import itertools
import json
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import distributed  # the coordination service has no public client

from data.config import DataError
from data.processes import ONE_PROCESS, Processes
from train.config_io import ConfigError
from train.device_check import DeviceError, Reading, from_text, measure, slow, to_text, wrong
from train.peer_watch import wait_for_peers
from train.records import code_version

CLOCK_SECONDS = 5.0  # by which clocks may differ without a warning

_numbers = itertools.count()


class JaxProcesses:
    """The processes of jax.distributed, which communicate through its key-value store.

    Unlike a collective, `receive` may wait without limit. Ctrl-C and signals take effect every `poll_seconds`, because
    a wait inside the client cannot be interrupted.
    """

    def __init__(self, poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self.index, self.count = jax.process_index(), jax.process_count()
        self._client: Any = distributed.global_state.client
        self._prefix = f"meshwork/processes/{next(_numbers)}"  # every process creates its objects in the same order

    def send(self, key: str, text: str) -> None:
        self._client.key_value_set(f"{self._prefix}/{key}", text, allow_overwrite=True)

    def receive(self, key: str, timeout: float | None = None) -> str:
        started = time.monotonic()
        while True:
            try:
                return self._client.blocking_key_value_get(f"{self._prefix}/{key}", int(1000 * self._poll_seconds))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise DataError(
                        f"a process of the run was lost while this one waited for it ({error}). Read its output, then "
                        "start every process again"
                    ) from error
            if timeout is not None and time.monotonic() - started > timeout:
                raise TimeoutError(f"no value for {key} within {timeout:g} s")


def agree(digest: str, wrong: str, fix: str) -> None:
    """Raise ConfigError on all processes unless all of them have the same `digest`.

    `wrong` completes the message "the processes ...", and `fix` is the advice. The digests are compared through the
    key-value store, because a collective could hang if the processes differ.
    """
    digests = [text[:8] for text in _exchange(digest)]
    if len(set(digests)) > 1:
        raise ConfigError(f"the processes {wrong} (hashes {', '.join(digests)} by process); {fix}")


def agree_on_code() -> None:
    """Raise ConfigError on all processes, naming each host, unless all of them run the same version of the code."""
    if jax.process_count() == 1:
        return
    rows = [json.loads(text) for text in _exchange(json.dumps([socket.gethostname(), code_version()]))]
    if len({version for _, version in rows}) > 1:
        each = "; ".join(f"process {i} on {host}: {version}" for i, (host, version) in enumerate(rows))
        raise ConfigError(
            f"the processes run different versions of the code ({each}); check out the same commit on every host, and "
            "install the same packages"
        )


def agree_on_devices(log: Callable[[str], None], measure: Callable[[], list[Reading]] = measure) -> None:
    """Raise DeviceError on all processes if a device computes differently from the others; warn about slow ones.

    `measure` returns the readings of this process.
    """
    if jax.process_count() == 1:
        return
    readings = [reading for text in _exchange(to_text(measure())) for reading in from_text(text)]
    if fault := wrong(readings):
        raise DeviceError(fault)
    if late := slow(readings):
        log(f"warning: {late}")


def compare_clocks(log: Callable[[str], None], clock: Callable[[], float] = time.time) -> None:
    """Warn about hosts whose clocks differ by more than CLOCK_SECONDS from that of process 0.

    Each process reads its clock when it leaves a barrier, which all leave within milliseconds, three times.
    """
    if jax.process_count() == 1:
        return
    reads = []
    for _ in range(3):
        wait_for_peers("clocks")
        reads.append(clock())
    rows = [json.loads(text) for text in _exchange(json.dumps([socket.gethostname(), reads]))]
    if late := clock_warning(rows):
        log(f"warning: {late}")


def clock_warning(rows: Sequence[tuple[str, Sequence[float]]]) -> str | None:
    """Return a sentence that names the processes whose clocks differ from that of process 0, or None.

    rows: the host of each process, and its readings of its clock at common moments.
    """
    found = []
    for index, (host, reads) in enumerate(rows):
        offset = statistics.median(read - first for read, first in zip(reads, rows[0][1], strict=True))
        if abs(offset) > CLOCK_SECONDS:
            side = "ahead of" if offset > 0 else "behind"
            found.append(f"the clock of process {index} (host {host}) is {abs(offset):.1f} s {side} that of process 0")
    if not found:
        return None
    return (
        f"{'; '.join(found)}. The times in metrics.jsonl and environment.json come from process 0, whichever host it "
        "runs on, and buckets refuse hosts whose clocks are minutes off; start a time service (chrony) there"
    )


def barrier() -> None:
    """Wait until every process has arrived."""
    _exchange("")


def _exchange(text: str) -> list[str]:
    """Return the texts of all processes, in the order of their indices."""
    processes = all_processes()
    if processes.count == 1:
        return [text]
    processes.send(str(processes.index), text)
    return [processes.receive(str(index)) for index in range(processes.count)]


def all_processes(poll_seconds: float = 1.0) -> Processes:
    """Return the processes of the run. Every process must call it in the same order."""
    return JaxProcesses(poll_seconds) if jax.process_count() > 1 else ONE_PROCESS


def ask_first(make: Callable[[], Any]) -> Any:
    """Return what `make` returns on process 0, as JSON values, on every process. Other processes do not call it."""
    processes = all_processes()
    if processes.count == 1:
        return make()
    if processes.index == 0:
        value = make()
        processes.send("first", json.dumps(value))
        return value
    return json.loads(processes.receive("first"))
