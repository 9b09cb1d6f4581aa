"""The lease on a run folder. One job at a time writes there, and a dead job does not lock out the next one.

The holder writes a record to `.lock`, and a thread renews it every HEARTBEAT_SECONDS. A job that finds the record of
another job acts as follows:

- If the holder is a process on the same machine, the kernel reports whether it is alive.
- If the holder is elsewhere, or the record cannot be read, the job watches the heartbeat. If it changes, the holder is
  alive and the job is refused. If it does not change for LEASE_SECONDS, the holder is dead and the job takes over.

The clocks of two machines are never compared. If a holder was stopped for so long that another job took over (a
suspended machine, a hung file system), it finds the other record at its next heartbeat and ends its process.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etils import epath

from data.paths import is_local
from train.bucket import BucketObject
from train.run_folder import RunFolder, RunFolderError

HEARTBEAT_SECONDS = 10.0
LEASE_SECONDS = 60.0  # without a heartbeat, after which a holder elsewhere counts as dead
LOST_EXIT = 75  # EX_TEMPFAIL
_RECORD_BYTES = 512  # fixed, so that a heartbeat overwrites its record in place even on a full disk


@dataclass(frozen=True)
class LeaseTiming:
    """The interval between heartbeats, and the silence after which a holder counts as dead, in seconds."""

    heartbeat: float = HEARTBEAT_SECONDS
    lease: float = LEASE_SECONDS


def _exit_process(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(LOST_EXIT)


@contextlib.contextmanager
def hold_lease(
    run: RunFolder,
    log: Callable[[str], None],
    *,
    timing: LeaseTiming | None = None,
    on_lost: Callable[[str], None] = _exit_process,
) -> Iterator[None]:
    """Hold the folder's lease for the block. Raises RunFolderError while another job holds it, and OSError.

    on_lost: called from the heartbeat thread with a message after another job has taken over; it must stop all writes.
    """
    timing = timing or LeaseTiming()
    me = _describe_process()
    file = _lock_of(run)
    _take(run, file, me, log, timing)
    file.renew(me, 0)  # an account may be allowed to create objects in a bucket, but not to replace them
    done = threading.Event()

    def beat() -> None:
        for count in range(1, sys.maxsize):
            if done.wait(timing.heartbeat):
                return
            # Whatever a disk or a bucket's client raises now, the next heartbeat may succeed. If this thread ended,
            # another job would take over the run while this one still writes.
            with contextlib.suppress(Exception):
                holder = file.renew(me, count)
                if holder is not None:
                    on_lost(
                        f"run folder {run.path} was taken over by {_name(holder)} while this process was stopped for "
                        f"more than {timing.lease:.0f} s; this process writes nothing more"
                    )
                    return

    thread = threading.Thread(target=beat, name="run-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(Exception):  # a lease that is not released expires
            file.release(me)


# ---- acquisition ----


def _take(
    run: RunFolder, file: "_LockFile | _LockObject", me: dict[str, Any], log: Callable[[str], None], timing: LeaseTiming
) -> None:
    found, watched_since = file.take(me, None), time.monotonic()
    if found is None:
        return
    expected, holder = found, _parse(found)
    where = f"run folder {run.path} is in use by {_name(holder)}"
    fix = f"wait for it, stop it, use another folder with --run, or delete {run.lock} if that job is gone"
    if holder is not None and _is_here(holder, me):
        if _alive(holder):
            raise RunFolderError(f"{where}; {fix}")
        dead = f"took over the lock of {_name(holder)}, which is dead on this host"
    elif holder is not None and "beat" not in holder:
        raise RunFolderError(f"{where}, which sends no heartbeat; {fix}")
    else:
        log(f"{where}; watching its heartbeat for up to {timing.lease:.0f} s")
        while time.monotonic() - watched_since < timing.lease:
            time.sleep(min(timing.heartbeat, timing.lease) / 4)
            if (now := file.read()) != expected:
                if not now:
                    break  # released
                raise RunFolderError(f"{where}, which is alive; {fix}")
        dead = f"took over the lock of {_name(holder)}, without a heartbeat for {timing.lease:.0f} s"
    if (taken := file.take(me, expected)) is not None:
        raise RunFolderError(f"run folder {run.path} was just taken over by {_name(_parse(taken))}; {fix}")
    log(dead)


def _parse(content: bytes) -> dict[str, Any] | None:
    """Return the record in a lock file, or None if the content is not a record."""
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    kinds: dict[str, tuple[type, ...]]
    kinds = {"pid": (int,), "start": (str, type(None)), "host": (str,), "since": (int, float)}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in kinds.items()):
        return None
    return record if 0 < record["pid"] < 2**31 and 0 <= record["since"] < 2**33 else None


def _name(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "a job whose lock cannot be read"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['pid']} on {holder['host']} since {since}"


def _describe_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "start": _process_start(pid),
        "host": socket.gethostname(),
        "machine": _machine(),
        "since": time.time(),
        "id": secrets.token_hex(8),
        "beat": 0,
    }


def _machine() -> str:
    """Return an identifier that differs between machines, or containers of one machine, with the same host name."""
    with contextlib.suppress(OSError):
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_here(holder: dict[str, Any], me: dict[str, Any]) -> bool:
    return holder["host"] == me["host"] and holder.get("machine", me["machine"]) == me["machine"]


def _process_start(pid: int) -> str | None:
    """Return the kernel's start time of a process, which differs when its pid is reused."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no such process, or a system without /proc
        return None
    return "zombie" if fields[0] == "Z" else fields[19]


def _alive(holder: dict[str, Any]) -> bool:
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is alive and belongs to another user
    return _process_start(holder["pid"]) in (holder["start"], None)


# ---- the file ----


class _LockFile:
    """The file `.lock` on a disk, where flock makes a read and a write atomic."""

    def __init__(self, path: epath.Path):
        self._path = path

    def read(self) -> bytes:
        """Return the record without its padding. It is empty if nobody holds the lease."""
        with self._locked() as descriptor:
            return os.pread(descriptor, 1 << 16, 0).strip()

    def take(self, me: dict[str, Any], expected: bytes | None) -> bytes | None:
        """Write `me` if nobody holds the lease or the record is `expected`. Otherwise return the record found."""
        with self._locked() as descriptor:
            found = os.pread(descriptor, 1 << 16, 0).strip()
            if found and found != expected:
                return found
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, _padded(me), 0)
        return None

    def renew(self, me: dict[str, Any], beat: int) -> dict[str, Any] | None:
        """Write the next heartbeat. If another job has taken over, return its record instead."""
        with self._locked() as descriptor:
            other = _other(os.pread(descriptor, 1 << 16, 0), me)
            if other is None:
                os.pwrite(descriptor, _padded(me | {"beat": beat}), 0)
            return other

    def release(self, me: dict[str, Any]) -> None:
        with self._locked() as descriptor:
            if _identity(os.pread(descriptor, 1 << 16, 0)) == me["id"]:
                os.ftruncate(descriptor, 0)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)


class _LockObject:
    """The same in a bucket, where a write succeeds only if the object has the generation that was read before."""

    def __init__(self, path: epath.Path):
        self._object = BucketObject(path)

    def read(self) -> bytes:
        return self._object.read()[0].strip()

    def take(self, me: dict[str, Any], expected: bytes | None) -> bytes | None:
        content, generation = self._object.read()
        found = content.strip()
        if found and found != expected:
            return found
        if self._write(me, _padded(me), generation):
            return None
        return self.read() or self.take(me, expected)  # the job that was faster may have released it already

    def renew(self, me: dict[str, Any], beat: int) -> dict[str, Any] | None:
        content, generation = self._object.read()
        other = _other(content, me)
        if other is None and not self._write(me, _padded(me | {"beat": beat}), generation):
            return _other(self.read(), me)
        return other

    def release(self, me: dict[str, Any]) -> None:
        content, generation = self._object.read()
        if _identity(content) == me["id"]:
            self._object.write(b"", generation)

    def _write(self, me: dict[str, Any], content: bytes, generation: bytes) -> bool:
        # A write whose answer was lost is repeated, and then finds the object changed, by this job.
        return self._object.write(content, generation) is not None or _identity(self.read()) == me["id"]


def _lock_of(run: RunFolder) -> _LockFile | _LockObject:
    return _LockFile(run.lock) if is_local(run.lock) else _LockObject(run.lock)


def _padded(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode().ljust(_RECORD_BYTES - 1) + b"\n"


def _identity(content: bytes) -> str | None:
    record = _parse(content)
    return None if record is None else record.get("id")


def _other(content: bytes, me: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of another job, or None if the file holds our record, is empty (deleted) or is unreadable."""
    record = _parse(content)
    return record if record is not None and record.get("id") != me["id"] else None
