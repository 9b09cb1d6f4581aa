"""An experiment that trains in a moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data.config import DataConfig, SourceConfig, TokenizerConfig
from model.config import MLPConfig
from tests.train.small_runs import TINY
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig


def tiny_experiment(text: Path, cache: Path) -> Experiment:
    """Return 12 steps of a network of one layer on bytes of small functions, which are written to `text`."""
    for i in range(40):
        (text / f"{i}.py").write_text("\n".join(f"def f{j}_{i}(x): return x + {i * j}" for j in range(20)))
    return Experiment(
        name="tiny",
        model=replace(TINY, mlp=MLPConfig(hidden_dim=16), num_layers=1),
        data=DataConfig(sources=(SourceConfig(name="code", path=str(text)),), tokenizer=TokenizerConfig(kind="byte"),
                        sequence_length=32, batch_size=8, holdout_fraction=0.1, cache_dir=str(cache)),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=2),
        train=TrainConfig(steps=12, eval_every=4, eval_windows=4, checkpoint_every=4, log_every=1),
        samples=SampleConfig(count=0),
    )  # fmt: skip
