"""Reader of profiler traces: which operations of the devices took how much time.

    profile = jax.profiler.ProfileData.from_file("steps.xplane.pb")
    lines = table(read_trace(profile))

The reader needs only the names that XLA's profiler gives to planes, lines and stats:

    "/device:TPU:0", line "XLA Ops"     operations of a TensorCore, in stat `hlo_category` their category
    "/device:GPU:0", lines "Stream #7"  kernels, with the operation in stat `hlo_op`, and copies without it
    "/host:CPU", all lines              operations of simulated devices, with stats `hlo_op` and `device_ordinal`
    "/host:CPU", events "train"         the annotated steps, with stat `step_num`

The time of an operation is its self time: without the operations that start while it runs, as those of a loop's body
do.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from train.operation_kinds import KINDS, Instruction, kind_of

STEP = "train"  # name of the annotation of a step
TOP = 15  # operations in a table
DEVICE = re.compile(r"/device:(TPU|GPU):(\d+)")
HOST = "/host:CPU"
WIDTH = 44  # characters of an operation's source in a table


class Event(NamedTuple):
    """An operation that ran once on a device. Times are in nanoseconds."""

    name: str
    category: str  # that the trace gives, or ""
    module: str  # program that it belongs to, or ""
    start: float
    end: float


class Operation(NamedTuple):
    """All runs of one operation, on all devices."""

    name: str
    kind: str
    seconds: float  # self time
    runs: int
    source: str = ""  # path of the JAX operation


class Breakdown(NamedTuple):
    """Where the time of the devices of one host went."""

    steps: tuple[int, ...]  # the annotated steps
    devices: int
    window: float  # seconds from the first operation to the end of the last one
    operations: tuple[Operation, ...]  # the longest first
    idle: float  # seconds without an operation, summed over devices

    @property
    def total(self) -> float:
        """Seconds of all devices: idle, and of all operations. What overlaps on two streams of a GPU counts twice."""
        return self.idle + sum(each.seconds for each in self.operations)

    def kinds(self) -> dict[str, float]:
        """Return the seconds of each kind that occurs, in the order of KINDS."""
        found = dict.fromkeys(KINDS, 0.0) | {"idle": self.idle}
        for each in self.operations:
            found[each.kind] += each.seconds
        return {kind: seconds for kind, seconds in found.items() if seconds > 0}


def read_trace(
    profile: Any, module: str = "", instructions: Mapping[str, Instruction] | None = None
) -> Breakdown | None:
    """Return the breakdown of a trace (`jax.profiler.ProfileData`, or an object like it), or None without operations.

    `instructions` of the program `module` (train/operation_kinds.py) say what its operations compute. The category in
    the trace, or else the name, gives the kind of all others.
    """
    instructions = instructions or {}
    lines = _device_lines(profile)
    if not lines:
        return None
    seconds: dict[tuple[str, str, str], float] = defaultdict(float)
    counts: dict[tuple[str, str, str], int] = defaultdict(int)
    busy: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for device, events in lines:
        for event, own in self_times(events):
            key = event.name, event.category, event.module
            seconds[key] += own / 1e9
            counts[key] += 1
        busy[device] += [(event.start, event.end) for event in events]
    begin = min(start for spans in busy.values() for start, _ in spans)
    end = max(stop for spans in busy.values() for _, stop in spans)
    idle = sum((end - begin) - covered(spans) for spans in busy.values()) / 1e9
    operations = []
    for (name, category, of), own in seconds.items():
        known = instructions.get(name) if of in ("", module) else None
        kind = known.kind if known and (not category or known.kind != "other") else kind_of(category or name)
        operations.append(Operation(name, kind, own, counts[name, category, of], known.source if known else ""))
    operations.sort(key=lambda each: (-each.seconds, each.name))
    return Breakdown(_steps(profile), len(busy), (end - begin) / 1e9, tuple(operations), max(idle, 0.0))


def self_times(events: Sequence[Event]) -> Iterator[tuple[Event, float]]:
    """Yield each event with the nanoseconds in which it was the latest one to start of those that ran.

    So the time of a loop excludes its body, and all times add up to the time in which anything ran.
    """
    ordered = sorted(events, key=lambda event: (event.start, -event.end))
    own = [0.0] * len(ordered)
    running: list[int] = []  # a heap of negative indices, whose first is the latest event to start
    reached = 0.0

    def advance(until: float) -> None:
        nonlocal reached
        while running and reached < until:
            latest = -running[0]
            end = ordered[latest].end
            if end > reached:
                own[latest] += min(end, until) - reached
                reached = min(end, until)
            if end <= reached:
                heapq.heappop(running)

    for i, event in enumerate(ordered):
        advance(event.start)
        reached = max(reached, event.start)
        heapq.heappush(running, -i)
    advance(float("inf"))
    yield from zip(ordered, own, strict=True)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# ---- planes and lines ----


def _device_lines(profile: Any) -> list[tuple[str, list[Event]]]:
    """Return (device, events) of TPUs, else of every stream of GPUs, else of the simulated devices of the CPU."""
    found: dict[str, list[tuple[str, list[Event]]]] = {"TPU": [], "GPU": [], "CPU": []}
    for plane in profile.planes:
        if match := DEVICE.fullmatch(plane.name):
            is_operations = (lambda name: name == "XLA Ops") if match[1] == "TPU" else _is_stream
            for line in plane.lines:
                if is_operations(line.name) and (events := [_device_event(event) for event in line.events]):
                    found[match[1]].append((plane.name, events))
        elif plane.name == HOST:
            by_device: dict[str, list[Event]] = defaultdict(list)  # one thread may wait for work of another one
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats) if event.duration_ns > 0 else {}
                    if "hlo_op" in stats:
                        device = str(stats.get("device_ordinal", 0))
                        by_device[device].append(_event(event, stats, str(stats["hlo_op"])))
            found["CPU"] += by_device.items()
    return next((lines for lines in found.values() if lines), [])


def _is_stream(name: str) -> bool:
    return name.startswith("Stream #")


def _device_event(event: Any) -> Event:
    stats = dict(event.stats)
    # A TPU names an event by the text of its instruction: "%fusion.3 = f32[8]{0} fusion(...)".
    name = str(stats.get("hlo_op") or event.name).partition(" = ")[0].lstrip("%")
    return _event(event, stats, name)


def _event(event: Any, stats: Mapping[str, Any], name: str) -> Event:
    category, module = str(stats.get("hlo_category", "")), str(stats.get("hlo_module", ""))
    return Event(name, category, module, event.start_ns, event.start_ns + event.duration_ns)


def _steps(profile: Any) -> tuple[int, ...]:
    """Return the numbers of the annotated steps."""
    found = set()
    for plane in profile.planes:
        if plane.name == HOST:
            for line in plane.lines:
                found |= {
                    int(stats["step_num"]) for event in line.events
                    if event.name == STEP and "step_num" in (stats := dict(event.stats))
                }  # fmt: skip
    return tuple(sorted(found))


# ---- table ----


def table(breakdown: Breakdown, top: int = TOP) -> list[str]:
    """Return the kinds and the `top` operations as lines of text. Times are per step and device."""
    parts = max(len(breakdown.steps), 1) * breakdown.devices
    total = breakdown.total or 1.0
    unit = "ms/step" if breakdown.steps else "ms"
    lines = [f"{'kind':<14}{unit:>10}{'share':>8}"]
    for kind, seconds in breakdown.kinds().items():
        lines.append(f"{kind:<14}{seconds / parts * 1e3:>10.2f}{seconds / total:>8.1%}")
    shown = breakdown.operations[:top]
    width = max([len("operation"), *(len(each.name) for each in shown)])
    width = min(width, 36)
    lines += ["", f"{'operation':<{width}}  {'kind':<12}{unit:>10}{'share':>8}{'runs':>8}  from"]
    for each in shown:
        name = each.name if len(each.name) <= width else f"{each.name[: width - 3]}..."
        runs = f"{each.runs / parts:.6g}"
        time = f"{each.seconds / parts * 1e3:>10.2f}{each.seconds / total:>8.1%}"
        lines.append(f"{name:<{width}}  {each.kind:<12}{time}{runs:>8}  {shorten(each.source)}".rstrip())
    if rest := breakdown.operations[top:]:
        seconds = sum(each.seconds for each in rest)
        title = f"{len(rest):,} more"
        lines.append(f"{title:<{width}}  {'':<12}{seconds / parts * 1e3:>10.2f}{seconds / total:>8.1%}")
    return lines


def shorten(source: str) -> str:
    """Return the end of the path of a JAX operation, in at most WIDTH characters."""
    kept = source
    while len(kept) > WIDTH and "/" in kept:
        kept = kept.partition("/")[2]
    if kept.count(")") > kept.count("("):  # of a parenthesis that was cut off
        kept = kept.removesuffix(")")
    return kept if len(kept) <= WIDTH else f"...{kept[-(WIDTH - 3) :]}"
