"""Reading checkpoints on all processes together: a step is whole, proven damaged, or not readable in several tries."""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.checkpoint_folder import CheckpointFolder
from train.commit import CheckpointError, DamagedError, UnreadableError, one_line, read_commit, read_files, reading
from train.leaves import checksums, restore_args, stored_struct

# What TensorStore reports of a file system, and not of the data in it.
_PASSING = re.compile(
    r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|UNKNOWN|"
    r"INTERNAL)\b"
)


# ---- agreement of the processes ----


def process_zero() -> bool:
    return jax.process_index() == 0


def _largest(code: int) -> int:
    """Return the largest of all processes' codes. A collective under several processes, free with one."""
    return code if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(code))))


def all_agree(ok: bool) -> bool:
    """Return True on every process when every process says True."""
    return _largest(0 if ok else 1) == 0


def _from_process_zero(steps: list[int]) -> list[int]:
    """Return process 0's list on every process."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.asarray(steps if process_zero() else [0] * count, np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded)]


# ---- reading ----


class CheckpointReader:
    """Reads steps of one folder. `retry_waits`: seconds before each further try of what could not be read.

    Raises DamagedError where one process has proof of damage, UnreadableError where one could not read to the end;
    each on all processes, so that all of them fall back, or stop, together.
    """

    def __init__(self, folder: CheckpointFolder, handler: ocp.PyTreeCheckpointHandler, retry_waits: Sequence[float]):
        self._folder, self._handler, self._retry_waits = folder, handler, tuple(retry_waits)

    def list_steps(self) -> list[int]:
        """Return the steps that process 0 sees, whole or not, in ascending order."""

        def on_disk() -> list[int]:
            with reading("the folder"):
                return self._folder.on_disk() if process_zero() else []

        return _from_process_zero(self._jointly(on_disk))

    def read_commit(self, step: int) -> dict[str, Any]:
        """Return the body of a step's commit.json after checking it and its files."""
        return self._jointly(lambda: read_commit(self._folder.step_path(step), step))

    def not_readable(self, what: str, error: Exception) -> CheckpointError:
        """Return the error for a user who must mend a disk, a network or a permission."""
        return CheckpointError(
            f"{what} in {self._folder.path} could not be read in {len(self._retry_waits) + 1} tries: {error}. That "
            f"proves no damage: nothing was deleted and no older step was taken. Check permissions, disk and network, "
            f"then start the same command again"
        )

    def read_verified(self, step: int, leaves: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays of these leaves, whose checksums are those of `body`."""
        try:
            stored = self._jointly(lambda: self._read_arrays(step, leaves))
        except UnreadableError as error:
            # TensorStore reports damage and a failing disk with the same types: files that can be read to their ends
            # and still hold no arrays are damaged.
            part = slice(jax.process_index(), None, jax.process_count())
            self._jointly(lambda: read_files(self._folder.step_path(step), step, part))
            if all_agree(not _PASSING.search(str(error))):
                raise DamagedError(str(error)) from error
            raise
        found = checksums(stored)
        self._jointly(lambda: _refuse([name for name in leaves if found[name] != body["leaves"][name]["checksum"]]))
        return stored

    def _read_arrays(self, step: int, leaves: dict[str, Any]) -> dict[str, Any]:
        filled = {name: leaf for name, leaf in leaves.items() if math.prod(leaf.shape)}
        empty = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items() if name not in filled}
        if not filled:
            return empty
        args = ocp.args.PyTreeRestore(
            item={name: stored_struct(leaf) for name, leaf in filled.items()},
            restore_args={name: restore_args(leaf) for name, leaf in filled.items()},
            partial_restore=True,
        )
        try:
            return self._handler.restore(self._folder.step_path(step), args=args) | empty
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the machine's trouble, not the checkpoint's
        except Exception as error:  # TensorStore reports what it meets with bare types
            message = str(error)
            named = max((name for name in leaves if name in message), key=len, default="arrays")
            raise UnreadableError(f"{named}: cannot be read ({one_line(error)})") from error

    def _jointly(self, read: Callable[[], Any]) -> Any:
        """`read()` on every process, again after a while where one of them cannot read; they fail together.

        Raises DamagedError or UnreadableError on all processes when one of them met it in the end.
        """
        waits = list(self._retry_waits)
        while True:
            value, problem = None, None
            try:
                value = read()
            except (DamagedError, UnreadableError) as error:
                problem = error
            worst = _largest(0 if problem is None else 1 if isinstance(problem, DamagedError) else 2)
            if worst == 0:
                return value
            if worst == 1:
                raise problem or DamagedError("another process found it damaged")
            if not waits:
                raise problem if isinstance(problem, UnreadableError) else UnreadableError("on another process")
            time.sleep(waits.pop(0))


def _refuse(wrong: list[str]) -> None:
    if wrong:
        more = f" (and {len(wrong) - 1} more leaves)" if len(wrong) > 1 else ""
        raise DamagedError(f"{wrong[0]}: checksum mismatch{more}")


def in_parts(leaves: dict[str, Any], most_bytes: int) -> Iterator[dict[str, Any]]:
    """Yield the leaves in groups of at most `most_bytes`, or of a single leaf."""
    group: dict[str, Any] = {}
    size = 0
    for name, leaf in leaves.items():
        struct = stored_struct(leaf)
        if group and size + struct.size * struct.dtype.itemsize > most_bytes:
            yield group
            group, size = {}, 0
        group[name] = leaf
        size += struct.size * struct.dtype.itemsize
    if group:
        yield group
