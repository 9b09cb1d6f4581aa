"""The checkpoint folder of a run: listing its steps, publishing a new one, and removing old ones.

Only process 0 calls the methods that write. On a local disk, a step is written as `<step>.writing` and then renamed. In
a bucket, where a rename is a copy, a step is written to its final path and becomes valid when commit.json is uploaded.

A step is never deleted because it could not be read. A damaged step, or one that became obsolete when the run resumed
from an earlier step, is set aside as `<step>.damaged` or `<step>.abandoned` (in a bucket, the file `set_aside` marks
it).
"""

import math
import shutil
from collections.abc import Callable
from typing import Any, Literal

from etils import epath

from data.paths import list_names
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
    """The steps of one run on disk. `damaged` holds the steps found damaged since the folder was opened."""

    def __init__(
        self,
        path: epath.Path,
        *,
        local: bool,
        keep_last: int,
        keep_best: int,
        best_mode: Literal["min", "max"],
        log: Callable[[str], None],
        keep_older: int = 0,
    ):
        self.path, self.local, self.damaged = path, local, set[int]()
        self._keep_last, self._keep_best, self._best_mode, self._log = keep_last, keep_best, best_mode, log
        self._keep_older = keep_older

    def step_path(self, step: int) -> epath.Path:
        return self.path / str(step)

    def staging_path(self, step: int) -> epath.Path:
        """Return the path to which the arrays of a step are written."""
        return self.path / f"{step}{STAGING_SUFFIX}" if self.local else self.step_path(step)

    def on_disk(self) -> list[int]:
        return steps_on_disk(self.path)

    def committed(self) -> list[int]:
        return committed_steps(self.path)

    def free_bytes(self) -> float:
        try:
            return shutil.disk_usage(self.path).free if self.local else math.inf
        except OSError:  # unknown; if there is too little, the write itself fails and reports why
            return math.inf

    # ---- writing ----

    def prepare(self) -> None:
        """Create the folder, check that it is writable, and remove leftovers. Raises CheckpointError."""
        probe = self.path / f"probe{STAGING_SUFFIX}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe.write_text("")
            probe.unlink()
        except Exception as error:  # OSError, or an exception class of a bucket's client
            raise CheckpointError(
                f"checkpoints cannot be written to {self.path} ({one_line(error)}); "
                f"choose a folder that can be created and written"
            ) from error
        self.clean_leftovers()

    def clean_leftovers(self) -> None:
        """Remove the leftovers of failed or killed saves. Warn about those that cannot be removed."""
        try:
            names = list_names(self.path)
            leftovers = [name for name in names if STAGING_SUFFIX in name or _ORBAX_STAGING in name]
            if not self.local:
                leftovers += [str(step) for step in self.on_disk() if not self._holds(step, COMMIT_FILE)]
        except Exception as error:
            self._log(f"cannot list leftovers of failed saves in {self.path} ({one_line(error)})")
            return
        for name in leftovers:
            self._remove(name)

    def clear_for(self, step: int) -> None:
        """Invalidate an older save of `step` in a bucket before its files change."""
        if not self.local:
            (self.step_path(step) / COMMIT_FILE).unlink(missing_ok=True)

    def publish(self, step: int, body: dict[str, Any]) -> None:
        """Turn the arrays in `staging_path` into a valid step."""
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
        """Exclude a step from the valid ones without deleting it."""
        if not self.local:
            (self.step_path(step) / ASIDE_FILE).write_text(f"{reason}\n")
            return
        taken = set(list_names(self.path))
        names = (f"{step}.{reason}" + (f"-{count}" if count else "") for count in range(len(taken) + 1))
        self.step_path(step).rename(self.path / next(name for name in names if name not in taken))

    # ---- what is kept ----

    def drop_old(self, newest: int) -> None:
        """Delete steps that keep_last, keep_best and keep_older do not keep. Set aside damaged and later ones.

        A step that cannot be read or removed stays; a failed removal is a warning.
        """
        try:
            self.abandon_after(newest)
            older = [step for step in self.on_disk() if step < newest]
            for step in self.damaged.intersection(older):
                self.set_aside(step, "damaged")
            older = [step for step in older if step not in self.damaged]
        except Exception as error:
            self._log(f"step {newest} is saved, but older steps could not be cleaned up ({one_line(error)})")
            return
        good, unknown = [], []
        for step in older:
            try:
                good += [step] if self._holds(step, COMMIT_FILE) else []
            except Exception:
                unknown.append(step)
        best, unread = self._best([*good, newest])
        keep = {*unknown, *unread, *best, *[*good, newest][-self._keep_last :], *self._anchors(good, newest)}
        for step in older:
            if step not in keep:
                self._remove(str(step), f"step {newest} is saved, but ")

    def abandon_after(self, newest: int) -> None:
        """Set aside the steps after `newest`, from which the run continues."""
        ahead = [step for step in self.on_disk() if step > newest]
        for step in ahead:
            self.set_aside(step, "damaged" if step in self.damaged else "abandoned")
        if ahead:
            self._log(
                f"set aside steps {', '.join(map(str, ahead))}: the run continues from step {newest}; they stay in "
                f"{self.path} but are ignored; delete them when they are not needed"
            )

    def _holds(self, step: int, name: str) -> bool:
        """Return whether a file is in a step's folder. Lists it, because `exists` also returns False for failures."""
        return name in list_names(self.step_path(step))

    def _remove(self, name: str, prefix: str = "") -> None:
        try:
            path = self.path / name
            if path.is_dir():
                path.rmtree()
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            self._log(f"{prefix}{self.path / name} could not be removed ({one_line(error)}); delete it by hand")

    def _anchors(self, good: list[int], newest: int) -> list[int]:
        """Return the newest step that is `keep_older` steps older than `newest`, and the one that will follow it."""
        if not self._keep_older:
            return []
        limit = newest - self._keep_older
        return [*[step for step in good if step <= limit][-1:], *[step for step in good if step > limit][:1]]

    def _best(self, steps: list[int]) -> tuple[list[int], list[int]]:
        """Return (the `keep_best` steps with the best metric, the steps whose metric could not be read)."""
        metrics, unread = {}, []
        for step in steps if self._keep_best else []:
            try:
                metrics[step] = read_body(self.step_path(step), step)["metric"]
            except DamagedError:
                continue  # never the best; keep_last still keeps it if it is recent
            except (UnreadableError, CheckpointError):
                unread.append(step)
        sign = 1 if self._best_mode == "min" else -1
        ranked = sorted((sign * metric, -step) for step, metric in metrics.items() if metric is not None)
        return [-step for _, step in ranked[: self._keep_best]], unread
