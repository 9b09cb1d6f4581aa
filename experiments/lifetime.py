"""The whole life of a run: the wall time of all its starts by phase, what restarts cost, and its goodput.

Goodput is the share of productive step time in the wall time, and badput the rest, as ML Goodput Measurement defines
them. A step is productive if no later start repeated it. Time in which steps wait for data is not productive.

A process that is killed writes nothing at its death. The rows on disk say how far it came: its last row gives its last
step and the end of its time. What it did after that row counts as down time. So the repeated steps are exact to
`train.log_every` steps, and for a run in a bucket to those of the last 30 s, which were not uploaded yet. The time
between the last row of the account and the last row of all counts as steps.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.progress import duration
from train.run_folder import read_metrics

Row = Mapping[str, Any]

PHASES = {
    "steps": "training steps (productive)",
    "repeated": "wasted progress: repeated steps",
    "down": "down time after a failure",
    "data_wait": "waiting for data",
    "checkpoints": "checkpoints",
    "evaluation": "evaluation and samples",
    "compilation": "compilation of the train step",
    "initialization": "initialization or restore",
    "startup": "start of the process and devices",
    "data": "data preparation",
    "profile": "profiling",
    "other": "other",
}
RESTART_PHASES = ("startup", "data", "initialization", "compilation")  # that a restart pays once more


class Start(NamedTuple):
    """One start of a run: a process from its command to its end. Times are unix seconds."""

    began: float
    ended: float  # of the last row
    first: int  # step that it started from
    last: int  # last step that is recorded
    orderly: bool  # finished, or stopped on request
    restart: bool  # started by the launcher, after the one before it ended
    seconds: dict[str, float]  # by phase
    step_seconds: dict[int, float]  # of training until a step, where that is recorded
    memory: dict[str, int]  # bytes per device of the train step

    def wasted(self, kept: int) -> float:
        """Return the seconds of the steps after `kept`, interpolated between the recorded ones."""
        steps = sorted(self.step_seconds)
        return self.seconds.get("steps", 0.0) - float(np.interp(kept, steps, [self.step_seconds[s] for s in steps]))


class Lifetime(NamedTuple):
    """All starts of a run together."""

    starts: int
    restarts: int  # starts that followed a failure, or that the launcher made
    repeated_steps: int
    seconds: dict[str, float]  # by phase, in the order of PHASES
    restart_loss: float  # seconds: wasted progress, down time, and what restarts prepared once more
    paused: float  # seconds between starts that users chose; not in the wall time

    @property
    def wall(self) -> float:
        """Seconds of wall time, without pauses."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float | None:
        """Productive step time / wall time."""
        return self.seconds["steps"] / self.wall if self.wall > 0 else None


def read_lifetime(metrics: str | os.PathLike) -> Lifetime:
    """Return the life of the run with this metrics.jsonl. Raises RunFolderError."""
    return lifetime(starts_of(read_metrics(metrics, superseded=True)))


def starts_of(rows: Iterable[Row]) -> list[Start]:
    """Return the starts of a run, the first one first, from all rows of metrics.jsonl, superseded ones included."""
    rows = list(rows)
    accounts: dict[float, list[Row]] = {}
    for row in rows:
        if row["kind"] == "goodput":
            accounts.setdefault(float(row["start"]["time"]), []).append(row)
    begins = sorted(accounts)
    later: dict[float, list[Row]] = {began: [] for began in begins}
    for row in rows:
        if isinstance(row.get("time"), float | int) and (i := bisect.bisect_right(begins, row["time"])):
            later[begins[i - 1]].append(row)
    return [_start(began, accounts[began], later[began]) for began in begins]


def _start(began: float, accounts: Sequence[Row], rows: Sequence[Row]) -> Start:
    """Return a start from its accounts, of which the last one counts, and its rows."""
    account = accounts[-1]
    seconds = {name: float(value) for name, value in account["seconds"].items() if name != "wall"}
    memory = {str(name): int(value) for name, value in account.get("memory", {}).items()}
    first, counted = int(account["start"]["step"]), int(account["step"])
    if rewinds := [row for row in rows if row.get("event") == "rewound"]:
        # No later start repeats the steps that this one undid.
        step, time = int(rewinds[-1]["step"]), rewinds[-1]["time"]
        accounts = [row for row in accounts if row["step"] <= step or row["time"] >= time]
        rows = [row for row in rows if row["kind"] != "train" or row["time"] >= time]
        counted = counted if account in accounts else step
    last = max([counted, *(row["step"] for row in rows if row["kind"] == "train" and isinstance(row.get("step"), int))])
    until = account.get("time", began + sum(seconds.values()))
    ended = max([until, *(row["time"] for row in rows)])
    if ended > until:
        name = "steps" if last > counted else "other"
        seconds[name] = seconds.get(name, 0.0) + ended - until
    step_seconds = {first: 0.0} | {int(row["step"]): float(row["seconds"].get("steps", 0.0)) for row in accounts}
    step_seconds[last] = seconds.get("steps", 0.0)
    orderly = any(row["kind"] == "final" or row.get("event") == "stopped" for row in rows)
    restart = bool(account["start"].get("restart"))
    return Start(began, ended, first, last, orderly, restart, seconds, step_seconds, memory)


def lifetime(starts: Sequence[Start]) -> Lifetime:
    """Add the starts up. The time of steps that a later start repeated counts as "repeated"."""
    total = dict.fromkeys(PHASES, 0.0)
    repeated_steps, restarts, paused, prepared = 0, 0, 0.0, 0.0
    for i, start in enumerate(starts):
        for name, seconds in start.seconds.items():
            total[name if name in total else "other"] += seconds
        if i > 0:
            before = starts[i - 1]
            gap = max(start.began - before.ended, 0.0)
            if before.orderly and not start.restart:
                paused += gap
            else:
                restarts += 1
                total["down"] += gap
                prepared += sum(start.seconds.get(name, 0.0) for name in RESTART_PHASES)
        kept = min([start.last, *(each.first for each in starts[i + 1 :])])
        lost = start.last - max(kept, min(start.first, start.last))
        if lost > 0:
            wasted = start.wasted(start.last - lost)
            total["repeated"] += wasted
            total["steps"] -= wasted
            repeated_steps += lost
    loss = total["repeated"] + total["down"] + prepared
    return Lifetime(len(starts), restarts, repeated_steps, total, loss, paused)


def summary(life: Lifetime) -> str:
    """Return one sentence on the goodput, and one on restarts if there were any."""
    text = f"Goodput {life.goodput or 0:.1%}: productive step time in {duration(life.wall)} of wall time"
    text += f" over {life.starts} starts." if life.starts > 1 else "."
    if life.restarts:
        text += (
            f" Restart loss {duration(life.restart_loss)}: {life.restarts} "
            f"restart{'s' if life.restarts > 1 else ''}, {life.repeated_steps} steps repeated."
        )
    if life.paused >= 1:
        text += f" Pauses of {duration(life.paused)} between starts are not counted."
    return text


def life_lines(life: Lifetime) -> list[str]:
    """Return the summary and the table of phases as lines of text; nothing for a run without an account."""
    if not life.wall > 0:
        return []
    width = max(map(len, PHASES.values()))
    return [
        summary(life),
        *(
            f"  {PHASES[name]:<{width}}  {duration(seconds):>9}  {seconds / life.wall:6.1%}"
            for name, seconds in life.seconds.items()
            if seconds > 0
        ),
    ]
