"""A folder's safetensors files as a Source. Opening checks every file; reading gives views of the files.

Format (github.com/huggingface/safetensors): 8 bytes with the little-endian length of the JSON header; the header, which
maps each name to its dtype, shape and byte range [begin, end) in the data; then the data, without holes. The
safetensors package is not used, because its NumPy reader supports neither bfloat16 nor float8 and cannot release pages.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from interop.load import ModelFilesError, TensorInfo

DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HEADER_LIMIT = 100_000_000  # bytes; the safetensors package has the same limit
AHEAD = 64 << 20  # bytes of a tensor that the system is asked to read ahead


class Entry(NamedTuple):
    """Location and type of a tensor in its file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    size: int  # bytes


class SafetensorsFolder:
    """The `load.Source` of all tensors in a folder. Raises ModelFilesError for damaged or incomplete files.

    `notes`: harmless oddities of the files. `files`: the files that are read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.notes: list[str] = []
        self.files, index = _choose(folder, self.notes)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                other = self.entries.setdefault(name, entry)
                if other is not entry:
                    raise ModelFilesError(
                        f"{folder}: {name} is both in {other.file.name} and in {file.name}: the folder mixes files of "
                        "two checkpoints. Download the model again into an empty folder"
                    )
        if index is not None:
            _check_index(folder, index, self.entries, self.notes)
        self.tensors = {n: TensorInfo(e.shape, e.dtype.name, e.file.name) for n, e in self.entries.items()}
        self._maps: dict[Path, mmap.mmap] = {}
        # The last two tensors read (a weight and its scales), as (map, first byte, end).
        self._recent: deque[tuple[mmap.mmap, int, int]] = deque(maxlen=2)

    def read(self, name: str) -> np.ndarray:
        """Return the tensor as a read-only view of its file, and ask the system to read it ahead."""
        entry = self.entries[name]
        if entry.size == 0:
            return np.zeros(entry.shape, entry.dtype)
        if entry.file not in self._maps:
            with entry.file.open("rb") as f:
                self._maps[entry.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        mapped, start, stop = self._maps[entry.file], entry.offset, entry.offset + entry.size
        self._recent.append((mapped, start, stop))
        _advise(mapped, "MADV_WILLNEED", start, min(stop, start + AHEAD))
        return np.frombuffer(mapped, entry.dtype, math.prod(entry.shape), start).reshape(entry.shape)

    def release(self) -> None:
        """Release the pages of the last two tensors read. Views stay valid; the system reads them again if needed."""
        for mapped, start, stop in self._recent:
            _advise(mapped, "MADV_DONTNEED", start, stop)


def _advise(mapped: mmap.mmap, advice: str, start: int, stop: int) -> None:
    if hasattr(mmap, advice):  # without this call, pages stay until the system needs the memory
        start -= start % mmap.PAGESIZE
        mapped.madvise(getattr(mmap, advice), start, stop - start)


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of one safetensors file in data order, reading only the header. Raises ModelFilesError unless
    the tensors account for every byte of the file."""
    header, start = _parse(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "__metadata__ in its header is not an object of strings")
    entries, end = {}, 0
    for name, value in sorted(header.items(), key=lambda item: _offsets(file, *item)):
        begin, stop = _offsets(file, name, value)
        shape, dtype = value.get("shape"), value.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _damaged(file, f"{name} has the unknown dtype {dtype!r} (known: {', '.join(DTYPES)})")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
            raise _damaged(file, f"{name} has the invalid shape {str(shape)[:80]}")
        kind = np.dtype(DTYPES[dtype])
        if (
            math.prod(n or 1 for n in shape) * kind.itemsize >= 1 << 62
            or math.prod(shape) * kind.itemsize != stop - begin
        ):
            raise _damaged(file, f"{name} is {dtype}{shape}, which does not fit its {stop - begin} bytes")
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else f"leaves {begin - end} bytes unused before it"
            raise _damaged(file, f"{name} {what}")
        entries[name], end = Entry(file, kind, tuple(shape), start + begin, stop - begin), stop
    size = file.stat().st_size
    if start + end > size:
        raise ModelFilesError(
            f"{file}: truncated: {start + end:,} bytes expected, {size:,} found. The download or copy was cut short; "
            f"repeat it"
        )
    if start + end < size:
        raise _damaged(file, f"{size - start - end:,} bytes follow the last tensor")
    return entries


def _parse(file: Path) -> tuple[dict[str, Any], int]:
    """Return the JSON header and the offset of the data."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        if head.startswith(b"version "):
            raise ModelFilesError(f"{file}: is a Git LFS pointer, not the file. Run git lfs pull in its repository")
        length = int.from_bytes(head, "little")
        if len(head) < 8:
            raise ModelFilesError(
                f"{file}: truncated: {size} bytes found; a safetensors file has more than 8. Download it again"
            )
        if length > HEADER_LIMIT:
            raise _damaged(
                file, f"its header claims {length:,} bytes (maximum {HEADER_LIMIT:,}): not a safetensors file"
            )
        if 8 + length > size:
            raise ModelFilesError(
                f"{file}: truncated: {8 + length:,} bytes expected for its header alone, {size:,} found. Repeat the "
                f"download or copy"
            )
        text = f.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({str(error)[:120]})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a JSON object")
    return header, 8 + length


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _offsets(file: Path, name: str, value: Any) -> tuple[int, int]:
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise _damaged(file, f"{name} has no valid data_offsets in the header")
    if offsets[0] > offsets[1]:
        raise _damaged(file, f"{name} ends before it begins")
    return offsets[0], offsets[1]


def _damaged(file: Path, what: str) -> ModelFilesError:
    return ModelFilesError(f"{file}: damaged: {what}. Download or write it again")


def _choose(folder: Path, notes: list[str]) -> tuple[list[Path], dict[str, Any] | None]:
    """Return the files to read, and their index if there is one.

    Files in Hugging Face's layout take precedence: Mistral's folders hold every weight twice, in model-*.safetensors
    and in consolidated.safetensors.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], None
    if (folder / INDEX).is_file():
        return _indexed(folder)
    files = sorted(folder.glob("*.safetensors"))
    numbered = [match for file in files if (match := NUMBERED.fullmatch(file.name))]
    if numbered and len({(m[1], m[3]) for m in numbered}) == 1:
        there = {int(m[2]) for m in numbered}
        missing = sorted(set(range(1, int(numbered[0][3]) + 1)) - there)
        if missing:
            names = ", ".join(f"{numbered[0][1]}-{i:05d}-of-{numbered[0][3]}.safetensors" for i in missing[:8])
            raise ModelFilesError(
                f"{folder}: {len(missing)} of its {int(numbered[0][3])} shards are missing: {names}. Download them"
            )
        notes.append(f"there is no {INDEX}; the shards were found by their numbers")
        return [folder / m[0] for m in numbered], None
    if len(files) == 1:
        return files, None
    if files:
        raise ModelFilesError(
            f"{folder}: {len(files)} safetensors files ({', '.join(f.name for f in files[:4])}) but no {INDEX} that "
            "lists the model's files. Keep one file, or download the index"
        )
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise ModelFilesError(
            f"{folder}: {pickles[0]} is a pickle, which is not read because loading it can run any code. Use the "
            "model's safetensors. If you trust the file, convert it: load it with transformers and call "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    raise ModelFilesError(f"{folder}: holds no model. Add {SINGLE}, or {INDEX} and its shards")


def _indexed(folder: Path) -> tuple[list[Path], dict[str, Any]]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
        weight_map = index["weight_map"]
        plain = all(
            isinstance(f, str) and Path(f).name == f and f.endswith(".safetensors") for f in weight_map.values()
        )
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"it holds no weight_map ({type(error).__name__}: {str(error)[:120]})") from None
    if not weight_map or not plain:
        raise _damaged(path, "its weight_map must name safetensors files in the same folder")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        names = ", ".join(missing[:8])
        raise ModelFilesError(
            f"{folder}: {len(missing)} of {len(files)} files that {INDEX} names are missing: {names}. Download them"
        )
    return files, index


def _check_index(folder: Path, index: dict[str, Any], entries: dict[str, Entry], notes: list[str]) -> None:
    for name, file in index["weight_map"].items():
        if name not in entries:
            raise ModelFilesError(
                f"{folder / INDEX}: {name} should be in {file}, which does not hold it: the index and the shards "
                "belong to different checkpoints. Download them again"
            )
        if entries[name].file.name != file:
            raise ModelFilesError(
                f"{folder / INDEX}: {name} should be in {file} but is in {entries[name].file.name}: the index and the "
                "shards belong to different checkpoints. Download them again"
            )
    metadata, found = index.get("metadata"), sum(entry.size for entry in entries.values())
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != found:  # published models have this if tied weights were dropped after counting
        notes.append(
            f"{INDEX}: total_size = {total}, but its tensors have {found} bytes; harmless, since every tensor is whole"
        )
