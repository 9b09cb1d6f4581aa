"""What a run leaves on disk: its folder, its lock, its environment and its metrics.

    runs/NAME/config.json       the resolved config
              overrides.json    what was set on the command line, as typed ("model.num_layers=4")
              environment.json  versions, devices, commit, command line of the latest start, earlier ones below it
              metrics.jsonl     one JSON row a line, only ever appended to: the source of truth of the report
              samples.jsonl     completions of held-out files
              checkpoints/  tokenizer/  plots/  report.html
              .lock             pid and host of the job that writes here; empty when none does

A row has `kind` ("train", "eval", "event", "final"), `step` and `time` (unix seconds); an eval row also has `set`.
"""

import collections
import contextlib
import fcntl
import hashlib
import json
import math
import mmap
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

from train import config_io

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunFolderError(ValueError):
    """A run folder or its records cannot be used; the message is one paragraph for the user."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run. Making one touches no disk: `open_run` creates and locks, readers just look."""

    path: Path

    config = property(lambda self: self.path / "config.json")
    overrides = property(lambda self: self.path / "overrides.json")
    environment = property(lambda self: self.path / "environment.json")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    samples = property(lambda self: self.path / "samples.jsonl")
    report = property(lambda self: self.path / "report.html")
    checkpoints = property(lambda self: self.path / "checkpoints")
    tokenizer = property(lambda self: self.path / "tokenizer")
    plots = property(lambda self: self.path / "plots")
    routing = property(lambda self: self.path / "routing")  # choices of the experts, by step
    lock = property(lambda self: self.path / ".lock")

    @property
    def finished(self) -> bool:
        """Whether the run has its `final` row and was not resumed after it."""
        return self.metrics.exists() and any(row["kind"] == "final" for row in read_metrics(self.metrics))


# ---- opening a folder for writing ----


@contextlib.contextmanager
def open_run(
    path: str | os.PathLike,
    config: Any,
    *,
    overrides: Sequence[str] = (),
    may_differ: Callable[[str], bool] = lambda name: False,
    override: bool = False,
    notice: Callable[[str], None] = lambda text: None,
) -> Iterator[RunFolder]:
    """Create `path`, or open it again, as the one job that writes there; call it on process 0 only.

    `config` is saved as config.json, the `overrides` that led to it as overrides.json. Where the folder already holds
    another config, only fields that `may_differ` (a predicate on dotted names) admits may have changed, unless
    `override` accepts the new one. What was taken over or accepted is told to `notice`. Raises RunFolderError when the
    folder cannot be written, is in use by a live process, or belongs to another config.
    """
    run = RunFolder(Path(path))
    with contextlib.ExitStack() as stack:
        try:
            run.path.mkdir(parents=True, exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
            stack.enter_context(_locked(run, notice))
            _accept_config(run, config, may_differ, override, notice)
            _write_whole(run.overrides, json.dumps(list(overrides)) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"run folder {run.path} cannot be written ({error}); free the disk, fix the permissions, or choose "
                "another folder with --run"
            ) from error
        yield run


def _accept_config(run: RunFolder, config: Any, may_differ, override: bool, notice) -> None:
    if run.config.exists():
        try:
            changes = config_io.diff(config_io.load_json(type(config), run.config), config)
        except config_io.ConfigError as error:
            if not override:
                raise RunFolderError(
                    f"run folder {run.path} holds a config that this code cannot read: {error}. Start a new run with "
                    "--run NEWNAME, or continue this one under the present config with --override"
                ) from error
            notice(f"unreadable config replaced: {error}")
            changes = []
        told = "; ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in changes)
        if any(not may_differ(name) for name, _, _ in changes) and not override:
            raise RunFolderError(
                f"run folder {run.path} belongs to another config ({told}). Start a new run with --run NEWNAME, go "
                "back to the folder's config, or continue it under the new one with --override"
            )
        if changes:
            notice(f"config changed: {told}")
    config_io.save_json(config, run.config)


def _process_start(pid: int) -> str | None:
    """The kernel's start time of a process, which tells a reused pid from the one that took the lock."""
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
        pass  # it lives, under another user
    return _process_start(holder["pid"]) in (holder["start"], None)


@contextlib.contextmanager
def _locked(run: RunFolder, notice: Callable[[str], None]) -> Iterator[None]:
    # flock guards only the moment of reading and writing the holder, so that two jobs cannot both take over a dead
    # one's lock; the holder itself is text, because file locks do not reach from host to host on every file system.
    me = {"pid": os.getpid(), "start": _process_start(os.getpid()), "host": socket.gethostname(), "since": time.time()}
    with open(run.lock, "a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if text := file.read():
            try:
                holder = json.loads(text)
            except json.JSONDecodeError:
                holder = {"pid": 0, "start": None, "host": "an unknown host", "since": os.path.getmtime(run.lock)}
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
            if holder["host"] != me["host"] or _alive(holder):
                raise RunFolderError(
                    f"run folder {run.path} is in use by process {holder['pid']} on {holder['host']} since {since}; "
                    f"wait for it, stop it, use another folder with --run, or delete {run.lock} if that job is gone"
                )
            notice(f"lock of process {holder['pid']}, dead on this host (started {since}), taken over")
        _replace_text(file, json.dumps(me))
    try:
        yield
    finally:
        with open(run.lock, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            if file.read() == json.dumps(me):
                _replace_text(file, "")


def _replace_text(file, text: str) -> None:
    file.truncate(0)  # the file is in append mode: what is written next starts at 0
    file.write(text)
    file.flush()


# ---- environment ----


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", "-C", here, *arguments], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or not a clone
        return None
    return result.stdout.decode("utf-8", "replace")


def describe_environment() -> dict[str, Any]:
    """Versions, devices, commit and command line of this process, JSON-ready. Initializes jax's backend."""
    import jax

    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit, changes = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    return {
        "start_time": time.time(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions,
        "backend": jax.default_backend(),
        "devices": dict(collections.Counter(device.device_kind for device in jax.devices())),
        "process_count": jax.process_count(),
        "git_commit": commit and commit.strip(),
        "git_dirty": None if changes is None else bool(_git("status", "--porcelain")),
        "git_diff_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def write_environment(run: RunFolder, environment: dict[str, Any]) -> None:
    """Write environment.json, newest start first; earlier starts of the run stay under `earlier`."""
    earlier = []
    if run.environment.exists():
        try:
            last = json.loads(run.environment.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise RunFolderError(f"{run.environment}: not JSON ({error}); delete it to go on without it") from error
        earlier = [last, *last.pop("earlier", [])]
    _write_whole(run.environment, json.dumps({**environment, "earlier": earlier}, indent=2) + "\n")


def write_samples(run: RunFolder, rows: Iterable[dict[str, str]]) -> None:
    """Replace samples.jsonl by `rows`, each with prompt, completion, reference and file."""
    _write_whole(run.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---- metrics ----


def _plain(value: Any, key: str, nonfinite: dict[str, str]) -> Any:
    """`value` as JSON; a NaN or infinity becomes null and its key is noted."""
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


def _heal(path: Path) -> None:
    """Cut a line that a crash tore off the end; a line whole but for its newline gets one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            tail = content[start:]
        if not tail:
            return
        try:
            json.loads(tail)
        except ValueError:
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")


class MetricsWriter:
    """Appends rows to metrics.jsonl, each on disk (in the kernel's hands) when `write` returns.

    `sinks` may name "tensorboard" (events under RUN/tensorboard, needs tensorboardX) and "wandb"; asked for but not
    installed is a RunFolderError at once. Only process 0 writes, on the others every method does nothing.
    """

    def __init__(self, run: RunFolder, *, sinks: Iterable[str] = (), process_index: int = 0):
        self._file: int | None = None  # a descriptor: one row is one system call, nothing waits in a buffer
        self._sinks: list[tuple[Callable[[dict], None], Callable[[], None]]] = []
        if process_index != 0:
            return
        self._sinks = [_open_sink(name, run) for name in sinks]
        _heal(run.metrics)
        self._file = os.open(run.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row. `time` is added; NaN and infinities become null and are named in the row's `nonfinite`.

        Raises OSError when the disk is full, after removing the partial line.
        """
        if self._file is None:
            return
        nonfinite: dict[str, str] = {}
        row = _plain({"kind": row["kind"], "step": row.get("step"), "time": time.time(), **row}, "", nonfinite)
        if nonfinite:
            row["nonfinite"] = nonfinite
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        start = os.fstat(self._file).st_size
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError:
            os.ftruncate(self._file, start)
            raise
        for send, _ in self._sinks:
            send(row)

    def close(self) -> None:
        """Close the file and flush the sinks."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        for _, close in self._sinks:
            close()
        self._sinks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    prefix = f"{row['kind']}/{row['set']}" if "set" in row else row["kind"]
    skip = {"kind", "step", "time", "set"}
    return {f"{prefix}/{k}": v for k, v in row.items() if k not in skip and type(v) in (int, float)}


def _open_sink(name: str, run: RunFolder) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """(send a row, close) of an optional sink."""
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

            name_id = run.path.resolve().name
            job = wandb.init(project="meshwork", name=name_id, id=name_id, dir=str(run.path), resume="allow")
            return lambda row: job.log(_scalars(row), step=row["step"]), job.finish
    except ImportError as error:
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        raise RunFolderError(
            f"metrics sink '{name}' was asked for but {package} is not installed ({error}); "
            f"pip install {package}, or leave the sink out"
        ) from error
    raise RunFolderError(f"metrics sink '{name}' is unknown; use tensorboard or wandb")


def _stands(row: dict[str, Any], resumed_step: int) -> bool:
    return row["kind"] == "event" or (row["kind"] != "final" and (row.get("step") or 0) <= resumed_step)


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl as one timeline.

    A row of the same kind, step and set supersedes an earlier one, and an event "resumed" at step s supersedes the
    earlier final row and all earlier rows above s; events stay. A last line torn by a crash is left out. Raises
    RunFolderError, with the line number, for any other line that is not a row.
    """
    content = Path(path).read_bytes()
    kept: dict[tuple, dict[str, Any]] = {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            kind = row["kind"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise RunFolderError(f"{path}, line {number}: not a metrics row ({error!r}); remove that line") from error
        if kind == "event":
            if row.get("event") == "resumed":
                kept = {k: r for k, r in kept.items() if _stands(r, row["step"])}
            kept["event", number] = row
            continue
        key = (kind, row.get("step"), row.get("set"))
        kept.pop(key, None)
        kept[key] = row
    return list(kept.values())
