"""Count the collectives of a compiled program from its HLO text: operations, devices and bytes.

A collective in a loop runs once per iteration. XLA:CPU and XLA:GPU write the number of iterations next to the loop
(`known_trip_count`). XLA:TPU does not, so it is read from the loop's condition, which compares a counter that starts at
a constant with another constant. A loop whose length depends on data has no such number; the bytes of one iteration are
then reported separately.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = {"pred": 8, "token": 0}  # widths of dtypes whose names do not contain them

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf"^(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")
_CALLED = re.compile(r"\b(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Collective:
    """One collective operation of the program."""

    kind: str  # one of KINDS
    bytes: int  # size of its result on one device
    devices: int  # devices that take part together
    count: int  # executions per run of the program
    source: str  # operation of the JAX program, from XLA's metadata

    @property
    def output_bytes(self) -> int:
        """Bytes of results per device and run of the program."""
        return self.bytes * self.count

    @property
    def sent(self) -> float:
        """Bytes that a device sends per run of the program with rings or direct messages, which is the minimum."""
        n = self.devices
        share = {
            "all-gather": (n - 1) / n,
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,  # times the slice that is the result
            "all-to-all": (n - 1) / n,
            "ragged-all-to-all": (n - 1) / n,  # if the buffer is full
            "collective-permute": 1,
        }[self.kind]
        return share * self.output_bytes


@dataclass(frozen=True)
class Traffic:
    """The collectives of a program. At a conditional, those of the branch with the fewest bytes; loops of unknown
    length are left out."""

    collectives: tuple[Collective, ...]
    most: int  # bytes of results if the program takes the branches with the most bytes
    open_loops: int  # loops of unknown length that contain collectives
    a_round: int  # bytes of results of one iteration of each of those loops

    @property
    def output_bytes(self) -> int:
        return _output_bytes(self.collectives)

    @property
    def sent(self) -> float:
        return sum(c.sent for c in self.collectives)

    def by_kind(self) -> dict[str, tuple[int, int, float]]:
        """Return {kind: (executions, bytes of results, bytes sent)} per device and run of the program."""
        groups = {kind: [c for c in self.collectives if c.kind == kind] for kind in KINDS}
        return {
            kind: (sum(c.count for c in found), sum(c.output_bytes for c in found), sum(c.sent for c in found))
            for kind, found in groups.items()
            if found
        }


def read_collectives(hlo: str) -> Traffic:
    """Return the collectives in the text of an optimized HLO module (`compiled.as_text()`, or a dump). Raises
    ValueError if `hlo` has no ENTRY computation."""
    computations, entry = _computations(hlo)
    if entry is None:
        raise ValueError("the text has no ENTRY computation. Pass the text of an HLO module, like compiled.as_text()")
    partitions = re.search(r"num_partitions=(\d+)", hlo)
    replicas = re.search(r"replica_count=(\d+)", hlo)
    devices = int(partitions[1]) if partitions else int(replicas[1]) if replicas else 1
    open_loops: set[str] = set()

    def walk(name: str, times: int, choose: Callable, rounds_of_open: int) -> Iterator[Collective]:
        # XLA:TPU implements a reduce-scatter as a fusion of an all-reduce and its slice.
        scatters = name.startswith("all-reduce-scatter")
        for line in computations.get(name, ()):
            if found := _COLLECTIVE.match(line):
                yield _collective(found, line, times, devices, scatters)
            elif branches := _branches(line):
                options = [list(walk(branch, times, choose, rounds_of_open)) for branch in branches]
                yield from choose(options, key=_output_bytes)
            elif not re.search(r" async-(update|done)\(", line):  # async-start has named their computation already
                called, rounds = dict(_CALLED.findall(line)), 1
                if "body" in called:
                    trips = _trips(line, computations)
                    if trips is None and any(True for _ in walk(called["body"], 1, choose, 1)):
                        open_loops.add(called["body"])
                    rounds = rounds_of_open if trips is None else trips
                for inner in called.values() if rounds else ():
                    yield from walk(inner, times * rounds, choose, rounds_of_open)

    collectives = tuple(walk(entry, 1, min, 0))
    a_round = _output_bytes(walk(entry, 1, min, 1)) - _output_bytes(collectives)
    return Traffic(collectives, _output_bytes(walk(entry, 1, max, 0)), len(open_loops), a_round)


def _output_bytes(collectives: Iterable[Collective]) -> int:
    return sum(c.output_bytes for c in collectives)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str | None]:
    """Return the lines of each computation, without layouts and indents, and the name of the entry computation."""
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
    """Return the number of iterations of a while loop, or None if the text does not contain it."""
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
    # The counter starts at 0 and goes up by one, as in scans and loops with constant bounds.
    constants = [re.search(r"= [su]\d+\[\] constant\((\d+)\)", line) for line in lines]
    values = {int(found[1]) for found in constants if found}
    return values.pop() if len(values) == 1 else None


def _collective(found: re.Match, line: str, times: int, devices: int, scatters: bool) -> Collective:
    _, result, kind, start = found.groups()
    parts = _parts(result)
    if start and kind in ("all-gather", "collective-permute", "reduce-scatter") and len(parts) > 1:
        parts = [parts[1]]  # a start returns (operand, result, context)
    size, group = sum(map(_bytes, parts)), _group(line, kind, devices)
    if scatters and kind == "all-reduce":
        kind, size = "reduce-scatter", size // group
    name = re.search(r'op_name="([^"]*)"', line)
    return Collective(kind, size, group, times, name[1] if name else "")


def _parts(result: str) -> list[str]:
    """Return the element types of a tuple type, or the type itself if it is not a tuple."""
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
    """Return the bytes of all arrays in a type."""
    bits = 0
    for dtype, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text):
        digits = re.match(r"[a-z]+(\d+)", dtype)  # f8e4m3fn is 8 bits wide
        width = BITS[dtype] if dtype in BITS else int(digits[1]) if digits else 0
        bits += width * math.prod(int(d) for d in shape.split(",") if d)
    return bits // 8


def _group(line: str, kind: str, devices: int) -> int:
    """Return the number of devices that take part together, from any of HLO's notations."""
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
