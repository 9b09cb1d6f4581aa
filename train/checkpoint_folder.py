"""The folder of a run's checkpoints: what is on disk, how a step appears in it, and which steps are kept.

Process 0 alone calls what writes here. On a local disk a step is written as `<step>.writing` and renamed. In a bucket,
where a rename is a copy, it is written to its final place, and counts from the upload of commit.json on.
Nothing is deleted because it could not be read: a step found damaged, or left behind by a return to an earlier one, is
set aside as `<step>.damaged` or `<step>.abandoned` (in a bucket: marked by the file `set_aside`).
"""

import math
import shutil
from collections.abc import Callable
from typing import Any, Literal

from etils import epath

from data.paths import forget_listings, list_names
from train.commit import (
    ASIDE_FILE,
    COMMIT_FILE,
    CheckpointError,
    DamagedError,
    UnreadableError,
    committed_steps,
    one_line,
    read_body,
    steps_on_disk,
    write_commit,
)

STAGING_SUFFIX = ".writing"
_ORBAX_STAGING = ".orbax-checkpoint-tmp"


class CheckpointFolder:
    """Steps of one run on disk. `damaged` holds the steps that were found damaged since the folder was opened."""

    def __init__(
        self,
        path: epath.Path,
        *,
        local: bool,
        keep_last: int,
        keep_best: int,
        best_mode: Literal["min", "max"],
        warn: Callable[[str], None],
    ):
        self.path, self.local, self.damaged = path, local, set[int]()
        self._keep_last, self._keep_best, self._best_mode, self._warn = keep_last, keep_best, best_mode, warn

    def step_path(self, step: int) -> epath.Path:
        return self.path / str(step)

    def staging_path(self, step: int) -> epath.Path:
        """Return where the arrays of a step are written."""
        return self.path / f"{step}{STAGING_SUFFIX}" if self.local else self.step_path(step)

    def on_disk(self) -> list[int]:
        return steps_on_disk(self.path)

    def committed(self) -> list[int]:
        return committed_steps(self.path)

    def free_bytes(self) -> float:
        try:
            return shutil.disk_usage(self.path).free if self.local else math.inf
        except OSError:  # unknown: the write itself will fail, and say why
            return math.inf

    # ---- writing ----

    def prepare(self) -> None:
        """Create the folder, try to write in it, remove leftovers. Raises CheckpointError."""
        probe = self.path / f"probe{STAGING_SUFFIX}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except Exception as error:  # OSError, or what the client of a bucket raises
            raise CheckpointError(
                f"checkpoints cannot be written to {self.path} ({one_line(error)}); "
                f"choose a folder that can be created and written"
            ) from error
        self.clean_leftovers()

    def clean_leftovers(self) -> None:
        """Remove what saves that failed or were killed have left; one that cannot be removed is a warning."""
        try:
            names = list_names(self.path)
            leftovers = [name for name in names if STAGING_SUFFIX in name or _ORBAX_STAGING in name]
            if not self.local:
                leftovers += [str(step) for step in self.on_disk() if not self._holds(step, COMMIT_FILE)]
        except Exception as error:
            self._warn(f"leftovers of failed saves in {self.path} could not be listed ({one_line(error)})")
            return
        for name in leftovers:
            self._remove(name)

    def clear_for(self, step: int) -> None:
        """Make room for a save of `step` in a bucket: an older save of it stops counting before its files change."""
        if not self.local:
            (self.step_path(step) / COMMIT_FILE).unlink(missing_ok=True)

    def publish(self, step: int, body: dict[str, Any]) -> None:
        """Turn the arrays in `staging_path` into a step that counts."""
        staging, final = self.staging_path(step), self.step_path(step)
        write_commit(staging, body)
        if staging != final:
            if step in self.damaged and final.exists():
                self.set_aside(step, "damaged")
            elif final.exists():
                final.rmtree()
            staging.rename(final)
        self.damaged.discard(step)

    def set_aside(self, step: int, reason: Literal["damaged", "abandoned"]) -> None:
        """Take a step out of the count without deleting it."""
        if not self.local:
            (self.step_path(step) / ASIDE_FILE).write_text(f"{reason}\n")
            return
        taken = set(list_names(self.path))
        names = (f"{step}.{reason}" + (f"-{count}" if count else "") for count in range(len(taken) + 1))
        self.step_path(step).rename(self.path / next(name for name in names if name not in taken))

    # ---- what is kept ----

    def drop_old(self, newest: int) -> None:
        """Delete what neither keep_last nor keep_best holds; set aside damaged steps and steps ahead of `newest`.

        A step that cannot be read, or cannot be removed, stays, with a warning.
        """
        try:
            steps = [step for step in self.on_disk() if step != newest]
            aside = [step for step in steps if step > newest or step in self.damaged]
            for step in aside:
                self.set_aside(step, "damaged" if step in self.damaged else "abandoned")
            if ahead := [step for step in aside if step > newest]:
                self._warn(
                    f"set aside steps {', '.join(map(str, ahead))}: step {newest}, just saved, continues an earlier "
                    f"one; they stay in {self.path} and no longer count, delete them when they are not needed"
                )
            older = [step for step in steps if step < newest and step not in aside]
        except Exception as error:
            self._warn(f"step {newest} is saved, but older steps could not be cleaned up ({one_line(error)})")
            return
        good, unknown = [], []
        for step in older:
            try:
                good += [step] if self._holds(step, COMMIT_FILE) else []
            except Exception:
                unknown.append(step)
        best, unread = self._best([*good, newest])
        keep = {*unknown, *unread, *best, *[*good, newest][-self._keep_last :]}
        for step in older:
            if step not in keep:
                self._remove(str(step), f"step {newest} is saved, but ")

    def _holds(self, step: int, name: str) -> bool:
        """Return whether a file is in a step's folder, by listing it: `exists` says False for what it cannot see."""
        return name in list_names(self.step_path(step))

    def _remove(self, name: str, prefix: str = "") -> None:
        try:
            path = self.path / name
            forget_listings(path)
            if path.is_dir():
                path.rmtree()
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            self._warn(f"{prefix}{self.path / name} could not be removed ({one_line(error)}); delete it by hand")

    def _best(self, steps: list[int]) -> tuple[list[int], list[int]]:
        """Return (the best `keep_best` steps by their metric, the steps whose metric could not be read)."""
        metrics, unread = {}, []
        for step in steps if self._keep_best else []:
            try:
                metrics[step] = read_body(self.step_path(step), step)["metric"]
            except DamagedError:
                continue  # never the best; keep_last still holds it if it is recent
            except (UnreadableError, CheckpointError):
                unread.append(step)
        sign = 1 if self._best_mode == "min" else -1
        ranked = sorted((sign * metric, -step) for step, metric in metrics.items() if metric is not None)
        return [-step for _, step in ranked[: self._keep_best]], unread
