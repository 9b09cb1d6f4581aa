"""Two programs measured in turns, each in its own process, so that neither's threads disturb the other's."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Literal, NamedTuple


class Contest(NamedTuple):
    """Medians over the rounds; `ratio` is the median of the rounds' own ratios, theirs over ours: above 1 we are
    faster."""

    ours: float  # seconds
    theirs: float
    ratio: float
    spread: tuple[float, float]  # quartiles of the ratio


class Contestant:
    """A process that runs `python -m MODULE ARGS` and does a piece of work each time it is asked.

    `clock`: 'wall', or 'processor', the processor time of its threads, which other processes disturb less.
    """

    clock: Literal["wall", "processor"] = "wall"

    def __init__(self, module: str, *args: str, env: dict[str, str] | None = None):
        self.name = f"{module} {' '.join(args)}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | (env or {}),
        )  # fmt: skip
        self.facts: dict = self._answer()

    def seconds(self) -> float:
        """Do one piece of work and return its seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()[self.clock]

    def close(self) -> None:
        """End the process by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with {self.process.wait()} before it answered")


def serve(work: Callable[[], object], facts: dict) -> None:
    """Be the process of a Contestant: do `work` once untimed, print `facts`, then time `work` for each line of
    input."""
    work()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start, processor = time.perf_counter(), time.process_time()
        work()
        seconds = {"wall": time.perf_counter() - start, "processor": time.process_time() - processor}
        print(json.dumps(seconds), flush=True)


def compete(ours: Contestant, *theirs: Contestant, rounds: int) -> list[Contest]:
    """Time the contestants in turns. The first piece of work of a turn warms the caches and is not counted."""

    def turn(contestant: Contestant) -> float:
        contestant.seconds()
        return min(contestant.seconds() for _ in range(2))

    times = [[turn(c) for c in (ours, *theirs)] for _ in range(rounds)]
    columns = list(zip(*times, strict=True))
    results = []
    for column in columns[1:]:
        ratios = sorted(t / o for o, t in zip(columns[0], column, strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        results.append(
            Contest(
                statistics.median(columns[0]),
                statistics.median(column),
                statistics.median(ratios),
                (quartiles[0], quartiles[2]),
            )
        )
    return results
