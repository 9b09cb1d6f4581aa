"""Several seeds of `smoke` under one vmap, compared with the same runs one after the other.

    python -m experiments.bench.seeds [SEEDS] [STEPS]

Prints the largest relative difference of the losses and the ratio of the processor times; compilation is left out.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from data.batch import Batch
from data.pipeline import train_batches
from experiments.resolve import resolve
from experiments.run import prepare_data
from train.host_memory import keep_freed_memory
from train.hyper import Hyper, hyper_of, stack
from train.program import build


def losses(step: Callable, state: Any, batches: list[Batch], hyper: Hyper) -> tuple[np.ndarray, float]:
    """Return (losses [steps, ...], processor seconds of all steps but the first, which compiles)."""
    found, began = [], 0.0
    for i, batch in enumerate(batches):
        state, metrics = step(state, batch, hyper)
        found.append(np.asarray(metrics["loss"]))
        if i == 0:
            began = time.process_time()
    return np.stack(found), time.process_time() - began


def compare(seeds: int, steps: int) -> tuple[np.ndarray, float, float]:
    """Train `seeds` runs of `smoke` one after the other and under one vmap, on the same batches.

    Return the relative differences of their losses [steps, seeds], and the processor seconds of both ways.
    """
    experiment = resolve("smoke", [], 1)
    program = build(experiment, devices=jax.devices()[:1])
    prepared = prepare_data(experiment, lambda text: None)
    with train_batches(prepared, experiment.data) as stream:
        batches = [next(stream) for _ in range(steps)]
    arms = [replace(experiment, train=replace(experiment.train, seed=seed)) for seed in range(seeds)]
    hypers = [hyper_of(arm) for arm in arms]

    make, step = jax.jit(program.make_state), jax.jit(program.step, donate_argnums=0)
    serial = [losses(step, make(hyper), batches, hyper) for hyper in hypers]
    made = jax.jit(jax.vmap(program.make_state))(stack(hypers))
    together = jax.jit(jax.vmap(program.step, in_axes=(0, None, 0)), donate_argnums=0)
    found, seconds = losses(together, made, batches, stack(hypers))
    alone = np.stack([loss for loss, _ in serial], axis=1)
    return np.abs(found - alone) / alone, sum(seconds for _, seconds in serial), seconds


def main(seeds: int = 8, steps: int = 100) -> None:
    keep_freed_memory()
    apart, serial, together = compare(seeds, steps)
    print(f"{seeds} seeds, {steps} steps of smoke")
    print("largest relative difference of the losses up to a step:")
    shown = [step for step in (1, 10, 20, 40, 60, 80, 100) if step <= steps]
    print("  " + ", ".join(f"{step}: {apart[:step].max():.1e}" for step in shown))
    late = [int((apart[:, i] > 1e-5).argmax()) + 1 if (apart[:, i] > 1e-5).any() else 0 for i in range(seeds)]
    print(f"first step above 1e-5, by seed (0: none): {late}")
    print(f"serial {serial:.1f} processor seconds, under one vmap {together:.1f}: a ratio of {together / serial:.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
