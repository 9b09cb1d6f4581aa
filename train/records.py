"""Functions that open a run folder for writing and record its config, overrides, environment and samples.

The paths of the folder are in train/run_folder.py, its lease in train/lease.py and its metrics in train/metrics.py.
"""

import collections
import contextlib
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from data.paths import PathError, is_local, write_whole
from train import config_io
from train.bucket import check_bucket
from train.lease import LeaseTiming, hold_lease
from train.metrics import MetricsWriter
from train.run_folder import RunFolder, RunFolderError, read_metrics

__all__ = [
    "MetricsWriter",
    "RunFolder",
    "RunFolderError",
    "code_version",
    "describe_environment",
    "launcher_restarts",
    "open_run",
    "read_metrics",
    "with_writer",
    "write_environment",
    "write_samples",
]

ROOT = Path(__file__).resolve().parents[1]
CODE = (
    "pallas_kernels", "sharding", "model", "interop", "compression", "data", "train", "decode", "experiments",
)  # fmt: skip # folders of the package
PACKAGES = ("meshwork", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


# ---- opening a folder for writing ----


@contextlib.contextmanager
def open_run(
    path: str | os.PathLike,
    config: Any,
    *,
    overrides: Sequence[str] = (),
    may_differ: Callable[[str], bool] = lambda name: False,
    override: bool = False,
    log: Callable[[str], None] = lambda text: None,
    timing: LeaseTiming | None = None,
) -> Iterator[RunFolder]:
    """Create or reopen the run folder `path` as the only job that writes there. Call it on process 0 only.

    `config` is saved as config.json, and the `overrides` that led to it as overrides.json. If the folder already holds
    another config, only the fields that `may_differ` (a predicate on dotted names) allows may have changed, unless
    `override` is set. `log` receives messages about a lock that was taken over, about accepted changes, and about
    metrics without a checkpoint. Raises RunFolderError if the folder cannot be written, is in use by a live job, or
    belongs to another config. A folder in which nothing was trained accepts any config.
    """
    run = RunFolder(path)
    with contextlib.ExitStack() as stack:
        try:
            check_bucket(run.path, "run")
            run.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lease(run, log, timing=timing))
            _warn_about_missing_checkpoints(run, log)
            run.checkpoints.mkdir(exist_ok=True)
            _accept_config(run, config, may_differ, override, log)
            write_whole(run.overrides, json.dumps(list(overrides)) + "\n")
        except PathError as error:
            raise RunFolderError(str(error)) from error
        except OSError as error:
            fix = "free the disk, fix the permissions" if is_local(run.path) else "fix that"
            raise RunFolderError(
                f"run folder {run.path} cannot be written ({error}); {fix}, or choose another folder with --run"
            ) from error
        yield run


def _warn_about_missing_checkpoints(run: RunFolder, log: Callable[[str], None]) -> None:
    if (step := run.recorded_without_checkpoint()) is not None:
        log(
            f"warning: {run.metrics} records steps up to {step}, but {run.checkpoints} holds no checkpoint; training "
            f"starts at step 0. Put the checkpoints back to continue, or start a new run with --run NEWNAME"
        )


def _accept_config(
    run: RunFolder,
    config: Any,
    may_differ: Callable[[str], bool],
    override: bool,
    log: Callable[[str], None],
) -> None:
    if run.config.exists() and run.begun:
        try:
            changes = config_io.diff(config_io.load_json(type(config), run.config), config)
        except config_io.ConfigError as error:
            if not override:
                raise RunFolderError(
                    f"run folder {run.path} holds a config that this code cannot read: "
                    f"{with_writer(error, run)}; start a new run with --run NEWNAME, or continue this one under the "
                    "current config with --override"
                ) from error
            log(f"unreadable config replaced: {error}")
            changes = []
        changed = "; ".join(f"{name}: {old!r} -> {new!r}" for name, old, new in changes)
        if any(not may_differ(name) for name, _, _ in changes) and not override:
            raise RunFolderError(
                f"run folder {run.path} belongs to another config ({changed}). Start a new run with --run NEWNAME, "
                "use the folder's config, or continue under the new one with --override"
            )
        if changes:
            log(f"config changed: {changed}")
    config_io.save_json(config, run.config)


# ---- environment ----


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(["git", "-C", here, *arguments], capture_output=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):  # no git, or not a clone
        return None
    return result.stdout.decode("utf-8", "replace")


def describe_environment() -> dict[str, Any]:
    """Return versions, devices, commit and command line of this process as JSON values. Initializes jax's backend."""
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
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "devices": dict(collections.Counter(device.device_kind for device in jax.devices())),
        "process_count": jax.process_count(),
        "git_commit": commit and commit.strip(),
        "git_dirty": None if changes is None else bool(_git("status", "--porcelain")),
        "git_diff_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
        "restart": launcher_restarts(),
    }


def launcher_restarts() -> int | None:
    """Return how often the launcher has started this job again; None if it was not launched."""
    text = os.environ.get("MESHWORK_RESTART", "")  # set by experiments/launch
    return int(text) if text.isascii() and text.isdigit() else None


def code_version(root: Path = ROOT) -> str:
    """Return what identifies the code below `root`: the versions of the package and of jax, the commit, and a hash of
    all source files, which also covers changes and copies without git."""
    digest = hashlib.sha256()
    for folder in CODE:
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    versions = {name: "unknown" for name in ("meshwork", "jax")}
    for name in versions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = (_git("rev-parse", "--short=12", "HEAD") or "unknown").strip()
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{named}, commit {commit}, files {digest.hexdigest()[:12]}"


def with_writer(error: Exception, run: RunFolder) -> str:
    """Return the message of an error about a run folder, and what is known of the code that last wrote the folder."""
    text = str(error).rstrip(".")
    try:
        environment = json.loads(run.environment.read_bytes())
        packages, commit = environment["packages"], environment["git_commit"]
        theirs = [f"{name} {packages[name]}" for name in ("meshwork", "jax") if name in packages]
        theirs += [f"commit {commit[:12]}"] if commit else []
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return text
    end = "" if text.endswith("?") else "."
    return (
        f"{text}{end} The folder was last written by {', '.join(theirs)}; this code is {code_version()}. Check out the "
        "code that wrote it"
    )


def write_environment(run: RunFolder, environment: dict[str, Any]) -> None:
    """Write environment.json with this start on top; earlier starts of the run stay under `earlier`."""
    earlier = []
    if run.environment.exists():
        try:
            last = json.loads(run.environment.read_bytes())
            earlier = [last, *last.pop("earlier", [])]
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RunFolderError(
                f"{run.environment}: not an environment in JSON ({error}); delete it to continue without it"
            ) from error
    write_whole(run.environment, json.dumps({**environment, "earlier": earlier}, indent=2) + "\n")


def write_samples(run: RunFolder, rows: Iterable[dict[str, str]]) -> None:
    """Replace samples.jsonl by `rows`, each with prompt, completion, reference and file."""
    write_whole(run.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
