"""Checkpoints of a pytree with Orbax: asynchronous, atomic, verified leaf by leaf, independent of the mesh.

A folder holds one directory a step. Orbax writes the arrays of a step as a flat `{name: array}` tree into
`<step>.writing`; then `commit.json` (shapes, dtypes, checksums, files, the caller's metadata) is added and the
directory is renamed to `<step>`. A step without a whole `commit.json` does not count. On object stores, where a rename
is a copy, the arrays go to `<step>` at once and `commit.json` is still the last file.

Every process of a distributed run calls every method, in the same order; the folder is shared between them.
Process 0 alone lists, commits and deletes.
"""

import dataclasses
import json
import math
import shutil
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from train.leaves import (
    checksums,
    differences,
    from_stored,
    named_leaves,
    restore_args,
    signature,
    stored_struct,
    to_storable,
)

COMMIT_FILE = "commit.json"
FORMAT = 1
STAGING_SUFFIX = ".writing"
# What a checkpoint needs on disk beyond the bytes of its arrays: indices, metadata, the file system's blocks.
SPACE_MARGIN = 1.05
SPACE_FLOOR = 4 << 20
EXIT_WAIT_SECONDS = 60.0
# Indices and metadata are files below this size: damage there is found before Orbax stumbles over it. The large ones
# hold arrays, which the leaves' own checksums guard without reading them twice.
SMALL_FILE = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written where it was asked, or cannot be restored; the message says why."""


class _DamagedError(Exception):
    """One step on disk is not whole; the message names the leaf or the file."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What `Checkpointer.restore` found: the step, the state as the template asked for it, the metadata as saved."""

    step: int
    state: Any
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Pending:
    thread: threading.Thread
    errors: list[Exception]


def _print_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- commit file


def _file_facts(file: epath.Path) -> dict[str, int]:
    """Size of a file, and the CRC-32 of a small one."""
    size = file.stat().length
    return {"size": size, "crc32": zlib.crc32(file.read_bytes())} if size <= SMALL_FILE else {"size": size}


def _write_commit(directory: epath.Path, body: dict[str, Any]) -> None:
    files = sorted(root / name for root, _, names in directory.walk() for name in names if name != COMMIT_FILE)
    body = body | {"files": {str(file.relative_to(directory)): _file_facts(file) for file in files}}
    text = json.dumps(body, sort_keys=True)
    (directory / COMMIT_FILE).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}, indent=1))


def _read_commit(directory: epath.Path) -> dict[str, Any]:
    """The body of `commit.json`, after checking it and the facts of every file that it lists."""
    file = directory / COMMIT_FILE
    if not file.exists():
        raise _DamagedError(f"{COMMIT_FILE} is missing: the save or the copy of this step was cut short")
    try:
        document = json.loads(file.read_bytes())
        body = document["body"]
        intact = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == document["crc32"]
    except (ValueError, KeyError, TypeError) as error:  # ValueError: not JSON, or not UTF-8
        raise _DamagedError(f"{COMMIT_FILE} is garbage ({error})") from error
    if not intact:
        raise _DamagedError(f"{COMMIT_FILE}: checksum mismatch")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{directory} has checkpoint format {body['format']}; this code reads {FORMAT}")
    for name, facts in body["files"].items():
        if not (directory / name).exists():
            raise _DamagedError(f"{name} is missing")
        found = _file_facts(directory / name)
        if found["size"] != facts["size"]:
            raise _DamagedError(f"{name} holds {found['size']} bytes, {facts['size']} were written")
        if found != facts:
            raise _DamagedError(f"{name}: checksum mismatch")
    return body


# ---------------------------------------------------------------------------------------------------- agreement


def _process_zero() -> bool:
    return jax.process_index() == 0


def _all_agree(ok: bool) -> bool:
    """True when every process says True. A collective under several processes, free with one."""
    return ok if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(ok))))


def _from_process_zero(steps: list[int]) -> list[int]:
    """Process 0's list on every process."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.asarray(steps if _process_zero() else [0] * count, np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]


def _one_line(error: BaseException) -> str:
    return (" ".join(f"{error}".split()) or type(error).__name__)[:400]


# ---------------------------------------------------------------------------------------------------- checkpointer


class Checkpointer:
    """Saves and restores the steps of one run folder; a context manager that waits for the last save on leaving.

    keep_last: newest steps to keep. keep_best: further steps to keep, by the metric given to `save` (`best_mode`
    says which is better; steps saved without a metric, or with NaN, are never the best). warn: receives one-paragraph
    messages about failed saves, damaged steps and dropped steps. free_bytes: free space of the folder's disk, in
    bytes. read_only: restore alone, nothing is created or cleaned (evaluation beside a run that is going on).

    CheckpointError when the folder cannot be created or written.
    """

    def __init__(
        self,
        directory: str,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best_mode: Literal["min", "max"] = "min",
        warn: Callable[[str], None] = _print_warning,
        free_bytes: Callable[[], float] | None = None,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"keep_last = {keep_last}, keep_best = {keep_best}: keep at least the last 1 and the best 0 checkpoints"
            )
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode = {best_mode!r}: set it to 'min' or 'max'")
        self._local = "://" not in str(directory)
        self._directory = epath.Path(directory).absolute() if self._local else epath.Path(directory)
        self._keep_last, self._keep_best, self._best_mode = keep_last, keep_best, best_mode
        self._warn, self._read_only = warn, read_only
        self._free_bytes = free_bytes or self._disk_free
        self._current: int | None = None  # the step this run stands at: restored, or saved last
        self._pending: _Pending | None = None
        if read_only:
            if not self._directory.is_dir():
                raise CheckpointError(f"{self._directory} is not a directory of checkpoints; check the run's path")
        elif _process_zero():
            self._prepare_folder()
        # Compressing random-looking floats costs more time than it saves bytes, and CPU that training wants.
        self._handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._writer = ocp.AsyncCheckpointer(
            self._handler, async_options=ocp.AsyncOptions(timeout_secs=600, create_directories_asynchronously=False)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(abandon=kind is not None)

    def close(self, *, abandon: bool = False) -> None:
        """Waits for the save under way and reports it. abandon: peers may be gone, wait a bounded time, agree on
        nothing."""
        if abandon and self._pending:
            self._pending.thread.join(EXIT_WAIT_SECONDS)
            return
        self.wait()
        self._writer.close()

    # ------------------------------------------------------------------------------------------------ the folder

    def _prepare_folder(self) -> None:
        probe = self._directory / f"probe{STAGING_SUFFIX}"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to {self._directory} ({_one_line(error)}); "
                f"choose a folder that can be created and written"
            ) from error
        self._clean_leftovers()

    def _clean_leftovers(self) -> None:
        for path in self._directory.iterdir():
            if STAGING_SUFFIX in path.name and path.is_dir():
                path.rmtree()

    def _disk_free(self) -> float:
        return shutil.disk_usage(self._directory).free if self._local else math.inf

    def _on_disk(self) -> list[int]:
        """Every step directory, whole or not, in ascending order."""
        return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdecimal())

    def _step_path(self, step: int) -> epath.Path:
        return self._directory / str(step)

    def steps(self) -> list[int]:
        """The committed steps on disk now, in ascending order."""
        return [step for step in self._on_disk() if (self._step_path(step) / COMMIT_FILE).exists()]

    # ------------------------------------------------------------------------------------------------ saving

    def save(
        self, step: int, state: Any, *, metadata: dict[str, Any], metric: float | None = None, wait: bool = False
    ) -> bool:
        """Starts writing `state` as `step`; returns whether the save was started (with wait: whether it succeeded).

        The buffers may be donated as soon as this returns. Waits for the save before. A full disk or a failed write
        is told through `warn` and leaves the older steps as they are; the next save tries again.
        metadata: JSON values. CheckpointError when the folder holds newer steps that this run did not restore from.
        """
        if self._read_only:
            raise CheckpointError(f"{self._directory} was opened with read_only=True; open it without to save")
        self.wait()
        if self._current is None and (ahead := [old for old in self._on_disk() if old >= step]):
            raise CheckpointError(
                f"save of step {step}: {self._directory} already holds step {ahead[-1]}; restore "
                f"from it first, or choose another folder"
            )
        leaves = named_leaves(state)
        stored = {name: to_storable(leaf) for name, leaf in leaves.items()}
        needed = sum(leaf.nbytes for leaf in stored.values()) * SPACE_MARGIN + SPACE_FLOOR
        free = self._free_bytes() if _process_zero() else math.inf
        if not _all_agree(free >= needed):
            if _process_zero():
                self._report_failure(
                    step, f"no space left in {self._directory} (needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB free)"
                )
            return False
        sums = checksums(stored)
        body = {
            "format": FORMAT,
            "step": step,
            "metadata": metadata,
            "metric": None if metric is None or math.isnan(metric) else float(metric),
            "leaves": {name: signature(leaf) | {"checksum": sums[name]} for name, leaf in leaves.items()},
        }
        body = json.loads(json.dumps(body))  # what cannot be JSON must fail here, not in the thread
        staging = self._directory / f"{step}{STAGING_SUFFIX}" if self._local else self._step_path(step)
        try:
            # Orbax refuses arrays without elements; their shape in commit.json is all there is to know.
            filled = {name: leaf for name, leaf in stored.items() if leaf.size}
            self._writer.save(staging, args=ocp.args.PyTreeSave(filled), force=True)
        except Exception as error:
            self._abandon_save(step, error)
            return False
        errors: list[Exception] = []
        thread = threading.Thread(target=self._finish, args=(staging, body, errors), name="checkpoint-commit")
        self._pending = _Pending(thread, errors)
        thread.start()
        return self.wait() if wait else True

    def _finish(self, staging: epath.Path, body: dict[str, Any], errors: list[Exception]) -> None:
        """Commits the save under way once its files are written; runs beside training."""
        step = body["step"]
        try:
            self._writer.wait_until_finished()
            self._current = step
            if _process_zero():
                _write_commit(staging, body)
                final = self._step_path(step)
                if staging != final:
                    if final.exists():  # a damaged or abandoned copy of the same step
                        final.rmtree()
                    staging.rename(final)
                self._drop_old(step)
        except Exception as error:
            errors.append(error)
            self._abandon_save(step, error)

    def wait(self) -> bool:
        """Waits for the save under way; returns whether it succeeded on every process (True when there is none)."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        pending.thread.join()
        return _all_agree(not pending.errors)

    def _report_failure(self, step: int, reason: str) -> None:
        last = max((old for old in self.steps() if old != step), default=None)
        kept = "no good step is on disk" if last is None else f"last good step {last}"
        self._warn(f"save of step {step} failed: {reason}; {kept}")

    def _abandon_save(self, step: int, error: Exception) -> None:
        if _process_zero():
            self._clean_leftovers()
        self._report_failure(step, _one_line(error))

    def _drop_old(self, newest: int) -> None:
        """Deletes what neither keep_last nor keep_best holds, and steps ahead of `newest` (of an abandoned run)."""
        on_disk, committed = self._on_disk(), set(self.steps())
        ahead = [step for step in on_disk if step > newest]
        good = [step for step in on_disk if step in committed and step <= newest]
        keep = {newest, *good[-self._keep_last :], *self._best(good)}
        if ahead:
            self._warn(
                f"dropping steps {', '.join(map(str, ahead))}: step {newest}, just saved, continues an earlier one"
            )
        for step in on_disk:
            if step not in keep:
                self._step_path(step).rmtree()

    def _best(self, steps: list[int]) -> list[int]:
        metrics = {}
        for step in steps if self._keep_best else []:
            try:
                metrics[step] = _read_commit(self._step_path(step))["metric"]
            except _DamagedError:
                continue  # a damaged step is nobody's best; keep_last still holds it if it is recent
        sign = 1 if self._best_mode == "min" else -1
        ranked = sorted((sign * metric, -step) for step, metric in metrics.items() if metric is not None)
        return [-step for _, step in ranked[: self._keep_best]]

    # ------------------------------------------------------------------------------------------------ restoring

    def restore(self, template: Any, *, step: int | None = None, part: bool = False) -> Restored | None:
        """Restores the newest good step, or exactly `step`; None when the folder holds no step at all.

        part: the template may lack leaves that were saved, which are then not read.

        template: the tree that was saved, of concrete arrays or of `jax.ShapeDtypeStruct`s with shardings, on any
        mesh; or a function that gives it for a step's metadata. A leaf without a sharding is restored uncommitted;
        numpy leaves stay numpy. Damaged steps are named through `warn` and passed over. CheckpointError when no step is
        good, when `step` is not, or when a leaf's name, shape or dtype differs from the template's.
        """
        self.wait()
        on_disk = _from_process_zero(self._on_disk())
        if step is not None and step not in on_disk:
            raise CheckpointError(
                f"step {step} is not in {self._directory}, which holds {', '.join(map(str, on_disk)) or 'none'}"
            )
        candidates = sorted(on_disk, reverse=True) if step is None else [step]
        reasons = []
        for position, candidate in enumerate(candidates):
            try:
                restored = self._restore_step(candidate, template, part)
                self._current = candidate
                return restored
            except _DamagedError as damage:
                reasons.append(f"step {candidate}, {damage}")
                if position + 1 < len(candidates):
                    self._warn(f"{reasons[-1]}; falling back to step {candidates[position + 1]}")
        if not reasons:
            return None
        raise CheckpointError(f"no good checkpoint in {self._directory}:\n  " + "\n  ".join(reasons))

    def _restore_step(self, step: int, template: Any, part: bool) -> Restored:
        body = self._jointly(lambda: _read_commit(self._step_path(step)))
        if callable(template):
            template = template(body["metadata"])
        leaves = named_leaves(template)
        saved = {
            name: {key: entry[key] for key in ("shape", "dtype")}
            for name, entry in body["leaves"].items() if name in leaves or not part
        }  # fmt: skip
        if table := differences(saved, {name: signature(leaf) for name, leaf in leaves.items()}):
            raise CheckpointError(
                f"step {step} of {self._directory} holds another state than the one asked for; "
                f"set the configuration back, or start in another folder:\n{table}"
            )
        stored = self._jointly(lambda: self._read_arrays(step, leaves))
        found = checksums(stored)
        wrong = [name for name in leaves if found[name] != body["leaves"][name]["checksum"]]
        self._jointly(lambda: self._refuse(wrong))
        values = [from_stored(stored[name], leaf) for name, leaf in leaves.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(template), values), body["metadata"])

    def _read_arrays(self, step: int, leaves: dict[str, Any]) -> dict[str, Any]:
        filled = {name: leaf for name, leaf in leaves.items() if math.prod(leaf.shape)}
        empty = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items() if name not in filled}
        args = ocp.args.PyTreeRestore(
            item={name: stored_struct(leaf) for name, leaf in filled.items()},
            restore_args={name: restore_args(leaf) for name, leaf in filled.items()},
            partial_restore=True,
        )
        try:
            return self._handler.restore(self._step_path(step), args=args) | empty
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the machine's trouble, not the checkpoint's
        except Exception as error:  # TensorStore reports damage with bare types
            message = str(error)
            named = max((name for name in leaves if name in message), key=len, default="arrays")
            raise _DamagedError(f"{named}: cannot be read ({_one_line(error)})") from error

    @staticmethod
    def _refuse(wrong: list[str]) -> None:
        if wrong:
            more = f" (and {len(wrong) - 1} more leaves)" if len(wrong) > 1 else ""
            raise _DamagedError(f"{wrong[0]}: checksum mismatch{more}")

    @staticmethod
    def _jointly(read: Callable[[], Any]) -> Any:
        """`read()` on every process; damage that one of them meets is damage for all, so that all fall back."""
        value, damage = None, None
        try:
            value = read()
        except _DamagedError as error:
            damage = error
        if _all_agree(damage is None):
            return value
        raise damage or _DamagedError("another process found it damaged")
