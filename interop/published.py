"""A published model at hand: opened and checked as a whole before a weight is read."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop.check import check, head_name
from interop.families import FAMILIES, family_of, ignored
from interop.load import ModelFilesError, Source, TensorInfo
from interop.pieces import Piece
from interop.safetensors import SafetensorsFolder
from interop.translate import UnsupportedModelError
from model.config import ModelConfig

# How quantized weights become floats: a module with dequantize(source, quantization_config) -> Source.
QUANTIZED = {"fp8": "interop.fp8", "mxfp4": "interop.mxfp4"}


class Published(NamedTuple):
    family: str  # of families.py
    config: ModelConfig
    pieces: list[Piece]
    source: Source
    unread: list[str]  # keys of config.json that nothing read
    notes: tuple[str, ...] = ()  # what is odd in the files but harmless


def open_published(path: Path | str) -> Published:
    """Opens a folder of config.json and safetensors, or a GGUF file.

    Every tensor that the config asks for is there in its shape, and none is left over. Raises UnsupportedModelError and
    ModelFilesError, which name file, key or tensor and fix. Only headers are read (and, of tied embeddings that the
    files hold twice, both).
    """
    path = Path(path)
    try:
        return _opened(path)
    except OSError as error:
        raise ModelFilesError(
            f"{path}: cannot be read ({error}); look whether all of its files are there, and may be read"
        ) from error


def _opened(path: Path) -> Published:
    if path.is_file():
        values, source, notes = *_open_gguf(path), []
        where = str(path)
    elif path.is_dir():
        where = str(path / "config.json")
        values = read_config(path)
        family_of(values, where)  # an architecture that is not supported is told before a file that is missing
        folder = SafetensorsFolder(path)
        source, notes = _dequantized(folder, values, where), folder.notes
    else:
        raise ModelFilesError(
            f"{path}: there is no such path; give a folder with config.json and safetensors, or a .gguf file"
        )
    family, config, unread = family_of(values, where)
    rename = getattr(FAMILIES[family], "rename", None)
    if rename is not None and (names := rename(source.tensors)):
        source = Renamed(source, names)
    pieces = FAMILIES[family].pieces(config)
    check(
        pieces,
        source,
        config,
        head_name(FAMILIES[family].pieces, config),
        lambda name: ignored(family, name, config),
        str(path),
    )
    return Published(family, config, pieces, source, unread, tuple(notes))


class Renamed:
    """A Source under other names: `names` maps those that differ from the source's to its own."""

    def __init__(self, source: Source, names: dict[str, str]):
        self.source, self.theirs = source, {new: old for old, new in names.items()}
        self.tensors: dict[str, TensorInfo] = {names.get(name, name): info for name, info in source.tensors.items()}
        if len(self.tensors) < len(source.tensors):
            old, new = next(iter(names.items()))
            raise ModelFilesError(
                f"the files hold tensors under two names, as {old!r} and as {new!r}; remove one of each"
            )

    def read(self, name: str) -> np.ndarray:
        return self.source.read(self.theirs.get(name, name))

    def release(self) -> None:
        self.source.release()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder. Raises ModelFilesError."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelFilesError(
                f"{folder}: holds an adapter (LoRA), which is no model by itself; merge it into its base model "
                "(peft: merge_and_unload) and save that"
            )
        if (folder / "snapshots").is_dir():
            raise ModelFilesError(
                f"{folder}: is a cache of several versions; give one of the folders in {folder / 'snapshots'}"
            )
        if ggufs := sorted(f.name for f in folder.glob("*.gguf")):
            raise ModelFilesError(f"{folder}: there is no config.json, but {ggufs[0]}: give the path of that file")
        raise ModelFilesError(
            f"{folder}: there is no config.json; a published model's folder has one beside its safetensors"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path}: is not JSON ({str(error)[:120]}); download it again") from None
    if not isinstance(values, dict):
        raise ModelFilesError(f"{path}: is not a table of keys; download it again")
    return values


def _open_gguf(path: Path) -> tuple[dict[str, Any], Source]:
    with path.open("rb") as f:
        magic = f.read(4)
    if magic != b"GGUF" and path.suffix != ".gguf":
        raise ModelFilesError(
            f"{path}: a single file that is not GGUF; give the folder that holds it, with its config.json"
        )
    return import_module("interop.gguf").open_gguf(path)


def _dequantized(source: Source, values: dict[str, Any], where: str) -> Source:
    """The source as floats, where config.json says that it is quantized."""
    quantization = values.get("quantization_config")
    if not quantization:
        return source
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(method, str) or method not in QUANTIZED:
        raise UnsupportedModelError(
            f"{where}: quantization_config.quant_method = {method!r} cannot be read; supported: "
            f"{', '.join(QUANTIZED)}; take the "
            "model's release in bfloat16, or a GGUF file"
        )
    return import_module(QUANTIZED[method]).dequantize(source, quantization)
