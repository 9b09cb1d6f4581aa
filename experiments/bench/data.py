"""Memory and speed of prepared data at scale: synthetic text is written, prepared, trained on and read at random.

    python -m experiments.bench.data [--gigabytes G] [--processes P] [--tokenizer byte] [--folder DIR] [--compress]

Each phase runs in new processes, and its line gives the largest peak of resident memory of a process. The text
has words by Zipf's law and 1 % duplicates, and depends only on its size. P processes of jax.distributed prepare it.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, SourceConfig, TokenizerConfig
from experiments.resolve import fill_in, named_experiment
from train.config import Experiment

WORDS = 50_000
LINES = 1 << 16  # distinct ones
LINE_WORDS = 24
DOCUMENT_LINES = 28  # on average, about 3 kB
DUPLICATES = 0.01
FILE_BYTES = 1 << 29  # of text in a file
BATCHES = 200
STEPS = 50
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


def vocabulary() -> list[str]:
    """Return distinct words, the frequent ones shorter."""
    draw = np.random.default_rng(0)
    words: dict[str, None] = {}
    while len(words) < WORDS:
        length = 1 + min(12, int(draw.gamma(2.0, 0.5 + np.log10(1 + len(words)) / 2)))
        word = "".join(LETTERS[i] for i in (draw.beta(1, 3, length) * len(LETTERS)).astype(int))
        words[word] = None
    return list(words)


def documents(size: int) -> Iterator[str]:
    """Yield documents of `size` bytes in total, or a little more: random sequences of random lines."""
    words, draw, written, last = vocabulary(), np.random.default_rng(1), 0, ""
    ends = np.cumsum(1 / np.arange(1, WORDS + 1))
    lines = []
    for _ in range(LINES):
        chosen = np.searchsorted(ends, draw.random(LINE_WORDS) * ends[-1])
        lines.append(" ".join([words[i] for i in chosen.tolist()]) + ".\n")
    while written < size:
        if not last or draw.random() >= DUPLICATES:
            count = int(draw.integers(DOCUMENT_LINES // 2, DOCUMENT_LINES * 3 // 2))
            last = "".join([lines[i] for i in draw.integers(0, LINES, count).tolist()])
        written += len(last)
        yield last


def write_text(folder: Path, size: int, compress: bool) -> dict[str, Any]:
    """Write the text as JSONL files of at most about FILE_BYTES of text."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, written, count = documents(size), 0, 0
    for number in range(-(-size // FILE_BYTES)):
        path = folder / f"{number:04}.jsonl{'.gz' if compress else ''}"
        opened = gzip.open(path, "wb", compresslevel=1) if compress else path.open("wb")
        with opened as raw, io.BufferedWriter(raw, 1 << 20) as file:  # type: ignore[type-var]
            while written < min(size, (number + 1) * FILE_BYTES) and (text := next(texts, None)) is not None:
                file.write(b'{"text": "%b"}\n' % text.replace("\n", "\\n").encode())
                written += len(text)
                count += 1
    return {"megabytes": written / 1e6, "documents": count}


def experiment_for(folder: Path, tokenizer: str) -> Experiment:
    """Return `smoke` on the text in a folder, with few held-out documents."""
    data = DataConfig(
        sources=(SourceConfig(name="synthetic", path=str(folder / "text"), include=("*.jsonl*",), kind="jsonl"),),
        tokenizer=TokenizerConfig(kind=tokenizer, vocab_size=4096, train_bytes=16_000_000),  # type: ignore[arg-type]
        sequence_length=512,
        holdout_fraction=0.0005,
        cache_dir=str(folder / "cache"),
    )
    smoke = named_experiment("smoke")
    train = replace(smoke.train, steps=STEPS, eval_every=STEPS, checkpoint_every=STEPS)
    model = replace(smoke.model, vocab_size=0, max_length=512)
    return fill_in(replace(smoke, data=data, train=train, model=model), [])


def prepare_text(folder: Path, tokenizer: str) -> dict[str, Any]:
    """Prepare the text with the other processes."""
    from experiments.run import prepare_data

    prepared = prepare_data(experiment_for(folder, tokenizer), log_line)
    counts = prepared.counts("synthetic")
    return {
        "megabytes": (counts.train_bytes + counts.heldout_bytes) / 1e6,
        "shards": len(counts.shards) or 1,
        "tokens": counts.train_tokens,
        "padding": 1 - (counts.train_tokens / counts.windows / (prepared.sequence_length + 1)),
        "identity": prepared.identity,
    }


def train_on_text(folder: Path, tokenizer: str) -> dict[str, Any]:
    """Train `smoke` for some steps, as `python -m experiments train` does, on the prepared data."""
    from experiments.run import run_experiment
    from train.host_memory import keep_freed_memory

    keep_freed_memory()
    experiment = experiment_for(folder, tokenizer)
    run_experiment(experiment, folder / "run", overrides=[], override=False, log=log_line)
    tokens = STEPS * experiment.data.batch_size * experiment.data.sequence_length
    return {"megabytes": 0.0, "tokens": tokens}


def read_batches(folder: Path, tokenizer: str) -> dict[str, Any]:
    """Read batches at random steps."""
    from data.pipeline import train_batches
    from data.prepare import open_prepared

    config = experiment_for(folder, tokenizer).data
    (directory,) = (folder / "cache").glob("packed-*")
    prepared = open_prepared(directory, verify=False)
    read = 0
    with train_batches(prepared, replace(config, prefetch=0)) as stream:
        for step in np.random.default_rng(0).integers(0, 2**40, BATCHES).tolist():
            read += sum(array.nbytes for array in stream.batch_at(step).arrays().values())
    return {"megabytes": read / 1e6, "batches": BATCHES}


def log_line(line: str) -> None:
    """Print a line and the peak of memory so far."""
    print(f"[{peak_bytes() / 1e6:.0f} MB] {line}", file=sys.stderr, flush=True)


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS gives bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def run_phase(args: argparse.Namespace) -> None:
    """Run a phase in this process and print its figures as JSON."""
    index, count, port = map(int, args.process.split(","))
    folder = Path(args.folder)
    if count > 1:
        import jax

        jax.distributed.initialize(f"localhost:{port}", count, index)
    began = time.monotonic()
    if args.phase == "text":
        found = write_text(folder / "text", int(args.gigabytes * 1e9), args.compress)
    else:
        phases = {"prepare": prepare_text, "train": train_on_text, "read": read_batches}
        found = phases[args.phase](folder, args.tokenizer)
    print(json.dumps({**found, "seconds": time.monotonic() - began, "peak_bytes": peak_bytes()}), flush=True)


def phase(name: str, args: argparse.Namespace, count: int = 1) -> list[dict[str, Any]]:
    """Run a phase in `count` processes and return their figures."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.bench.data", "--phase", name, "--folder", args.folder]
    command += ["--gigabytes", str(args.gigabytes), "--tokenizer", args.tokenizer, *["--compress"] * args.compress]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [*command, "--process", f"{i},{count},{port}"], stdout=subprocess.PIPE, text=True, env=environment
        )
        for i in range(count)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"phase {name} failed")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    peak = max(row["peak_bytes"] for row in found)
    speed = found[0]["megabytes"] / found[0]["seconds"]
    facts = {key: value for key, value in found[0].items() if key not in ("megabytes", "seconds", "peak_bytes")}
    print(
        f"| {name} | {count} | {found[0]['seconds']:.1f} | {speed:.1f} | {peak / 1e6:.0f} | "
        f"{', '.join(f'{key} {value}' for key, value in facts.items())} |",
        flush=True,
    )
    return found


def disk_bytes(folder: Path) -> int:
    """Return the size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.data", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="text to write (default 1)")
    parser.add_argument("--processes", type=int, default=1, help="processes that prepare it (default 1)")
    parser.add_argument("--tokenizer", choices=("sentencepiece", "byte"), default="sentencepiece")
    parser.add_argument("--folder", default="", help="where to work and keep the files; default: a temporary folder")
    parser.add_argument("--compress", action="store_true", help="write *.jsonl.gz")
    parser.add_argument("--phase", choices=("text", "prepare", "train", "read"), help=argparse.SUPPRESS)
    parser.add_argument("--process", default="0,1,0", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        run_phase(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or temporary
        print("| phase | processes | seconds | MB/s | peak MB of a process | |\n|---|---|---|---|---|---|", flush=True)
        if not (Path(args.folder) / "text").exists():
            phase("text", args)
        phase("prepare", args, args.processes)
        phase("read", args)
        phase("train", args)  # begins with finding the prepared data in the cache
        for name in ("text", "cache"):
            print(f"{name}: {disk_bytes(Path(args.folder) / name) / 1e6:,.0f} MB on disk")
        shutil.rmtree(Path(args.folder) / "run", ignore_errors=True)


if __name__ == "__main__":
    main()
