"""Checkpoints of a pytree with Orbax: asynchronous, atomic, verified leaf by leaf, independent of the mesh.

A folder holds one directory a step. Orbax writes the arrays of a step as a flat `{name: array}` tree; then commit.json
(train/commit.py: shapes, dtypes, checksums, files, the caller's metadata) makes the step count. How a step appears on
a local disk and in a bucket, and which steps are kept, is in train/checkpoint_folder.py.

Every process of a distributed run calls every method, in the same order; the folder is shared between them.
Process 0 alone lists, commits and deletes.
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
import orbax.checkpoint as ocp

from data.paths import PathError, is_local, parse_path, require_backend
from train.checkpoint_folder import STAGING_SUFFIX, CheckpointFolder
from train.checkpoint_reader import CheckpointReader, all_agree, in_parts, process_zero
from train.commit import COMMIT_FILE, FORMAT, CheckpointError, DamagedError, UnreadableError, one_line
from train.leaves import checksums, differences, from_stored, named_leaves, signature, to_storable

__all__ = ["COMMIT_FILE", "STAGING_SUFFIX", "CheckpointError", "Checkpointer", "Restored"]

# What a checkpoint needs on disk beyond the bytes of its arrays: indices, metadata, the file system's blocks.
SPACE_MARGIN = 1.05
SPACE_FLOOR = 4 << 20
EXIT_WAIT_SECONDS = 60.0
RETRY_WAITS = (0.5, 2.0, 8.0)  # seconds before each further try of what could not be read
VERIFY_BYTES = 1 << 28  # read back at once by `verify`, over all devices


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


class Checkpointer:
    """Saves and restores the steps of one run folder; a context manager that waits for the last save on leaving.

    keep_last: newest steps to keep. keep_best: further steps to keep, by the metric given to `save` (`best_mode`
    says which is better; steps saved without a metric, or with NaN, are never the best). warn: receives one-paragraph
    messages about failed saves, damaged steps and steps set aside; called from a thread, too. free_bytes: free space
    of the folder's disk, in bytes. read_only: restore alone, nothing is created or cleaned (evaluation beside a run
    that is going on). local: whether the folder can be renamed (default: read off the path). retry_waits: seconds to
    wait before each further try of what could not be read.

    CheckpointError when the folder cannot be created or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best_mode: Literal["min", "max"] = "min",
        warn: Callable[[str], None] = _print_warning,
        free_bytes: Callable[[], float] | None = None,
        read_only: bool = False,
        local: bool | None = None,
        retry_waits: Sequence[float] = RETRY_WAITS,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(
                f"keep_last = {keep_last}, keep_best = {keep_best}: keep at least the last 1 and the best 0 checkpoints"
            )
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode = {best_mode!r}: set it to 'min' or 'max'")
        try:
            path = require_backend(parse_path(directory, "checkpoints"), "checkpoints")
        except PathError as error:
            raise CheckpointError(str(error)) from error
        self._folder = CheckpointFolder(
            path.absolute() if is_local(path) else path,
            local=is_local(path) if local is None else local,
            keep_last=keep_last, keep_best=keep_best, best_mode=best_mode, warn=warn,
        )  # fmt: skip
        self._directory = self._folder.path
        self._warn, self._read_only = warn, read_only
        self._free_bytes = free_bytes or self._folder.free_bytes
        self._current: int | None = None  # the step this run stands at: restored, or saved last
        self._pending: _Pending | None = None
        if read_only:
            if not self._directory.is_dir():
                raise CheckpointError(f"{self._directory} is not a directory of checkpoints; check the run's path")
        elif process_zero():
            self._folder.prepare()
        # Compressing random-looking floats costs more time than it saves bytes, and CPU that training wants.
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._reader = CheckpointReader(self._folder, handler, retry_waits)
        self._writer = ocp.AsyncCheckpointer(
            handler, async_options=ocp.AsyncOptions(timeout_secs=600, create_directories_asynchronously=False)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(abandon=kind is not None)

    def close(self, *, abandon: bool = False) -> None:
        """Wait for the save under way and report it. abandon: peers may be gone, wait a bounded time, agree on
        nothing."""
        if abandon and self._pending:
            self._pending.thread.join(EXIT_WAIT_SECONDS)
            return
        self.wait()
        self._writer.close()

    def steps(self) -> list[int]:
        """Return the committed steps on disk now, in ascending order."""
        return self._folder.committed()

    # ---- saving ----

    def save(
        self, step: int, state: Any, *, metadata: dict[str, Any], metric: float | None = None, wait: bool = False
    ) -> bool:
        """Start writing `state` as `step`; return whether the save was started (with wait: whether it succeeded).

        The buffers may be donated as soon as this returns. Waits for the save before. A full disk or a failed write
        is reported through `warn` and leaves the older steps as they are; the next save tries again. `verify` reads
        the step back. metadata: JSON values. CheckpointError when the folder holds newer steps that this run did not
        restore from.
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
        body = json.loads(json.dumps(body))  # what cannot be JSON must fail here, not in the thread
        error = None
        try:
            if process_zero():
                self._folder.clear_for(step)
            # Orbax refuses arrays without elements; their shape in commit.json is all there is to know.
            filled = {name: leaf for name, leaf in stored.items() if leaf.size}
            self._writer.save(self._folder.staging_path(step), args=ocp.args.PyTreeSave(filled), force=True)
        except Exception as caught:
            error = caught
        if not all_agree(
            error is None
        ):  # a save that one process cannot start is none for all, and `wait` is not asked
            self._abandon_save(step, error or RuntimeError("another process could not start it"))
            return False
        errors: list[Exception] = []
        thread = threading.Thread(target=self._finish, args=(step, body, errors), name="checkpoint-commit")
        self._pending = _Pending(thread, errors)
        thread.start()
        return self.wait() if wait else True

    def _has_space(self, step: int, array_bytes: int) -> bool:
        needed = array_bytes * SPACE_MARGIN + SPACE_FLOOR
        free = self._free_bytes() if process_zero() else math.inf
        if all_agree(free >= needed):
            return True
        if process_zero():
            self._report_failure(
                step, f"no space left in {self._directory} (needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB free)"
            )
        return False

    def _finish(self, step: int, body: dict[str, Any], errors: list[Exception]) -> None:
        """Commit the save under way once its files are written; runs beside training."""
        try:
            self._writer.wait_until_finished()
            if process_zero():
                self._folder.publish(step, body)
        except Exception as error:
            errors.append(error)
            self._abandon_save(step, error)
            return
        self._current = step
        if process_zero():
            self._folder.drop_old(step)

    def wait(self) -> bool:
        """Wait for the save under way; return whether it succeeded on every process (True when there is none)."""
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
            kept = f"the steps on disk cannot be listed ({one_line(error)})"
        self._warn(f"save of step {step} failed: {reason}; {kept}")

    def _abandon_save(self, step: int, error: Exception) -> None:
        if process_zero():
            self._folder.clean_leftovers()
        self._report_failure(step, one_line(error))

    # ---- restoring ----

    def restore(self, template: Any, *, step: int | None = None, part: bool = False) -> Restored | None:
        """Restore the newest good step, or exactly `step`; return None when the folder holds no step at all.

        part: the template may lack leaves that were saved, which are then not read.

        template: the tree that was saved, of concrete arrays or of `jax.ShapeDtypeStruct`s with shardings, on any
        mesh; or a function that gives it for a step's metadata. A leaf without a sharding is restored uncommitted;
        numpy leaves stay numpy. Steps proven damaged are named through `warn` and passed over. CheckpointError when no
        step is good, when `step` is not, when a leaf's name, shape or dtype differs from the template's, or when a step
        cannot be read after several tries: that proves no damage, and no older step is taken for it.
        """
        self.wait()
        try:
            on_disk = self._reader.list_steps()
        except (DamagedError, UnreadableError) as error:
            raise self._reader.not_readable("the list of steps", error) from error
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
            except DamagedError as damage:
                self._folder.damaged.add(candidate)
                reasons.append(f"step {candidate}, {damage}")
                if position + 1 < len(candidates):
                    self._warn(f"{reasons[-1]}; falling back to step {candidates[position + 1]}")
            except UnreadableError as error:
                raise self._reader.not_readable(f"step {candidate}", error) from error
        if not reasons:
            return None
        raise CheckpointError(f"no good checkpoint in {self._directory}:\n  " + "\n  ".join(reasons))

    def verify(self, step: int, state: Any) -> None:
        """Read `step` back, some leaves at a time, and compare each with the checksum it was saved with.

        state: the tree that was saved, or its shapes with shardings. Raises CheckpointError unless all is whole.
        """
        self.wait()
        try:
            body = self._reader.read_commit(step)
            for leaves in in_parts(named_leaves(state), VERIFY_BYTES):
                self._reader.read_verified(step, leaves, body)
        except DamagedError as damage:
            self._folder.damaged.add(step)
            raise CheckpointError(f"step {step} of {self._directory} is not whole: {damage}") from damage
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
                f"step {step} of {self._directory} holds another state than the one asked for; "
                f"set the configuration back, or start in another folder:\n{table}"
            )
        stored = self._reader.read_verified(step, leaves, body)
        values = [from_stored(stored[name], leaf) for name, leaf in leaves.items()]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(template), values), body["metadata"])
