"""Save a network as a published model: config.json and safetensors, as transformers writes and reads them.

Tensors are fetched from the shards one at a time, so that besides them the host holds only the largest tensor. Files
are written into a staging folder next to the target and renamed at the end, so that the target is always complete.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import numpy as np

from interop.families import FAMILIES, to_json
from interop.load import SLAB_BYTES, ModelFilesError, converted, named
from interop.safetensors import DTYPES, INDEX, SINGLE
from interop.slabs import check_cover, elements, fetch, slabs
from interop.tensor_map import TensorEntry
from model.config import ModelConfig
from model.transformer import Transformer

SHARD_BYTES = 5_000_000_000  # maximum size of a file; transformers' default
SAVED_DTYPES = ("float32", "bfloat16", "float16")
STAGING = ".writing"


class _Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    parts: list[TensorEntry]


def save_published(
    model: Transformer, config: ModelConfig, folder: Path, *, family: str | None = None, dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES, more: Mapping[str, Any] | None = None,
    progress: Callable[[TensorEntry, int], object] = lambda entry, size: None,
) -> str:  # fmt: skip
    """Write config.json and the weights as `dtype` to `folder`, which must be empty or not exist. Return the family.

    `family`: key of families.FAMILIES; None: the first whose config.json can express `config`. `shard_bytes`: maximum
    size of a file; larger models are split into several files with an index. `more`: further keys of config.json (ids
    of special tokens). `progress` is called after each entry with its number of elements.

    Raises UnsupportedModelError if config.json cannot express the network. Raises ModelFilesError if the folder is not
    empty, the disk is full, a weight is not finite or too large for `dtype`, or weights are on other hosts. After an
    error or an interruption, nothing is left on disk.
    """
    if dtype not in SAVED_DTYPES:
        raise ModelFilesError(f"dtype = {dtype!r}: not supported. Supported: {', '.join(SAVED_DTYPES)}")
    family, values = to_json(config, family)
    weights = named(model)
    if not all(weight.is_fully_addressable for weight in weights.values()):
        raise ModelFilesError(
            f"{folder}: the weights are spread over several hosts, but one host must write a published model. Restore "
            "the checkpoint on one host with enough memory for the weights, and export there"
        )
    tensor_map = FAMILIES[family].tensor_map(config)
    check_cover(tensor_map, weights)
    grouped = groupby(sorted(tensor_map, key=_order(tensor_map)), key=lambda p: p.name)
    tensors = [_Tensor(name, parts[0].shape, parts) for name, group in grouped if (parts := list(group))]
    empty = getattr(FAMILIES[family], "empty", None)
    tensors += [_Tensor(name, shape, []) for name, shape in (empty(config) if empty else {}).items()]
    with _writable(folder, sum(math.prod(t.shape) for t in tensors) * np.dtype(dtype).itemsize) as staging:
        files = _pack(tensors, np.dtype(dtype).itemsize, shard_bytes)
        for name, content in files.items():
            with (staging / name).open("wb") as f:
                f.write(_header(content, dtype))
                for tensor in content:
                    _write(f, _gather(tensor, weights, np.dtype(dtype)))
                    for entry in tensor.parts:
                        progress(entry, elements(entry))
                _sync(f)
        if len(files) > 1:
            total = sum(math.prod(t.shape) for t in tensors) * np.dtype(dtype).itemsize
            file_of = {t.name: name for name, content in files.items() for t in content}
            _write_json(staging / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})
        _write_json(staging / "config.json", values | {"torch_dtype": dtype} | dict(more or {}))
    return family


def _order(tensor_map: list[TensorEntry]) -> Callable[[TensorEntry], int]:
    first = {entry.name: i for i, entry in reversed(list(enumerate(tensor_map)))}
    return lambda entry: first[entry.name]


def _pack(tensors: list[_Tensor], itemsize: int, shard_bytes: int) -> dict[str, list[_Tensor]]:
    """Return each file's tensors: up to `shard_bytes`, and at least one tensor."""
    files: list[list[_Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if files[-1] and used + size > shard_bytes:
            files.append([])
            used = 0
        files[-1].append(tensor)
        used += size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": content for i, content in enumerate(files, 1)}


def _header(tensors: list[_Tensor], dtype: str) -> bytes:
    kind = next(kind for kind, name in DTYPES.items() if name == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this entry
    begin = 0
    for tensor in tensors:
        end = begin + math.prod(tensor.shape) * np.dtype(dtype).itemsize
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _gather(tensor: _Tensor, weights: dict[str, jax.Array], dtype: np.dtype) -> np.ndarray:
    """Return the tensor as it is on disk, assembled from the weights."""
    found = np.empty(tensor.shape, dtype)
    for entry in tensor.parts:
        for slab in slabs(entry, found, weights[entry.leaf].shape, SLAB_BYTES):
            slab.values[...] = converted(fetch(weights[entry.leaf], slab.low, slab.high), dtype, tensor.name)
    return found


def _write(f: IO[bytes], array: np.ndarray) -> None:
    f.write(array.reshape(-1).view(np.uint8).data)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("wb") as f:
        f.write((json.dumps(values, indent=2) + "\n").encode())
        _sync(f)


def _sync(f: IO[bytes]) -> None:
    f.flush()
    os.fsync(f.fileno())


@contextmanager
def _writable(folder: Path, size: int) -> Iterator[Path]:
    """Yield a staging folder for `size` bytes that becomes `folder`, or `folder` itself if it exists and is empty: it
    may be a caller's own staging folder. Raises ModelFilesError if it is not empty or the disk is full."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelFilesError(f"{folder}: already exists and is not empty. Choose another folder, or delete it")
    try:
        with _emptied(folder) if folder.exists() else staged(folder) as staging:
            if shutil.disk_usage(staging).free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield staging
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelFilesError(
                f"{folder}: the disk is full: the weights need {size / 1e6:,.0f} MB. Free some space, or choose a "
                "smaller dtype or another disk. Nothing was saved"
            ) from error
        raise ModelFilesError(f"{folder}: cannot be written ({error}). Nothing was saved") from error


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, and empty it again on failure."""
    try:
        yield folder
    except BaseException:
        for path in folder.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


@contextmanager
def staged(folder: Any, log: Callable[[str], object] = print) -> Iterator[Any]:
    """Yield a staging folder next to `folder` (a pathlib or etils path) that only this process uses.

    On success it replaces `folder`; on failure it is removed. Leftovers of killed processes are removed first and
    passed to `log`.
    """
    remove_leftovers(folder, log)
    staging, descriptor = _locked_staging_folder(folder)
    try:
        yield staging
        staging.replace(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Any, log: Callable[[str], object] = print) -> None:
    """Remove and `log` the staging folders of `folder` that belong to processes that no longer run.

    Running processes hold locks on their staging folders, and those stay. On a file system without locks, log the
    staging folders and remove none.
    """
    if not folder.parent.is_dir():
        return
    name = re.compile(rf"\.+{re.escape(folder.name)}(\.[0-9a-f]{{8}}{re.escape(STAGING)})+")
    for leftover in sorted(path for path in folder.parent.iterdir() if name.fullmatch(path.name) and path.is_dir()):
        try:
            descriptor = os.open(leftover, os.O_RDONLY)
        except OSError:
            continue  # its writer has just finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(leftover, ignore_errors=True)
            if leftover.exists():
                log(f"note: a killed process left {leftover}, which cannot be removed; delete it")
            else:
                log(f"removed {leftover}, which a killed process left")
        except BlockingIOError:
            pass  # its writer is running
        except OSError as error:
            log(f"note: a killed process may have left {leftover} ({error.strerror}); delete it if so")
        finally:
            os.close(descriptor)


def _locked_staging_folder(folder: Any) -> tuple[Any, int]:
    """Return a new staging folder for `folder`, and the descriptor that holds its lock while this process runs."""
    while True:
        staging = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{STAGING}")
        staging.mkdir(parents=True)
        descriptor = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process took it for a leftover
            os.close(descriptor)
            continue
        except OSError:  # the file system has no locks, so no other process can take the folder for a leftover
            return staging, descriptor
        if staging.exists() and os.path.samestat(os.stat(staging), os.fstat(descriptor)):
            return staging, descriptor
        os.close(descriptor)  # removed before it was locked
