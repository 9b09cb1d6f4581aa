"""Joint reads of a checkpoint by all processes: a step is intact, proven damaged, or unreadable after several tries."""

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

# Status codes by which TensorStore reports trouble with a file system rather than with the data in it.
_TRANSIENT = re.compile(
    r"\b(PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|UNKNOWN|"
    r"INTERNAL)\b"
)


# ---- agreement of the processes ----


def process_zero() -> bool:
    return jax.process_index() == 0


def _largest(code: int) -> int:
    """Return the largest code of all processes. A collective with several processes, free with one."""
    return code if jax.process_count() == 1 else int(np.max(multihost_utils.process_allgather(np.int32(code))))


def all_agree(ok: bool) -> bool:
    """Return, on every process, whether `ok` is True on all of them."""
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
    """Reads the steps of one folder. `retry_waits`: seconds before each retry of a failed read.

    Raises DamagedError if one process has proof of damage, and UnreadableError if one could not finish reading. All
    processes raise the same error, so that they fall back or stop together.
    """

    def __init__(
        self, folder: CheckpointFolder, handler: ocp.PyTreeCheckpointHandler, retry_waits: Sequence[float], *,
        per_process: bool = False,
    ):  # fmt: skip
        self._folder, self._handler, self._retry_waits = folder, handler, tuple(retry_waits)
        self._per_process = per_process

    def list_steps(self) -> list[int]:
        """Return the steps that process 0 finds, intact or not, in ascending order.

        If every process has its own folder, these are the steps that all of them find.
        """

        def on_disk() -> list[int]:
            with reading("the folder"):
                return self._folder.on_disk() if process_zero() or self._per_process else []

        found = self._jointly(on_disk)
        steps = _from_process_zero(found)
        return [step for step in steps if all_agree(step in found)] if self._per_process else steps

    def read_commit(self, step: int) -> dict[str, Any]:
        """Return the body of a step's commit.json after checking it and the files that it lists."""
        return self._jointly(lambda: read_commit(self._folder.step_path(step), step))

    def not_readable(self, what: str, error: Exception) -> CheckpointError:
        """Return the error for a user who must fix a disk, a network or a permission."""
        return CheckpointError(
            f"{what} in {self._folder.path} could not be read in {len(self._retry_waits) + 1} tries: {error}. That "
            f"proves no damage: nothing was deleted and no older step was used. Check permissions, disk and network, "
            f"then start the same command again"
        )

    def read_verified(self, step: int, leaves: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
        """Return the arrays of these leaves after comparing their checksums with those in `body`."""
        try:
            stored = self._jointly(lambda: self._read_arrays(step, leaves))
        except UnreadableError as error:
            # TensorStore raises the same types for damage and for a failing disk. If every file can be read to its end
            # and the arrays still cannot be restored, the files are damaged.
            part = slice(None) if self._per_process else slice(jax.process_index(), None, jax.process_count())
            self._jointly(lambda: read_files(self._folder.step_path(step), step, part))
            if all_agree(not _TRANSIENT.search(str(error))):
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
            raise  # a fault of the machine, not of the checkpoint
        except Exception as error:  # TensorStore raises generic types such as ValueError
            message = str(error)
            named = max((name for name in leaves if name in message), key=len, default="arrays")
            raise UnreadableError(f"{named}: cannot be read ({one_line(error)})") from error

    def _jointly(self, read: Callable[[], Any]) -> Any:
        """Return `read()` on every process; if any process cannot read, all of them wait and try again.

        Raises DamagedError or UnreadableError on all processes if the last attempt of one of them raised it.
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
    """Yield the leaves in groups of at most `most_bytes`; a larger leaf is a group of one."""
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
