"""What each process of a run does now, and which process the others wait for.

The trainer records its activity here, and each process publishes a `Report` of it with every beat
(train/peer_watch.py). In synchronous training all processes have the same time per step, so a slow host does not show
there. It shows in the time that its process spends outside of the device: reading data, and running hooks.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, get_args

# In the order of a step. After "step", all activities are those between two steps.
Doing = Literal["start", "step", "hooks", "evaluation", "checkpoint", "data"]
ORDER: tuple[str, ...] = get_args(Doing)
PHRASES = {
    "start": "has been starting", "step": "has waited for the result of a step", "hooks": "has run hooks",
    "evaluation": "has been evaluating", "checkpoint": "has been saving", "data": "has been reading its data",
}  # fmt: skip
ON_HOST = {"data": "to read its data", "hooks": "for hooks and logs"}  # activities that use no device
SLOW_SHARE = 0.25  # of the time, that a straggler spends on its host in excess of the others
IDLE_SHARE = 0.1  # of the time; a process that waits longer for its device does not delay the others


@dataclasses.dataclass(frozen=True)
class Report:
    """The activity of one process at one moment."""

    host: str
    doing: str = "start"  # one of ORDER
    step: int = 0  # last step that was dispatched
    dispatched: int = 0  # steps by this process since its start
    seconds: float = 0.0  # of the present activity
    spent: Mapping[str, float] = dataclasses.field(default_factory=dict)  # seconds since the start, by activity

    def text(self) -> str:
        """Return the report as one line of JSON."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def parse(text: str) -> Report:
        """Return the report of a line from `text()`."""
        return Report(**json.loads(text))


class Activity:
    """Records what the main thread of this process does; any thread may ask for a `report`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._lock = clock, threading.Lock()
        self._doing, self._step, self._dispatched, self._since = "start", 0, 0, clock()
        self._spent = dict.fromkeys(ORDER, 0.0)

    def begin(self, doing: Doing, step: int) -> None:
        """Record that `doing` begins, which ends the activity before it. `step`: the last one dispatched."""
        with self._lock:
            now = self._clock()
            self._spent[self._doing] += now - self._since
            self._doing, self._step, self._since = doing, step, now
            self._dispatched += doing == "step"

    def report(self, host: str) -> Report:
        """Return the report of this moment."""
        with self._lock:
            seconds = self._clock() - self._since
            spent = {**self._spent, self._doing: self._spent[self._doing] + seconds}
            return Report(
                host, self._doing, self._step, self._dispatched, round(seconds, 3),
                {name: round(value, 3) for name, value in spent.items()},
            )  # fmt: skip


activity = Activity()  # of this process


def name_processes(indices: Sequence[int], hosts: Mapping[int, str]) -> str:
    """Return "process 2 (host w-2)", or "processes 1 (host w-1), 2 (host w-2)". A host may be unknown."""
    each = ", ".join(f"{index} (host {hosts[index]})" if hosts.get(index) else str(index) for index in indices)
    return f"process{'' if len(indices) == 1 else 'es'} {each}"


def behind(reports: Mapping[int, Report], silent: Collection[int] = ()) -> str:
    """Return a sentence that names the processes for which the others wait, those that have come least far.

    `silent`: processes that send no beats. Without a difference, a device or the network between hosts hangs.
    """
    places = {index: (report.step, ORDER.index(report.doing)) for index, report in reports.items()}
    first, last = min(places.values()), max(places.values())
    if first == last:
        ((doing, step), *_) = {(report.doing, report.step) for report in reports.values()}
        return f"every process has dispatched step {step} and {PHRASES[doing]}: a device or the network hangs"
    found = []
    for index in sorted(index for index, place in places.items() if place == first):
        report = reports[index]
        who = name_processes([index], {index: report.host})
        if index in silent:
            found.append(f"{who} sends no heartbeat, and last reported step {report.step}")
        else:
            spent = f"{PHRASES[report.doing]} for {report.seconds:.0f} s"
            found.append(f"{who} last dispatched step {report.step} and {spent}")
    return f"{'; '.join(found)}; the others have come to step {last[0]}"


def straggler(before: Mapping[int, Report], now: Mapping[int, Report], *, hidden: bool) -> str | None:
    """Return a sentence that names the process that has delayed the others most since `before`, or None.

    A straggler spends SLOW_SHARE more of the time on its host than the median of the other processes. `hidden`: the
    device computes while the host works, so that a process which still waits for its device delays nobody.
    """
    found: list[tuple[float, str]] = []
    spent = {
        index: {name: now[index].spent[name] - before[index].spent[name] for name in ORDER}
        for index in now.keys() & before.keys()
    }
    for index, mine in spent.items():
        window = sum(mine.values())
        others = [seconds for other, seconds in spent.items() if other != index]
        if not others or window <= 0 or (hidden and mine["step"] > IDLE_SHARE * window):
            continue
        for name, purpose in ON_HOST.items():
            usual = statistics.median(other[name] for other in others)
            excess = (mine[name] - usual) / window
            if excess > SLOW_SHARE:
                who = name_processes([index], {index: now[index].host})
                if steps := now[index].dispatched - before[index].dispatched:
                    text = (
                        f"{who} takes {mine[name] / steps:.2f} s a step {purpose}, the others "
                        f"{usual / steps:.2f} s; all wait for it"
                    )
                else:
                    text = f"{who} {PHRASES[name]} for {mine[name]:.0f} s; all wait for it"
                found.append((excess, text))
    return max(found)[1] if found else None
