"""A small corpus and configs for it, fast enough for property tests."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import settings

from data.config import DataConfig, SourceConfig, TokenizerConfig
from data.prepare import prepare

# The time of an example depends on the load of the machine.
settings.register_profile("no_deadline", deadline=None)
settings.load_profile("no_deadline")


def write_corpus(folder: Path, documents: int, seed: int = 0, longest: int = 300) -> SourceConfig:
    """Write distinct files of 1 to `longest` random words, and return them as a source named after the folder."""
    folder.mkdir(parents=True)
    draw = random.Random(f"{folder.name} {seed}")
    for i in range(documents):
        words = (
            draw.choice(["def", "return", "x", "é", "(self)", "\n    ", "日本"])
            for _ in range(draw.randint(1, longest))
        )
        folder.joinpath(f"{i:03}.py").write_text(f"{folder.name} {i} " + " ".join(words), encoding="utf-8", newline="")
    return SourceConfig(name=folder.name, path=str(folder))


def byte_config(root: Path, *sources: SourceConfig, **changes: object) -> DataConfig:
    """Return a config with the byte tokenizer, windows of 32, batches of 8 and a cache under `root`."""
    fields = {
        "sources": sources,
        "tokenizer": TokenizerConfig(kind="byte"),
        "sequence_length": 32,
        "batch_size": 8,
        "holdout_fraction": 0.2,
        "cache_dir": str(root / "cache"),
    }
    return DataConfig(**{**fields, **changes})


@pytest.fixture(scope="session")
def two_sources(tmp_path_factory):
    """Return (prepared, config) of a large and a small source."""
    root = tmp_path_factory.mktemp("two_sources")
    config = byte_config(root, write_corpus(root / "large", 40), write_corpus(root / "small", 6, longest=60))
    return prepare(config), config
