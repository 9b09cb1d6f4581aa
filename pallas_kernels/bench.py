"""Time the kernels on this machine's device: python -m pallas_kernels.bench OPERATION [--save FILE] [--quick]

An operation's bench.py provides `contests(platform, quick)`, which yields the calls to time. One process compiles all
ways of a contest, then times them in alternating rounds; the table shows the median. It also shows the fraction of the
roofline: the time that the counted FLOPs and bytes take at the rates of a large matmul and a large copy, measured in
the same run, over the time of the call.
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

# Errors by which public implementations refuse a call, or show that they are not installed. Ours raise a ValueError
# that names the implementation; any other error from our code is a bug and stops the benchmark.
REFUSALS_OF_OTHERS = (ImportError, NotImplementedError, ValueError, TypeError, AssertionError, RuntimeError)
OPERATIONS = ("flash_attention", "decode_attention", "grouped_matmul")


@dataclass(frozen=True)
class Contest:
    """One call, computed in several ways. FLOPs count only visible pairs; bytes count each input and output once."""

    name: str
    flops: float
    bytes: float
    dtype: str
    arguments: tuple
    ways: dict[str, Callable]  # name -> function of the arguments
    exact: Callable | None = None  # result -> its largest error against float64, relative to the largest entry
    notes: dict = field(default_factory=dict)


def measure(contest: Contest, rounds: int, seconds: float) -> list[dict]:
    """Return a row for each way: median seconds and quartiles, or the reason it refused the call. Each of the `rounds`
    rounds times every way, with as many calls as fill `seconds`."""
    rows: list[dict[str, Any]] = []
    running: dict[str, tuple[jax.stages.Compiled, int, list[float], dict[str, Any]]] = {}
    for name, way in contest.ways.items():
        row = {"contest": contest.name, "way": name, "flops": contest.flops, "bytes": contest.bytes, **contest.notes}
        rows.append(row)
        refusals = (ValueError,) if name.startswith("ours") else REFUSALS_OF_OTHERS
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
    """Measure this device: return the FLOP/s of a large matmul by dtype, and the bytes per second of a large copy."""
    n, found = (1024 if quick or jax.default_backend() == "cpu" else 8192), {}
    for dtype in ("float32", "bfloat16"):
        x = jnp.full((n, n), 1 / n, dtype)  # whose square is itself
        found[dtype] = 2 * n**3 / _fastest(jax.jit(lambda x: x @ x), x)
    x = jnp.ones(1 << (24 if quick else 27), jnp.float32)
    # In place: with a new output, the time would include the first touch of its memory.
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
    """Return the device, the software versions and the date, to record with a table."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


def table(rows: list[dict], peak: dict[str, float]) -> Iterator[str]:
    """Yield the rows as lines of a Markdown table."""
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
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("--quick", action="store_true", help="few, small sizes and few rounds")
    parser.add_argument("--save", type=Path, help="also write the rows to this file as JSON")
    options = parser.parse_args()
    where = facts()
    print(
        f"{options.operation} on {where['device']} ({where['cores']} host cores), jax {where['jax']}, {where['date']}",
        flush=True,
    )
    peak = rates(options.quick)
    print(", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in peak.items() if name != "copy"), end="")
    print(f", copy {peak['copy'] / 1e9:.3g} GB/s (measured in this run)\n", flush=True)
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
