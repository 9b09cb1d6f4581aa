"""What a compiled program sends between devices: read from the text of its HLO.

A collective in a loop runs as often as the loop goes round. XLA:CPU and XLA:GPU write that number beside the loop
(`known_trip_count`); XLA:TPU does not, and it is read from the loop's condition, which compares a counter that starts
at a constant with a constant. A loop whose length depends on data has no such number; what one round of it puts out is
told apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = {"pred": 8, "token": 0}  # of the dtypes that do not say it themselves

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf"^(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str  # of KINDS
    bytes: int  # that one execution puts out on a device: the size of its result
    devices: int  # that take part together
    count: int  # executions a run of the program
    source: str  # the operation of the JAX program it comes from, as XLA remembers it

    @property
    def put_out(self) -> int:
        """Bytes of results a device and run of the program."""
        return self.bytes * self.count

    @property
    def sent(self) -> float:
        """Bytes a device sends in a run of the program if rings or direct messages do it, which is the least that
        suffices."""
        n = self.devices
        share = {
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,  # of the slice that is the result
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,  # if the buffer is full
            "collective-permute": 1,
        }[self.kind]
        return share * self.put_out


@dataclass(frozen=True)
class Traffic:
    """The collectives of a program. Where it branches, those of the branches that put out least; loops whose length the
    text does not say are left out."""

    collectives: tuple[Collective, ...]
    most: int  # bytes put out if it takes the branches that put out most
    open_loops: int  # loops with collectives whose length the text does not say
    a_round: int  # bytes put out by one round of each of those

    @property
    def put_out(self) -> int:
        return _put_out(self.collectives)

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.collectives)

    def by_kind(self) -> dict[str, tuple[int, int, float]]:
        """(executions, bytes put out, bytes sent) a device and run of the program, for each kind there is."""
        groups = {kind: [c for c in self.collectives if c.kind == kind] for kind in KINDS}
        return {
            kind: (sum(c.count for c in found), sum(c.put_out for c in found), sum(c.sent for c in found))
            for kind, found in groups.items()
            if found
        }


def read_collectives(hlo: str) -> Traffic:
    """The collectives of an optimized module's text (`compiled.as_text()`, or a dump). Raises ValueError if it is
    none."""
    computations, entry = _computations(hlo)
    if entry is None:
        raise ValueError("not the text of an HLO module: it has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    replicas = re.search(r"replica_count=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else int(replicas[1]) if replicas else 1
    open_loops: set[str] = set()

    def walk(name: str, times: int, choose: Callable, rounds_of_open: int) -> Iterator[Collective]:
        scatters = name.startswith(
            "all-reduce-scatter"
        )  # XLA:TPU's reduce-scatter: a fusion of an all-reduce and its slice
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.match(line):
                yield _collective(found, line, times, devices, scatters)
            elif branches := _branches(line):
                ways = [list(walk(branch, times, choose, rounds_of_open)) for branch in branches]
                yield from choose(ways, key=_put_out)
            elif not re.search(r" async-(update|done)\(", line):  # their start has named the computation already
                called, rounds = dict(_CALLED.findall(line)), 1
                if "body" in called:
                    trips = _trips(line, computations)
                    if trips is None and any(True for _ in walk(called["body"], 1, choose, 1)):
                        open_loops.add(called["body"])
                    rounds = rounds_of_open if trips is None else trips
                for inner in called.values() if rounds else ():
                    yield from walk(inner, times * rounds, choose, rounds_of_open)

    collectives = tuple(walk(entry, 1, min, 0))
    a_round = _put_out(walk(entry, 1, min, 1)) - _put_out(collectives)
    return Traffic(collectives, _put_out(walk(entry, 1, max, 0)), len(open_loops), a_round)


def _put_out(collectives: Iterable[Collective]) -> int:
    return sum(c.put_out for c in collectives)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str | None]:
    """The lines of each computation, without layouts and indents, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in hlo.splitlines():
        if head := _HEAD.match(line):
            lines = found.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif " = " in line:
            lines.append(_LAYOUT.sub("", line.strip()))
    return found, entry


def _branches(line: str) -> list[str]:
    if " conditional(" not in line:
        return []
    if listed := _BRANCHES.search(line):
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return [name for _, name in _CALLED.findall(line)]


def _trips(line: str, computations: dict[str, list[str]]) -> int | None:
    """How often a while loop goes round; None where the text does not say."""
    if known := re.search(r'known_trip_count":?\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    root = next((line for line in lines if line.startswith("ROOT ")), "")
    if (called := re.search(r" fusion\((.*?)\), .*calls=%?([\w.\-]+)", root)) is not None:
        lines = lines + computations.get(called[2], [])
        root = next((line for line in computations.get(called[2], []) if line.startswith("ROOT ")), "")
    if " compare(" not in root or "direction=LT" not in root:
        return None
    # The counter goes up by one from 0: that is how scans and loops with constant ends are written.
    constants = [re.search(r"= [su]\d+\[\] constant\((\d+)\)", line) for line in lines]
    values = {int(found[1]) for found in constants if found}
    return values.pop() if len(values) == 1 else None


def _collective(found: re.Match, line: str, times: int, devices: int, scatters: bool) -> Collective:
    _, result, kind, start = found.groups()
    parts = _parts(result)
    if start and kind in ("all-gather", "collective-permute", "reduce-scatter") and len(parts) > 1:
        parts = [parts[1]]  # of a start: what goes in, what comes out, and what it needs
    size, group = sum(map(_bytes, parts)), _group(line, kind, devices)
    if scatters and kind == "all-reduce":
        kind, size = "reduce-scatter", size // group
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, size, group, times, name[1] if name else "")


def _parts(result: str) -> list[str]:
    """The elements of a tuple's type; a type that is no tuple by itself."""
    if not result.startswith("("):
        return [result]
    parts, depth, first = [], 0, 1
    for i, letter in enumerate(result):
        depth += (letter in "([") - (letter in ")]")
        if (letter == "," and depth == 1) or depth == 0:
            parts.append(result[first:i])
            first = i + 1
        if depth == 0:
            break
    return parts


def _bytes(text: str) -> int:
    """Bytes of all arrays in a type."""
    bits = 0
    for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        digits = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn is 8 bits wide
        width = BITS[dtype] if dtype in BITS else int(digits[1]) if digits else 0
        bits += width * math.prod(int(d) for d in shape.split(",") if d)
    return bits // 8


def _group(line: str, kind: str, devices: int) -> int:
    """Devices that take part together, in any of the ways that HLO writes it."""
    if kind == "collective-permute":
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(counted[2])
    if named := re.search(r"replica_groups=(?:mesh|@\w+)\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", named[1])}
        # An axis, or a part of one: 'axis':(4)2 is a part of size 2.
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    return devices
