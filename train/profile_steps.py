"""The steps that `--profile` names."""

from __future__ import annotations

import re
from typing import NamedTuple

from train.config_io import ConfigError

SKIPPED = 3  # first steps of a start that a number of steps leaves out: they fill caches and pipelines
MOST_STEPS = 100  # of a trace, whose size grows with them


class ProfileSteps(NamedTuple):
    """A range of steps of the run, both ends included; or, without `first`, the number of steps `last`, counted from
    the step SKIPPED + 1 of this start."""

    first: int | None
    last: int

    def __str__(self) -> str:
        return f"{self.last}" if self.first is None else f"{self.first}-{self.last}"

    @classmethod
    def parse(cls, text: str) -> ProfileSteps:
        """Return what a user wrote: N or FIRST-LAST. Raises ConfigError."""
        match = re.fullmatch(r"(?:(\d{1,10})-)?(\d{1,10})", text, re.ASCII)
        if match is None:
            raise ConfigError(f"--profile {text[:40]!r}: not steps. Try a range such as 10-15, or a number such as 5")
        steps = cls(int(match[1]) if match[1] else None, int(match[2]))
        if steps.last < 1 or steps.first == 0:
            raise ConfigError(f"--profile {steps}: steps are counted from 1. Try 1-{max(steps.last, 1)}")
        count = steps.last - (steps.first or 1) + 1
        if count < 1:
            raise ConfigError(f"--profile {steps}: the range ends before it begins. Try {steps.last}-{steps.first}")
        if count > MOST_STEPS:
            fewer = f"{MOST_STEPS}" if steps.first is None else f"{steps.first}-{steps.first + MOST_STEPS - 1}"
            raise ConfigError(f"--profile {steps}: a trace of {count:,} steps is too large. Try {fewer}")
        return steps

    def check(self, total: int) -> None:
        """Raise ConfigError if a run of `total` steps, from its start, does not have these steps."""
        needed = self.last + (SKIPPED if self.first is None else 0)
        if needed > total:
            skipped = f" after the first {SKIPPED}" if self.first is None else ""
            hint = f"Try --profile 1-{min(total, MOST_STEPS)}, or a longer run (--set train.steps={needed})"
            raise ConfigError(f"--profile {self}: the run has {total} steps, and not these{skipped}. {hint}")

    def after(self, step: int, total: int) -> tuple[int, int] | None:
        """Return the first and last step to trace in a start after `step` of `total` steps, or None if none is left."""
        begin = step + SKIPPED if self.first is None else 0  # from which steps are counted
        first, last = max(self.first or begin + 1, step + 1), min(begin + self.last, total)
        return (first, last) if first <= last else None
