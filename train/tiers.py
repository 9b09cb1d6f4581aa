"""Checkpoints in two tiers: often on the disk of each host, more rarely in the run's folder.

A process that dies on a host that lives on continues from the local tier. It is of no use when a host is lost, because
every host holds only the arrays on its devices. A local step therefore counts only if every process has it.
"""

import os
import secrets
from typing import Any

import jax

from data.paths import parse_path, write_whole
from train.checkpoint import Checkpointer, CheckpointError, Restored
from train.checkpoint_reader import all_agree, process_zero
from train.commit import one_line
from train.run_folder import RunFolder

LARGEST = 2**31 - 1  # steps are counted in 32 bits


class TieredCheckpointer(Checkpointer):
    """A Checkpointer of `directory` that also saves to `local_directory`, on the disk of each host.

    A step that is a multiple of `every`, or is saved with `wait`, goes to `directory`, any other to `local_directory`.
    `restore` takes the newest step of both that every process can read. The other arguments are those of Checkpointer,
    and apply to `directory`; one step is kept in `local_directory`.
    """

    def __init__(self, directory: str | os.PathLike, local_directory: str | os.PathLike, *, every: int, **options: Any):
        super().__init__(directory, **options)
        self._every = every
        place = parse_path(local_directory) / f"process_{jax.process_index()}_of_{jax.process_count()}"
        self._local = Checkpointer(place, keep_last=1, log=self._log, per_process=True)

    def save(
        self, step: int, state: Any, *, metadata: dict[str, Any], metric: float | None = None, wait: bool = False
    ) -> bool:
        if wait or step % self._every == 0:
            return super().save(step, state, metadata=metadata, metric=metric, wait=wait)
        self.wait()
        return self._local.save(step, state, metadata=metadata, metric=metric)

    def wait(self) -> bool:
        """Wait for the saves in progress. Return whether the one in `directory` succeeded on every process."""
        self._local.wait()
        return super().wait()

    def close(self, *, abandon: bool = False) -> None:
        self._local.close(abandon=abandon)
        super().close(abandon=abandon)

    def restore(
        self, template: Any, *, step: int | None = None, at_most: int | None = None, part: bool = False
    ) -> Restored | None:
        local = self._newest_local() if step is None and at_most is None else None
        shared = None if local is None else self.newest(LARGEST)
        if local is not None and (shared is None or local > shared):
            if (found := self._restore_local(local, template, part)) is not None:
                return found
            local = None
        restored = super().restore(template, step=step, at_most=at_most, part=part)
        if local is not None and restored is not None and local > restored.step:  # newer shared steps are damaged
            return self._restore_local(local, template, part) or restored
        self._local.continue_from(0 if restored is None else restored.step)
        return restored

    def _restore_local(self, step: int, template: Any, part: bool) -> Restored | None:
        try:
            restored = self._local.restore(template, step=step, part=part)
        except CheckpointError as error:
            self._log(f"the local checkpoint of step {step} cannot be used ({one_line(error)})")
            return None
        self.continue_from(step)
        return restored

    def abandon_after(self, step: int) -> None:
        self._local.abandon_after(step)  # first: a start after a crash in between must not find it the newest
        super().abandon_after(step)

    def _newest_local(self) -> int | None:
        try:
            return self._local.newest(LARGEST)
        except CheckpointError as error:
            self._log(f"the local checkpoints cannot be used ({one_line(error)})")
            return None


def local_folder(run: RunFolder, directory: str) -> str:
    """Return the folder of a run below `directory`. Its name has an identifier that the run's folder keeps.

    Without that, a new run would continue from the local steps of an older one of the same name. Every process calls
    this.
    """
    if process_zero() and not run.local_id.exists():
        write_whole(run.local_id, f"{secrets.token_hex(8)}\n")
    all_agree(True)  # wait until the file is there for every process
    return os.path.join(directory, f"{run.path.name}-{run.local_id.read_text().strip()}")
