"""Speed compared with PyTorch and transformers, as ratios in one run: python -m experiments.bench [--rounds N]

Prints a table and saves its figures under experiments/bench/results/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from experiments.bench.contest import Contest, Contestant, compete
from experiments.bench.models import BATCH, LENGTH, NEW_TOKENS
from experiments.cpu_devices import cores

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "optax", "torch", "transformers", "numpy")


class Row(NamedTuple):
    """One line of the table; `ratio` above 1 means that ours is the better."""

    name: str
    ours: float
    theirs: float | None
    ratio: float | None
    unit: str
    note: str = ""


def _contest_row(name: str, result: Contest, unit: str, tokens: int | None = None) -> Row:
    note = f"quartiles of the ratio {result.spread[0]:.2f} to {result.spread[1]:.2f}"
    ours, theirs = (result.ours, result.theirs) if tokens is None else (tokens / result.ours, tokens / result.theirs)
    return Row(name, ours, theirs, result.ratio, unit, note)


def _train_rows(kind: str, rivals: Mapping[str, tuple[str, ...]], rounds: int) -> Iterator[Row]:
    contestants = [Contestant("experiments.bench.train_step", kind), *(Contestant(*args) for args in rivals.values())]
    ours, facts = contestants[0], contestants[0].facts
    for name, result in zip(rivals, compete(*contestants, rounds=rounds), strict=True):
        row = _contest_row(f"{kind} train step, {BATCH} x {LENGTH} tokens, compared with {name}", result, "s")
        yield row._replace(note=f"{row.note}; {facts['devices']} simulated devices")
    for contestant in contestants:
        contestant.close()
    yield Row(f"{kind} train step: first compilation", facts["compile_seconds"], None, None, "s")
    if facts["alias_bytes"] < facts["state_bytes"]:
        raise RuntimeError(
            f"{ours.name}: of {facts['state_bytes']} bytes of state only {facts['alias_bytes']} are donated"
        )
    note = f"parameters and optimizer: {facts['state_bytes'] / 1e6:.0f} MB, all updated in place"
    yield Row(f"{kind} train step: donated", facts["alias_bytes"] / 1e6, None, None, "MB", note)
    yield Row(f"{kind} train step: temporaries", facts["temporary_bytes"] / 1e6, None, None, "MB")


def _decode_rows(rounds: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        for batch in (1, 8):
            model = str(Path(folder) / f"model-{batch}")
            ours = Contestant("experiments.bench.decode", str(batch), model)
            theirs = Contestant("experiments.bench.hf", "decode", str(batch), model)
            difference = theirs.facts["logit_difference"]
            if difference > 1e-4:
                raise RuntimeError(f"logits differ by {difference:.1e}: the two are not the same network")
            (result,) = compete(ours, theirs, rounds=rounds)
            yield _contest_row(
                f"decode, batch {batch}, compared with transformers generate", result, "tokens/s", batch * NEW_TOKENS
            )
            ours.close()
            theirs.close()


def _layer_rows(rounds: int) -> Iterator[Row]:
    contestants = Contestant("experiments.bench.layer", "moe"), Contestant("experiments.bench.layer", "dense")
    (result,) = compete(*contestants, rounds=rounds)
    yield _contest_row("MoE layer, forward + backward, compared with an MLP of equal active FLOPs", result, "s")
    for contestant in contestants:
        contestant.close()


def _start_rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        env = {"JAX_COMPILATION_CACHE_DIR": folder}
        seconds = []
        for _ in range(2):
            contestant = Contestant("experiments.bench.train_step", "dense", env=env)
            seconds.append(contestant.facts["compile_seconds"])
            contestant.close()
    yield Row("dense train step: compilation, cache empty", seconds[0], None, None, "s")
    yield Row("dense train step: compilation, cache warm", seconds[1], None, None, "s")
    start = time.perf_counter()
    code = "from experiments.resolve import resolve; resolve('quickstart', [], 1)"
    subprocess.run([sys.executable, "-c", code], check=True)
    yield Row("python start, import, config resolved", time.perf_counter() - start, None, None, "s")


def processor() -> str:
    """Return the name of the processor and the number of cores that this process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {cores()} of {os.cpu_count()} cores"


def line(row: Row) -> str:
    """A row of the table in Markdown."""
    theirs = "" if row.theirs is None else f"{row.theirs:.4g}"
    ratio = "" if row.ratio is None else f"**{row.ratio:.2f}**"
    return f"| {row.name} | {row.ours:.4g} | {theirs} | {ratio} | {row.unit} | {row.note} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=7, help="turns of each contestant; the medians are reported (default 7)"
    )
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="compare processor seconds: for a machine that others use, as in: "
        "taskset -c 0 python -m experiments.bench --processor-time",
    )
    args = parser.parse_args()
    rounds = args.rounds
    if args.processor_time:
        Contestant.clock = "processor"
    dense = {name: ("experiments.bench.torch_model", name.split()[-1]) for name in ("PyTorch eager", "torch compile")}
    mixtral = {f"Mixtral {name}": ("experiments.bench.hf", "moe", name) for name in ("eager", "grouped_mm")}
    rows = []
    print("| what | ours | theirs | ratio | unit | |\n|---|---|---|---|---|---|", flush=True)
    for part in (
        _train_rows("dense", dense, rounds),
        _decode_rows(rounds),
        _train_rows("moe", mixtral, rounds),
        _layer_rows(rounds),
        _start_rows(),
    ):
        for row in part:
            rows.append(row)
            print(line(row), flush=True)
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "date": now.isoformat(timespec="seconds"),
        "device": processor(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "clock": Contestant.clock,
        "rounds": rounds,
        "rows": [row._asdict() for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d-%H%M}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nsaved as {path}")


if __name__ == "__main__":
    main()
