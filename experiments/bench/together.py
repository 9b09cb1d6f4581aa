"""Train steps of several trials under one vmap, compared with steps one after the other, as ratios in one run.

    taskset -c 0 python -m experiments.bench.together [--experts] [--rounds N] [--processor-time]

The network is that of the studies (experiments/studies/bases.py). A step includes stacking the batches and reading the
metrics; evaluations and checkpoints are the same in both ways, and left out. Ratios above 1 mean that vmap is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from data.batch import Batch
from experiments.bench.__main__ import processor
from experiments.bench.contest import Contestant, compete, serve
from experiments.studies.bases import dense, moe
from train.config import Experiment
from train.host_memory import keep_freed_memory
from train.hyper import hyper_of, stack
from train.program import build

SIZES = (1, 2, 4, 8)  # trials under one vmap
STEPS = 5  # in one piece of work


def trial(kind: str, seed: int) -> Experiment:
    """Return the experiment of a trial; each has its own seed and rate."""
    base = dense() if kind == "dense" else moe()
    return replace(
        base,
        model=replace(base.model, vocab_size=base.data.tokenizer.vocab_size),
        optimizer=replace(base.optimizer, learning_rate=base.optimizer.learning_rate * (1 + 0.1 * seed)),
        train=replace(base.train, seed=seed),
    )


def batches(experiment: Experiment) -> list[Batch]:
    """Return batches of random tokens, one for each step of a piece of work."""
    data, chance = experiment.data, np.random.default_rng(experiment.train.seed)
    shape = data.batch_size, data.sequence_length + 1
    tokens = [chance.integers(0, experiment.model.vocab_size, shape).astype(np.int32) for _ in range(STEPS)]
    return [Batch.of_windows(each, np.ones(shape, np.int32)) for each in tokens]


def work(kind: str, size: int) -> Callable[[], None]:
    """Return a function that trains `size` trials together for some steps; 0: one trial, without vmap."""
    trials = [trial(kind, seed) for seed in range(max(size, 1))]
    program = build(trials[0], devices=jax.devices()[:1])
    hypers = [hyper_of(each) for each in trials]
    make, step = program.make_state, program.step
    if size:
        make, step = jax.vmap(make), jax.vmap(step)
    hyper = jax.device_put(stack(hypers) if size else hypers[0])
    state, compiled = jax.jit(make)(hyper), jax.jit(step, donate_argnums=0)
    rows = list(zip(*map(batches, trials), strict=True))  # by step, then by trial

    def steps() -> None:
        nonlocal state
        read: Callable[[], Any] = dict
        for each in rows:
            batch = jax.tree.map(lambda *x: np.stack(x), *each) if size else each[0]
            state, values = compiled(state, jax.device_put(batch), hyper)
            read()
            read = partial(jax.device_get, values)
        read()

    return steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.together", description=__doc__)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts in place of the dense network")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant [default: 5]")
    parser.add_argument("--processor-time", action="store_true", help="compare processor seconds, not wall time")
    args = parser.parse_args()
    if args.processor_time:
        Contestant.clock = "processor"
    kind = "moe" if args.experts else "dense"
    serial, *together = (Contestant("experiments.bench.together", "--work", kind, str(size)) for size in (0, *SIZES))
    results = compete(serial, *together, rounds=args.rounds)
    print(f"{kind}, {Contestant.clock} time, {args.rounds} rounds of {STEPS} steps, {processor()}")
    print("| trials under one vmap | ms for a step of each | one after the other | ratio | quartiles |")
    print("|---|---|---|---|---|")
    for size, result in zip(SIZES, results, strict=True):
        # The serial contestant trains one trial; `size` of them take `size` times as long.
        alone, each = 1e3 * result.ours / STEPS, 1e3 * result.theirs / STEPS / size
        low, high = size / result.spread[1], size / result.spread[0]
        print(f"| {size} | {each:.1f} | {alone:.1f} | **{size / result.ratio:.2f}** | {low:.2f} to {high:.2f} |")
    for contestant in (serial, *together):
        contestant.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        keep_freed_memory()
        serve(work(sys.argv[2], int(sys.argv[3])), {})
    else:
        main()
