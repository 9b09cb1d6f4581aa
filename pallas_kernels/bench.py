"""Speed of the kernels on the device at hand: python -m pallas_kernels.bench OPERATION [--save FILE] [--quick]

An operation's folder has a bench.py whose `contests(platform, quick)` yields what is to be timed. All ways of one
contest take turns in one process, after a first call that compiles; a cell is the median of their times. A roofline
stands beside it: the time that the counted FLOPs and bytes take at the rates that a large matmul and a large copy reach
in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# How the public implementations say that they cannot run a call, or are not installed. Ours raise ValueError and name
# the implementation; anything else of ours is a defect and ends the benchmark.
OF_OTHERS = (ImportError, NotImplementedError, ValueError, TypeError, AssertionError, RuntimeError)
OPERATIONS = ("flash_attention", "decode_attention", "grouped_matmul")


@dataclass(frozen=True)
class Contest:
    """One call, done in several ways. FLOPs count only pairs that are seen; bytes, each input and output once."""

    name: str
    flops: float
    bytes: float
    dtype: str
    arguments: tuple
    ways: dict[str, Callable]  # name -> function of the arguments
    exact: Callable | None = None  # float64 result of the arguments' first row, on the host
    notes: dict = field(default_factory=dict)


def measure(contest: Contest, rounds: int, seconds: float) -> list[dict]:
    """A row for each way: median seconds and quartiles, or why it would not run. Every way has `rounds` turns, a turn
    as many calls as fill `seconds`."""
    rows: list[dict[str, Any]] = []
    running: dict[str, tuple[jax.stages.Compiled, int, list[float], dict[str, Any]]] = {}
    for name, way in contest.ways.items():
        row = {"contest": contest.name, "way": name, "flops": contest.flops, "bytes": contest.bytes, **contest.notes}
        rows.append(row)
        refusals = (ValueError,) if name.startswith("ours") else OF_OTHERS
        try:
            program = jax.jit(way).lower(*contest.arguments).compile()
            result = jax.block_until_ready(program(*contest.arguments))
        except refusals as refusal:
            if name.startswith("ours") and not str(refusal).startswith("implementation ="):
                raise
            row["refused"] = (
                f"{type(refusal).__name__}: {str(refusal).strip().splitlines()[0] if str(refusal) else ''}"[:160]
            )
            continue
        memory = program.memory_analysis()
        row["temporary_bytes"] = memory.temp_size_in_bytes if memory is not None else None
        if contest.exact is not None:
            row["error"] = contest.exact(result)
        start = time.perf_counter()
        jax.block_until_ready(program(*contest.arguments))
        calls = max(1, int(seconds / max(time.perf_counter() - start, 1e-6)))
        running[name] = (program, calls, [], row)
    for _ in range(rounds):
        for program, calls, times, _ in running.values():
            start = time.perf_counter()
            for _ in range(calls):
                result = program(*contest.arguments)
            jax.block_until_ready(result)
            times.append((time.perf_counter() - start) / calls)
    for _, _, times, row in running.values():
        row["seconds"] = statistics.median(times)
        row["quartiles"] = statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2
    return rows


def rates(quick: bool) -> dict[str, float]:
    """FLOPs a second of a large matmul, by dtype, and bytes a second of a large copy, on this device now."""
    n, found = (1024 if quick or jax.default_backend() == "cpu" else 8192), {}
    for dtype in ("float32", "bfloat16"):
        x = jnp.full((n, n), 1 / n, dtype)  # whose square is itself
        found[dtype] = 2 * n**3 / _fastest(jax.jit(lambda x: x @ x), x)
    x = jnp.ones(1 << (24 if quick else 27), jnp.float32)
    # In place: new memory would be timed as it is first touched.
    found["copy"] = 2 * x.nbytes / _fastest(jax.jit(lambda x: x + 1.0, donate_argnums=0), x)
    return found


def _fastest(fn: Callable, x) -> float:
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x = jax.block_until_ready(fn(x))
        times.append(time.perf_counter() - start)
    return min(times)


def facts() -> dict:
    """Where and with what a table was made."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(rows: list[dict], peak: dict[str, float]) -> Iterator[str]:
    """The rows as lines of Markdown."""
    yield "| call | way | ms | quartiles | TFLOP/s | GB/s | of roofline | temporaries MB | error |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if "refused" in row:
            yield f"| {row['contest']} | {row['way']} | refused: {row['refused']} | | | | | | |"
            continue
        seconds, (low, high) = row["seconds"], row["quartiles"]
        share = max(row["flops"] / peak[row["dtype"]], row["bytes"] / peak["copy"]) / seconds
        error = f"{row['error']:.1e}" if "error" in row else ""
        temporaries = "" if row["temporary_bytes"] is None else f"{row['temporary_bytes'] / 2**20:.1f}"
        yield (
            f"| {row['contest']} | {row['way']} | {seconds * 1e3:.3g} | {low * 1e3:.3g}–{high * 1e3:.3g} | "
            f"{row['flops'] / seconds / 1e12:.3g} | {row['bytes'] / seconds / 1e9:.3g} | {share:.0%} | {temporaries} | "
            f"{error} |"
        )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("--quick", action="store_true", help="few and small sizes, few rounds")
    parser.add_argument("--save", type=Path, help="write the rows there as JSON too")
    options = parser.parse_args()
    where = facts()
    print(
        f"{options.operation} on {where['device']} ({where['cores']} host cores), jax {where['jax']}, {where['date']}",
        flush=True,
    )
    peak = rates(options.quick)
    print(", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in peak.items() if name != "copy"), end="")
    print(f", copy {peak['copy'] / 1e9:.3g} GB/s: measured now\n", flush=True)
    module = importlib.import_module(f"pallas_kernels.{options.operation}.bench")
    rows, shown = [], 0
    for contest in module.contests(where["platform"], options.quick):
        rows += [
            {**row, "dtype": contest.dtype}
            for row in measure(contest, rounds=3 if options.quick else 11, seconds=0.02 if options.quick else 0.2)
        ]
        lines = list(table(rows, peak))
        print("\n".join(lines[shown:]), flush=True)
        shown = len(lines)
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps({**where, "rates": peak, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        print(f"\nrows saved to {options.save}")


if __name__ == "__main__":
    main()
