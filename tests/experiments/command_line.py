"""Helpers that call the command line in this process, and a corpus small enough to train on in seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path

from experiments.__main__ import main


def write_folder(folder: Path, files: int = 40) -> Path:
    """Write `files` distinct small programs to a new folder, and return it."""
    folder.mkdir(parents=True)
    for i in range(files):
        lines = [f"def function_{i}_{j}(x, y={j}):\n    return x * {i} + y - {i * j}\n\n" for j in range(12)]
        (folder / f"module_{i:02}.py").write_text("".join(lines))
    return folder


def tiny_overrides(root: Path, corpus: Path | None = None) -> list[str]:
    """Return arguments that turn `smoke` into a run of seconds on `corpus` (default: the folder below `root`)."""
    settings = {
        "data.sources.0.name": "folder",
        "data.sources.0.path": corpus or root / "corpus",
        "data.cache_dir": root / "cache",
        "data.tokenizer.vocab_size": 400,
        "data.sequence_length": 64,
        "data.batch_size": 8,
        "data.holdout_fraction": 0.2,
        "model.num_layers": 1,
        "model.embed_dim": 32,
        "model.max_length": 96,
        "model.moe.hidden_dim": 16,
        "model.moe.num_experts": 4,
        "optimizer.schedule": "inverse_sqrt",  # independent of the last step, so more steps use the same program
        "train.steps": 12,
        "train.eval_every": 6,
        "train.eval_windows": 8,
        "train.checkpoint_every": 6,
        "train.log_every": 2,
        "samples.prompt_tokens": 16,
        "samples.new_tokens": 8,
    }
    return [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]


def call(capsys, *arguments: object) -> tuple[int, str, str]:
    """Return (exit code, stdout, stderr) of `python -m experiments ARGUMENTS`."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys, *arguments: object) -> str:
    """Return the error paragraph of a command that refuses its input."""
    code, _, err = call(capsys, *arguments)
    assert code == 1 and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def final_row(run: Path) -> dict:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "final"][-1]


def printed_bits(out: str) -> float:
    """Return this model's bits per byte from the table that `train` and `eval` print."""
    return float(re.findall(r"this model\s+([0-9.]+)", out)[-1])
