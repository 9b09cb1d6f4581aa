"""An experiment and a study that train in a moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data.config import DataConfig, SourceConfig, TokenizerConfig
from experiments.study.definition import Scale, Study
from model.config import MLPConfig
from tests.train.small_runs import TINY
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig


def tiny_experiment(text: Path, cache: Path) -> Experiment:
    """Return 12 steps of a network of one layer on bytes of small functions, which are written to `text` once."""
    for i in range(0 if any(text.iterdir()) else 40):
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


def tiny_study(folder: Path, seeds: int) -> Study:
    """Return a study of the tiny experiment at a low and a high rate, and at one with which it diverges.

    Its text and prepared data are in the folder.
    """
    (folder / "text").mkdir(exist_ok=True)
    return Study(
        name="tiny",
        question="Is a higher rate better?",
        source="none",
        base=tiny_experiment(folder / "text", folder / "cache"),
        arms={"low": {}, "high": {"optimizer.learning_rate": 0.02}, "bad": {"optimizer.learning_rate": 1e30}},
        scales={"cpu": Scale(tokens=12 * 8 * 32, seeds=seeds)},
        claims=(),
    )
