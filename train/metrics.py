"""Writer of metrics.jsonl, row by row on a local disk and by periodic uploads to a bucket, with optional sinks."""

import contextlib
import json
import math
import mmap
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

from etils import epath

from data.paths import is_local, write_whole
from train.run_folder import RunFolder, RunFolderError

REWRITE_SECONDS = 30.0  # between uploads of metrics.jsonl to a bucket
REWRITE_BYTES_PER_SECOND = 1e6  # limit of the average upload rate: a long file is uploaded less often


def _plain(value: Any, key: str, nonfinite: dict[str, str]) -> Any:
    """Return `value` as JSON. A NaN or infinity becomes null, and `nonfinite` receives its key."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        nonfinite.setdefault(key, str(value))
        return None
    if isinstance(value, dict):
        return {str(k): _plain(v, key or str(k), nonfinite) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, key, nonfinite) for v in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return _plain(value.tolist(), key, nonfinite)
    raise TypeError(f"metrics row: {key} is a {type(value).__name__}; give a number, text, list or array")


class _AppendedFile:
    """A local file of lines. `write` appends a line and returns when the kernel has it.

    If a line does not fit on the disk, only its partial bytes are removed again.
    """

    def __init__(self, path: epath.Path):
        _heal(path)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, line: bytes, *, urgent: bool) -> None:
        start, written = os.fstat(self._descriptor).st_size, 0
        try:
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            if os.fstat(self._descriptor).st_size == start + written:  # no other writer has appended since
                os.ftruncate(self._descriptor, start)
            raise

    def flush(self) -> None:
        pass  # the kernel has every line

    def close(self) -> None:
        os.close(self._descriptor)


class _RewrittenObject:
    """A file of lines in a bucket. Objects cannot be appended to, so a thread regularly uploads all lines from memory.

    A crash loses the lines since the last upload, usually those of REWRITE_SECONDS. Urgent lines (events, final
    results) are uploaded at once, and all lines by `flush`. The next `write`, `flush` or `close` raises the error of a
    failed upload, and the next upload contains its lines.
    """

    def __init__(self, path: epath.Path, seconds: float):
        self._path, self._seconds = path, seconds
        self._content = bytearray(_whole_lines(path.read_bytes()) if path.exists() else b"")
        self._uploaded = len(self._content)
        self._error: OSError | None = None
        self._uploading, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._upload_at_times, name="metrics-upload", daemon=True)
        self._thread.start()

    def write(self, line: bytes, *, urgent: bool) -> None:
        self._content += line
        if urgent:
            self._upload()
        self._raise_error()

    def flush(self) -> None:
        self._upload()
        self._raise_error()

    def _upload_at_times(self) -> None:
        while not self._closed.wait(max(self._seconds, len(self._content) / REWRITE_BYTES_PER_SECOND)):
            self._upload()

    def _upload(self) -> None:
        with self._uploading:
            content = bytes(self._content)
            if len(content) == self._uploaded:
                return
            try:
                write_whole(self._path, content)
                self._uploaded, self._error = len(content), None
            except Exception as error:  # bucket clients raise their own exception classes
                self._error = OSError(f"{self._path} was not uploaded: {error}")

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._upload()
        self._raise_error()


def _whole_lines(content: bytes) -> bytes:
    """Return `content` without a last line that a crash cut off. If that line only lacks its newline, add it."""
    start = content.rfind(b"\n") + 1
    tail = content[start:]
    if not tail:
        return content
    try:
        json.loads(tail)
    except (ValueError, RecursionError):
        return content[:start]
    return content + b"\n"


def _heal(path: epath.Path) -> None:
    """Make a local file end with a whole line (`_whole_lines`), changing only its last line."""
    if not path.exists() or os.stat(path).st_size == 0:
        return
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            tail = content[start:]
        healed = _whole_lines(tail)
        if healed != tail:
            file.truncate(start)
            file.seek(0, os.SEEK_END)
            file.write(healed)


class MetricsWriter:
    """Appends rows to metrics.jsonl. Any thread may write; a lock keeps the file and the sinks in the same order.

    On a local disk, `write` returns when the kernel has the row. In a bucket, rows are uploaded every
    `rewrite_seconds` and by `flush`, and events and final rows at once. `sinks` may name "tensorboard" (events under
    RUN/tensorboard, needs tensorboardX) and "wandb"; the constructor raises RunFolderError if a sink is not installed.
    Only process 0 writes; on other processes, every method does nothing.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        sinks: Iterable[str] = (),
        process_index: int = 0,
        rewrite_seconds: float = REWRITE_SECONDS,
    ):
        self._lock = threading.Lock()
        self._file: _AppendedFile | _RewrittenObject | None = None
        self._sinks: list[tuple[Callable[[dict], None], Callable[[], None]]] = []
        if process_index != 0:
            return
        self._sinks = [_open_sink(name, run) for name in sinks]
        local = is_local(run.metrics)
        self._file = _AppendedFile(run.metrics) if local else _RewrittenObject(run.metrics, rewrite_seconds)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row with `time` added. NaN and infinities become null, and the row's `nonfinite` names them.

        Raises OSError if the disk is full, after removing the partial line.
        """
        nonfinite: dict[str, str] = {}
        row = _plain({"kind": row["kind"], "step": row.get("step"), "time": time.time(), **row}, "", nonfinite)
        if nonfinite:
            row["nonfinite"] = nonfinite
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with self._lock:
            if self._file is None:
                return
            self._file.write(line, urgent=row["kind"] in ("event", "final"))
            for send, _ in self._sinks:
                send(row)

    def flush(self) -> None:
        """Return when a crash of this process loses no row. Raises OSError if the rows could not be uploaded."""
        with self._lock:
            if self._file is not None:
                self._file.flush()

    def close(self) -> None:
        """Close the file and flush the sinks. Raises OSError if the last rows could not be uploaded."""
        with self._lock:
            (file, sinks), (self._file, self._sinks) = (self._file, self._sinks), (None, [])
        with contextlib.ExitStack() as stack:
            for _, close in sinks:
                stack.callback(close)
            if file is not None:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


# ---- sinks ----


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    prefix = f"{row['kind']}/{row['set']}" if "set" in row else row["kind"]
    skip = {"kind", "step", "time", "set"}
    return {f"{prefix}/{k}": v for k, v in row.items() if k not in skip and type(v) in (int, float)}


def read_wandb_id(run: RunFolder) -> str:
    """Return the run's unique id at Weights & Biases, which is drawn once and kept in the run's folder."""
    if not run.wandb_id.exists():
        write_whole(run.wandb_id, f"{secrets.token_hex(8)}\n")
    found = run.wandb_id.read_bytes().strip()
    if not re.fullmatch(rb"[A-Za-z0-9_-]{4,64}", found):
        raise RunFolderError(
            f"{run.wandb_id} = {found[:40]!r}: not a Weights & Biases id. Delete the file to report as a new run"
        )
    return found.decode()


def _open_sink(name: str, run: RunFolder) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """Return (send a row, close) of an optional sink."""
    if not is_local(run.path) and name == "tensorboard":
        raise RunFolderError(
            f"train.sinks = 'tensorboard': TensorBoard appends to its files, which {run.path} does not allow. "
            f"Use a local run folder, or wandb"
        )
    try:
        if name == "tensorboard":
            from tensorboardX import SummaryWriter

            writer = SummaryWriter(logdir=str(run.path / "tensorboard"))

            def send(row: dict[str, Any]) -> None:
                for key, value in _scalars(row).items():
                    writer.add_scalar(key, value, row["step"], walltime=row["time"])

            return send, writer.close
        if name == "wandb":
            import wandb

            job = wandb.init(
                project="meshwork",
                name=run.path.absolute().name if is_local(run.path) else run.path.name,
                id=read_wandb_id(run),
                dir=str(run.path) if is_local(run.path) else None,
                resume="allow",
            )
            return lambda row: job.log(_scalars(row), step=row["step"]), job.finish
    except ImportError as error:
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        raise RunFolderError(
            f"train.sinks = '{name}': {package} is not installed ({error}); pip install {package}, or remove the sink"
        ) from error
    raise RunFolderError(f"train.sinks = '{name}': unknown sink; use tensorboard or wandb")
