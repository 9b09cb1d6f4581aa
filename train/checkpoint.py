"""Asynchronous and atomic checkpoints of a pytree with Orbax, verified leaf by leaf and independent of the mesh.

A folder holds one directory per step. Orbax writes the arrays of a step as a flat `{name: array}` tree. Then
commit.json (shapes, dtypes, checksums, files and the caller's metadata, see train/commit.py) makes the step valid.
train/checkpoint_folder.py defines how a step appears on a local disk and in a bucket, and which steps are kept.

Every process of a distributed run calls every method, in the same order, and all processes share the folder. Only
process 0 lists, commits and deletes steps.
"""

import dataclasses
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from data.paths import PathError, is_local, parse_path, require_backend
from train.checkpoint_folder import STAGING_SUFFIX, CheckpointFolder
from train.checkpoint_reader import CheckpointReader, all_agree, in_parts, process_zero
from train.commit import COMMIT_FILE, FORMAT, CheckpointError, DamagedError, UnreadableError, one_line
from train.leaves import checksums, differences, from_stored, named_leaves, signature, to_storable

__all__ = ["COMMIT_FILE", "STAGING_SUFFIX", "CheckpointError", "Checkpointer", "Restored"]

# Disk space beyond the bytes of the arrays: indices, metadata and partly filled blocks of the file system.
SPACE_MARGIN = 1.05
SPACE_FLOOR = 4 << 20
EXIT_WAIT_SECONDS = 60.0
RETRY_WAITS = (0.5, 2.0, 8.0)  # seconds before each retry of a failed read
VERIFY_BYTES = 1 << 28  # that `verify` reads back at a time, summed over all devices


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored step: its number, the state in the template's form, and the metadata as saved."""

    step: int
    state: Any
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Pending:
    thread: threading.Thread
    errors: list[Exception]


def _print_warning(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _orbax(per_process: bool) -> tuple[ocp.PyTreeCheckpointHandler, ocp.AsyncCheckpointer]:
    """Return the parts of Orbax that read and write. With `per_process`, each process writes all that it holds."""
    processes = ocp.options.MultiprocessingOptions(primary_host=None if per_process else 0)
    more: dict[str, Any] = {}
    if per_process:
        arrays = ocp.type_handlers.ArrayHandler(primary_host=None, replica_id=None, use_replica_parallel=False)
        more["type_handler_registry"] = ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, ocp.type_handlers.NumpyHandler()), (jax.Array, arrays)
        )
    # Weights look like random bits: compression saves little space and takes CPU time from training.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=processes, **more)
    options = ocp.AsyncOptions(timeout_secs=600, create_directories_asynchronously=False)
    return handler, ocp.AsyncCheckpointer(handler, async_options=options, multiprocessing_options=processes)


class Checkpointer:
    """Saves and restores the steps of one folder. As a context manager, it waits for the last save on exit.

    keep_last: number of newest steps to keep. keep_best: number of further steps to keep, ranked by the metric given
    to `save` (`best_mode` says whether a lower or a higher metric is better; a step saved without a metric, or with
    NaN, is never among the best). keep_older: if above 0, a step that is as many steps older than the newest one is
    kept, too, as soon as there is one. log: callback for one-paragraph messages about failed saves, damaged steps and
    steps set aside; a background thread may call it. free_bytes: returns the free space of the folder's disk in bytes.
    read_only: only restore, and neither create nor clean up anything (to evaluate a run that is still training).
    local: whether the folder supports renaming (default: derived from the path). retry_waits: seconds to wait before
    each retry of a failed read. per_process: whether every process has a separate folder, with the arrays on its
    devices, instead of one that all share. Such a step restores only on the same processes and mesh.

    Raises CheckpointError if the folder cannot be created or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best_mode: Literal["min", "max"] = "min",
        keep_older: int = 0,
        log: Callable[[str], None] = _print_warning,
        free_bytes: Callable[[], float] | None = None,
        read_only: bool = False,
        local: bool | None = None,
        retry_waits: Sequence[float] = RETRY_WAITS,
        per_process: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last = {keep_last}, keep_best = {keep_best}: must be at least 1 and at least 0")
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode = {best_mode!r}: set it to 'min' or 'max'")
        try:
            path = require_backend(parse_path(directory, "checkpoints"), "checkpoints")
        except PathError as error:
            raise CheckpointError(str(error)) from error
        self._folder = CheckpointFolder(
            path.absolute() if is_local(path) else path,
            local=is_local(path) if local is None else local,
            keep_last=keep_last, keep_best=keep_best, best_mode=best_mode, keep_older=keep_older,
            log=log,
        )  # fmt: skip
        self._directory = self._folder.path
        self._log, self._read_only = log, read_only
        self._free_bytes = free_bytes or self._folder.free_bytes
        self._leads = per_process or process_zero()  # lists, commits and deletes the steps of its folder
        self._current: int | None = None  # the step that this run restored or saved last
        self._pending: _Pending | None = None
        if read_only:
            if not self._directory.is_dir():
                raise CheckpointError(f"{self._directory} is not a directory of checkpoints; check the run's path")
        elif self._leads:
            self._folder.prepare()
        handler, self._writer = _orbax(per_process)
        self._reader = CheckpointReader(self._folder, handler, retry_waits, per_process=per_process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(abandon=kind is not None)

    def close(self, *, abandon: bool = False) -> None:
        """Wait for the save in progress and report its result.

        abandon: peers may be gone, so wait for a bounded time and run no collective.
        """
        if abandon and self._pending:
            self._pending.thread.join(EXIT_WAIT_SECONDS)
            return
        self.wait()
        self._writer.close()

    def steps(self) -> list[int]:
        """Return the committed steps now on disk, in ascending order."""
        return self._folder.committed()

    def newest(self, at_most: int) -> int | None:
        """Return the newest step on disk up to `at_most`, intact or not, or None. Waits for the save in progress."""
        self.wait()
        return max((step for step in self._list_steps() if step <= at_most), default=None)

    def abandon_after(self, step: int) -> None:
        """Set aside all later steps, so that a resumed run starts from `step`. Log a failure."""
        self.wait()
        self._current = step
        if self._leads:
            try:
                self._folder.abandon_after(step)
            except Exception as error:  # OSError, or an exception class of a bucket's client
                self._log(f"steps after {step} could not be set aside ({one_line(error)}); a resumed run may use them")

    def continue_from(self, step: int) -> None:
        """Take `step` as the one from which this run continues: later steps are set aside by the next save."""
        self._current = step

    # ---- saving ----

    def save(
        self, step: int, state: Any, *, metadata: dict[str, Any], metric: float | None = None, wait: bool = False
    ) -> bool:
        """Start to save `state` as `step`. Return whether the save started or, with `wait`, whether it succeeded.

        The state's buffers may be donated as soon as this method returns. It first waits for the previous save. A full
        disk or a failed write is reported through `log` and leaves older steps unchanged; the next save tries again.
        `verify` reads the step back. metadata: JSON values. Raises CheckpointError if the folder holds newer steps and
        this run has not restored from it.
        """
        if self._read_only:
            raise CheckpointError(f"{self._directory} was opened with read_only=True; open it without to save")
        self.wait()
        if self._current is None and (ahead := [old for old in self._folder.on_disk() if old >= step]):
            raise CheckpointError(
                f"save of step {step}: {self._directory} already holds step {ahead[-1]}; restore "
                f"from it first, or choose another folder"
            )
        leaves = named_leaves(state)
        stored = {name: to_storable(leaf) for name, leaf in leaves.items()}
        if not self._has_space(step, sum(leaf.nbytes for leaf in stored.values())):
            return False
        sums = checksums(stored)
        body = {
            "format": FORMAT,
            "step": step,
            "metadata": metadata,
            "metric": None if metric is None or math.isnan(metric) else float(metric),
            "leaves": {name: signature(leaf) | {"checksum": sums[name]} for name, leaf in leaves.items()},
        }
        body = json.loads(json.dumps(body))  # a value that is not JSON must fail here, not in the thread
        error = None
        try:
            if self._leads:
                self._folder.clear_for(step)
            # Orbax rejects empty arrays; their shape in commit.json is enough to restore them.
            filled = {name: leaf for name, leaf in stored.items() if leaf.size}
            self._writer.save(self._folder.staging_path(step), args=ocp.args.PyTreeSave(filled), force=True)
        except Exception as caught:
            error = caught
        # If one process cannot start the save, no process saves, and `wait` has nothing to wait for.
        if not all_agree(error is None):
            self._abandon_save(step, error or RuntimeError("another process could not start it"))
            return False
        errors: list[Exception] = []
        thread = threading.Thread(target=self._finish, args=(step, body, errors), name="checkpoint-commit")
        self._pending = _Pending(thread, errors)
        thread.start()
        return self.wait() if wait else True

    def _has_space(self, step: int, array_bytes: int) -> bool:
        needed = array_bytes * SPACE_MARGIN + SPACE_FLOOR
        free = self._free_bytes() if self._leads else math.inf
        if all_agree(free >= needed):
            return True
        if self._leads:
            self._report_failure(
                step, f"no space left in {self._directory} (needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB free)"
            )
        return False

    def _finish(self, step: int, body: dict[str, Any], errors: list[Exception]) -> None:
        """Commit the save in progress once its files are written. Runs in a thread while training continues."""
        try:
            self._writer.wait_until_finished()
            if self._leads:
                self._folder.publish(step, body)
        except Exception as error:
            errors.append(error)
            self._abandon_save(step, error)
            return
        self._current = step
        if self._leads:
            self._folder.drop_old(step)

    def wait(self) -> bool:
        """Wait for the save in progress. Return whether it succeeded on every process, and True if there is none."""
        if self._pending is None:
            return True
        pending, self._pending = self._pending, None
        pending.thread.join()
        return all_agree(not pending.errors)

    def _report_failure(self, step: int, reason: str) -> None:
        try:
            last = max((old for old in self.steps() if old != step), default=None)
            kept = "no good step is on disk" if last is None else f"last good step {last}"
        except Exception as error:
            kept = f"cannot list the steps on disk ({one_line(error)})"
        self._log(f"save of step {step} failed: {reason}; {kept}")

    def _abandon_save(self, step: int, error: Exception) -> None:
        if self._leads:
            self._folder.clean_leftovers()
        self._report_failure(step, one_line(error))

    # ---- restoring ----

    def restore(
        self, template: Any, *, step: int | None = None, at_most: int | None = None, part: bool = False
    ) -> Restored | None:
        """Restore the newest good step, if given up to `at_most`, or exactly `step`. Return None if there is none.

        template: the saved tree, as concrete arrays or as `jax.ShapeDtypeStruct`s with shardings on any mesh, or a
        function that returns such a tree for a step's metadata. A leaf without a sharding is restored uncommitted, and
        numpy leaves stay numpy. part: the template may lack saved leaves, which are then not read.

        A step that is proven damaged is reported through `log` and skipped. Raises CheckpointError if no step is
        good, if `step` is not good, if a leaf's name, shape or dtype differs from the template's, or if a step cannot
        be read after several attempts. A failed read does not prove damage, so no older step is restored in its place.
        """
        self.wait()
        on_disk = self._list_steps()
        if step is not None and step not in on_disk:
            raise CheckpointError(
                f"step {step} is not in {self._directory}, which holds {', '.join(map(str, on_disk)) or 'no steps'}"
            )
        candidates = sorted(on_disk, reverse=True) if step is None else [step]
        if at_most is not None:
            candidates = [candidate for candidate in candidates if candidate <= at_most]
        reasons = []
        for position, candidate in enumerate(candidates):
            try:
                restored = self._restore_step(candidate, template, part)
                self._current = candidate
                return restored
            except DamagedError as damage:
                self._folder.damaged.add(candidate)
                reasons.append(f"step {candidate}, {damage}")
                if position + 1 < len(candidates):
                    self._log(f"{reasons[-1]}; falling back to step {candidates[position + 1]}")
            except UnreadableError as error:
                raise self._reader.not_readable(f"step {candidate}", error) from error
        if not reasons:
            return None
        raise CheckpointError(f"no good checkpoint in {self._directory}:\n  " + "\n  ".join(reasons))

    def _list_steps(self) -> list[int]:
        """Return the steps on disk, intact or not. Raises CheckpointError."""
        try:
            return self._reader.list_steps()
        except (DamagedError, UnreadableError) as error:
            raise self._reader.not_readable("the list of steps", error) from error

    def verify(self, step: int, state: Any) -> None:
        """Read `step` back, a few leaves at a time, and compare each leaf with its saved checksum.

        state: the saved tree, or its shapes with shardings. Raises CheckpointError unless every leaf is intact.
        """
        self.wait()
        try:
            body = self._reader.read_commit(step)
            for leaves in in_parts(named_leaves(state), VERIFY_BYTES):
                self._reader.read_verified(step, leaves, body)
        except DamagedError as damage:
            self._folder.damaged.add(step)
            raise CheckpointError(f"step {step} of {self._directory} is damaged: {damage}") from damage
        except UnreadableError as error:
            raise self._reader.not_readable(f"step {step}", error) from error

    def _restore_step(self, step: int, template: Any, part: bool) -> Restored:
        body = self._reader.read_commit(step)
        if callable(template):
            template = template(body["metadata"])
        leaves = named_leaves(template)
        saved = {
            name: {key: entry[key] for key in ("shape", "dtype")}
            for name, entry in body["leaves"].items() if name in leaves or not part
        }  # fmt: skip
        if table := differences(saved, {name: signature(leaf) for name, leaf in leaves.items()}):
            raise CheckpointError(
                f"step {step} of {self._directory} does not match the requested state; "
                f"restore the configuration, or start in another folder:\n{table}"
            )
        stored = self._reader.read_verified(step, leaves, body)
        values = [from_stored(stored[name], leaf) for name, leaf in leaves.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(template), values), body["metadata"])
