"""Runs small enough for property tests: a tiny network on a few files and one device, compiled once."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import jax
import numpy as np

from data.config import DataConfig
from data.prepare import Prepared
from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from train import loop
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig
from train.program import Program
from train.records import RunFolder, read_metrics
from train.signals import StopSignal

TINY = ModelConfig(
    vocab_size=272,
    num_layers=2,
    embed_dim=16,
    max_length=64,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    mlp=MLPConfig(hidden_dim=32),
    dtype="float32",
)


def experiment(data: DataConfig, **train: object) -> Experiment:
    """Return an experiment with every random draw and state: dropout, average, microbatches, fill-in-middle, experts.

    The learning rate does not depend on the number of steps, so that a shorter run is the beginning of a longer one.
    """
    fields = dict(
        steps=12, objective="fill_in_middle", microbatches=2, ema_decay=0.9, eval_every=4, eval_windows=8,
        checkpoint_every=5, log_every=1, keep_last=3,
    )  # fmt: skip
    return Experiment(
        name="tiny",
        model=dataclasses.replace(TINY, dropout=0.1, moe=MoEConfig(num_experts=4, top_k=2, hidden_dim=16)),
        data=data,
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="inverse_sqrt", warmup_steps=3),
        train=TrainConfig(**{**fields, **train}),
        samples=SampleConfig(count=0),
    )


def with_train(program: Program, **changes: object) -> Program:
    """Return the same compiled program with other settings of the loop (not of the step)."""
    e = program.experiment
    return dataclasses.replace(
        program, experiment=dataclasses.replace(e, train=dataclasses.replace(e.train, **changes))
    )


def run(
    program: Program, prepared: Prepared, folder: Path, messages: list[str] | None = None, **parts: object
) -> loop.Trained:
    """Start or resume the run in `folder`. `parts` are further arguments of `loop.train`."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    log = (lambda text: None) if messages is None else messages.append
    return loop.train(program, prepared, RunFolder(folder), log=log, show_progress=False, **parts)


class StopAt(StopSignal):
    """Sends this process SIGTERM during step `when`."""

    def __init__(self, when: int):
        super().__init__()
        self._when = when

    def agreed(self, step: int) -> bool:
        if step == self._when:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().agreed(step)


def train_rows(folder: Path) -> list[tuple]:
    """Return, for each step, the metrics that must not depend on interruptions."""
    rows = read_metrics(folder / "metrics.jsonl")
    names = ("step", "loss", "grad_norm", "learning_rate", "load_balance_loss", "max_violation")
    return [tuple(row[name] for name in names) for row in rows if row["kind"] == "train"]


def bits(tree) -> list[bytes]:
    """Return the exact bytes of a tree's leaves."""
    data = (
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    )
    return [np.asarray(x).tobytes() for x in data]
