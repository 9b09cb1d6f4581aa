"""A synthetic run folder in the form that training leaves, made in milliseconds."""

import json
from pathlib import Path

import numpy as np

from train.records import MetricsWriter, RunFolder, write_environment, write_samples

ENVIRONMENT = {
    "start_time": 1.8e9,
    "command": ["experiments", "train", "quickstart"],
    "system": "Linux",
    "cpu_count": 8,
    "python": "3.11.0",
    "packages": {"jax": "0.10.2", "flax": "0.12.0"},
    "backend": "tpu",
    "devices": {"TPU v5p": 2},
    "process_count": 1,
    "git_commit": "0123456789abcdef",
    "git_dirty": True,
    "git_diff_sha256": "f" * 64,
}
SAMPLE = {
    "prompt": "def gcd(a, b):\n    while b:\n",
    "completion": "        a, b = b, a % b\n    return b\n",
    "reference": "        a, b = b, a % b\n    return a\n\n\ndef lcm(a, b):\n    return abs(a * b) // gcd(a, b)\n",
    "file": "fractions.py",
}


MEMORY = {"arguments": 47_000_000, "updated in place": 46_000_000, "temporaries": 283_000_000}


def goodput_rows(steps: int) -> list[dict]:
    """Return the account of a run that crashed after `steps` - 10 and was resumed 10 steps before that."""
    crash = max(steps - 10, 1)
    resumed = max(crash - 10, 0)
    other = {"data": 3.0, "initialization": 1.0, "compilation": 9.7, "checkpoints": 4.0, "evaluation": 20.0}
    return [
        {"kind": "goodput", "step": step, "start": {"time": time, "step": first},
         "seconds": {"wall": 0.17 * (step - first) + sum(other.values()), "steps": 0.17 * (step - first), **other},
         "memory": MEMORY}
        for time, first, step in ((1.8e9, 0, crash // 2), (1.8e9, 0, crash), (1.8e9 + 900, resumed, steps))
    ]  # fmt: skip


def make_run(
    path: Path,
    *,
    steps: int,
    layers: int = 4,
    experts: int = 8,
    evaluations: bool = True,
    finished: bool = True,
    name: str = "quickstart",
    question: str = "Does a small mixture of experts learn Python in ten minutes?",
    goodput: bool = True,
    changes: dict | None = None,
    slower: float = 1.0,
) -> RunFolder:
    """Write a run of `steps` with plausible curves; `experts=0` gives a dense model.

    Without `goodput`, write the rows of older code, which did not record it. `changes` are merged into the config, and
    `slower` multiplies the distance of the loss from its final value.
    """
    random = np.random.default_rng(0)
    run = RunFolder(Path(path))
    config = {
        "name": name,
        "question": question,
        "model": {"num_layers": layers, "moe": {"top_k": 2, "num_experts": experts}},
        "train": {"steps": steps},
        **(changes or {}),
    }
    run.config.write_text(json.dumps(config))
    run.overrides.write_text(json.dumps([f"model.num_layers={layers}"]))
    write_environment(run, ENVIRONMENT)
    write_samples(run, [SAMPLE] * 3)
    compressors = {"gzip -9": 1.71, "xz -9e": 1.62, "bz2 -9": 1.61}
    with MetricsWriter(run) as writer:
        skew = random.normal(size=(layers, experts)) * 0.6
        for step in range(1, steps + 1):
            loss = 2.9 + slower * 5.5 * np.exp(-step / (0.15 * steps)) + random.normal() * 0.08
            norm = 0.4 + 4 * np.exp(-step / 20) + abs(random.normal()) * 0.2
            row = {
                "kind": "train",
                "step": step,
                "loss": float("nan") if step == 40 else loss,
                "bits_per_byte": loss / 2.3,
                "learning_rate": 3e-3 * min(step / (0.1 * steps), 0.5 + 0.5 * np.cos(np.pi * step / steps)),
                "grad_norm": norm,
                "clipped": bool(norm > 1),
                "tokens_per_second": 8000 + random.normal() * 300,
                "mfu": 0.41,
            }
            if experts:
                load = np.exp(skew * (0.2 + np.exp(-step / (0.2 * steps))) + random.normal(size=skew.shape) * 0.15)
                load /= load.sum(1, keepdims=True)
                row |= {
                    "expert_load": load.round(5),
                    "max_violation": float(load.max() * experts - 1),
                    "load_balance_loss": float((load**2).sum(1).mean() * experts),
                    "router_z_loss": 1 / (1 + step / 9),
                    "router_entropy": 1.5 + 0.5 / step,
                    "router_confidence": 0.4,
                    "router_layers": {"dropped_fraction": [0.1] * layers},
                }
            writer.write(row)
            if step == 40:
                writer.write(
                    {"kind": "event", "step": 40, "event": "nonfinite", "message": "loss not finite at 40: skipped"}
                )
            if step == 50:
                writer.write({"kind": "event", "step": 50, "event": "resumed", "message": "from step 50"})
            if evaluations and step % max(1, steps // 8) == 0:
                bits = 1.5 + slower * 1.5 * np.exp(-step / (0.2 * steps))
                writer.write({"kind": "eval", "step": step, "set": "stdlib", "loss": bits * 2.1, "bits_per_byte": bits})
        if goodput and steps:
            for row in goodput_rows(steps):
                writer.write(row)
        if experts:
            run.routing.mkdir()
            for step in range(max(1, steps // 4), steps + 1, max(1, steps // 4)):
                choices = np.argsort(random.random((layers, 64, experts)) + np.arange(experts) * step / steps)[..., :2]
                np.savez_compressed(run.routing / f"{step:08d}.npz", choices=choices.astype(np.int16))
        if finished:
            figures = {"bits_per_byte": 1.532, "loss": 3.2, "bytes": 1_790_000, "compressors": compressors}
            writer.write(
                {
                    "kind": "final",
                    "step": steps,
                    "sets": {"stdlib": figures},
                    "parameters_total": 5.2e6,
                    "parameters_active": 2.9e6,
                    "tokens": steps * 8192,
                    "wall_seconds": 512.0,
                    "tokens_per_second": 8100.0,
                    "mfu": 0.41,
                    "mfu_convention": "half causal",
                }
            )
    return run
