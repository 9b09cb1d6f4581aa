"""Open a published model and check all of its files before reading any weight."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop.check import check, head_name
from interop.families import FAMILIES, family_of, ignored
from interop.load import ModelFilesError, Source, TensorInfo
from interop.safetensors import SafetensorsFolder
from interop.tensor_map import TensorEntry
from interop.translate import UnsupportedModelError
from model.config import ModelConfig

# Quantization methods, and the module whose dequantize(source, quantization_config) -> Source decodes each.
QUANTIZED = {"fp8": "interop.fp8", "mxfp4": "interop.mxfp4"}


class Published(NamedTuple):
    family: str  # key of families.FAMILIES
    config: ModelConfig
    tensor_map: list[TensorEntry]
    source: Source
    unread: list[str]  # unused keys of config.json
    notes: tuple[str, ...] = ()  # harmless oddities of the files


def open_published(path: Path | str) -> Published:
    """Open a folder of config.json and safetensors, or a GGUF file.

    Checks that every tensor the config requires exists with its shape and that none is left over. Raises
    UnsupportedModelError or ModelFilesError, whose message names the file, the key or tensor, and the fix. Reads only
    headers, except that a tied embedding stored twice is compared with its copy.
    """
    path = Path(path)
    try:
        return _open_path(path)
    except OSError as error:
        raise ModelFilesError(
            f"{path}: cannot be read ({error}). Check that all of its files exist and are readable"
        ) from error


def _open_path(path: Path) -> Published:
    if path.is_file():
        values, source, notes = *_open_gguf(path), []
        where = str(path)
    elif path.is_dir():
        where = str(path / "config.json")
        values = read_config(path)
        family_of(values, where)  # report an unsupported architecture before a missing file
        folder = SafetensorsFolder(path)
        source, notes = _dequantized(folder, values, where), folder.notes
    else:
        raise ModelFilesError(
            f"{path}: does not exist. Give a folder with config.json and safetensors, or a .gguf file"
        )
    family, config, unread = family_of(values, where)
    rename = getattr(FAMILIES[family], "rename", None)
    if rename is not None and (names := rename(source.tensors)):
        source = Renamed(source, names)
    tensor_map = FAMILIES[family].tensor_map(config)
    check(
        tensor_map,
        source,
        config,
        head_name(FAMILIES[family].tensor_map, config),
        lambda name: ignored(family, name, config),
        str(path),
    )
    return Published(family, config, tensor_map, source, unread, tuple(notes))


class Renamed:
    """A Source with renamed tensors; `names` maps a name in `source` to its new name."""

    def __init__(self, source: Source, names: dict[str, str]):
        self.source, self.theirs = source, {new: old for old, new in names.items()}
        self.tensors: dict[str, TensorInfo] = {names.get(name, name): info for name, info in source.tensors.items()}
        if len(self.tensors) < len(source.tensors):
            old, new = next(iter(names.items()))
            raise ModelFilesError(
                f"the files hold tensors under two names, such as {old!r} and {new!r}. Remove one of each"
            )

    def read(self, name: str) -> np.ndarray:
        return self.source.read(self.theirs.get(name, name))

    def release(self) -> None:
        self.source.release()


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a folder, parsed. Raises ModelFilesError."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelFilesError(
                f"{folder}: holds a LoRA adapter, not a complete model. Merge it into its base model (peft: "
                "merge_and_unload) and save the result"
            )
        if (folder / "snapshots").is_dir():
            raise ModelFilesError(
                f"{folder}: is a cache of several versions. Give one of the folders in {folder / 'snapshots'}"
            )
        if ggufs := sorted(f.name for f in folder.glob("*.gguf")):
            raise ModelFilesError(f"{folder}: holds {ggufs[0]} but no config.json. Give the path of that file")
        raise ModelFilesError(
            f"{folder}: there is no config.json. Give a folder that holds config.json and the safetensors files"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFilesError(f"{path}: is not JSON ({str(error)[:120]}). Download it again") from None
    if not isinstance(values, dict):
        raise ModelFilesError(f"{path}: is not a JSON object. Download it again")
    return values


def _open_gguf(path: Path) -> tuple[dict[str, Any], Source]:
    with path.open("rb") as f:
        magic = f.read(4)
    if magic != b"GGUF" and path.suffix != ".gguf":
        raise ModelFilesError(f"{path}: is not a GGUF file. Give the folder that holds it and its config.json")
    return import_module("interop.gguf").open_gguf(path)


def _dequantized(source: Source, values: dict[str, Any], where: str) -> Source:
    """Return the source, decoded to floating point if config.json has a quantization_config."""
    quantization = values.get("quantization_config")
    if not quantization:
        return source
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if not isinstance(method, str) or method not in QUANTIZED:
        raise UnsupportedModelError(
            f"{where}: quantization_config.quant_method = {method!r}: not supported (supported: "
            f"{', '.join(QUANTIZED)}). Use the model's bfloat16 release or a GGUF file"
        )
    return import_module(QUANTIZED[method]).dequantize(source, quantization)
