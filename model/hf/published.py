"""A published model at hand: opened and checked as a whole before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from model.config import ModelConfig
from model.hf.load import Source
from model.hf.pieces import Piece


class Published(NamedTuple):
    family: str  # of families.py
    config: ModelConfig
    pieces: list[Piece]
    source: Source
    unread: list[str]  # keys of config.json that nothing read


def open_published(path: Path) -> Published:
    """Opens a folder of config.json and safetensors, or a GGUF file.

    Every tensor that the config asks for is there in its shape, and none is left over. Raises UnsupportedModelError and
    ModelFilesError, which name file, key or tensor and fix; nothing but headers was read.
    """
    raise NotImplementedError
