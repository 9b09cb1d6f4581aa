"""The safetensors files of a folder as a Source: checked as a whole on opening, read as views of the files.

Format (github.com/huggingface/safetensors): 8 bytes, the little-endian length of a JSON header; the header, name to
dtype, shape and [begin, end) in the data; the data, without holes. Read here rather than by the package of that name,
which in NumPy knows neither bfloat16 nor float8 and cannot give pages back.
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
HEADER_LIMIT = 100_000_000  # bytes; that of the safetensors package
AHEAD = 64 << 20  # bytes of a tensor that the system is asked to read before they are needed


class Entry(NamedTuple):
    """A tensor in its file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file
    size: int  # bytes


class SafetensorsFolder:
    """Source of all tensors of a folder (`load.Source`). Raises ModelFilesError for files that are not whole.

    `notes`: what is odd in the files but harmless. `files`: those that are read.
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
                        f"{folder}: {name} is both in {other.file.name} and in {file.name}: files of two checkpoints "
                        "are mixed; download the model again into an empty folder"
                    )
        if index is not None:
            _check_index(folder, index, self.entries, self.notes)
        self.tensors = {n: TensorInfo(e.shape, e.dtype.name, e.file.name) for n, e in self.entries.items()}
        self._maps: dict[Path, mmap.mmap] = {}
        # Of the tensors read last (weights and their scales): map, first byte, end.
        self._recent: deque[tuple[mmap.mmap, int, int]] = deque(maxlen=2)

    def read(self, name: str) -> np.ndarray:
        """The tensor, a read-only view of its file; the system begins to read it from disk."""
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
        """Gives the pages of the two tensors read last back to the system; views stay valid and are read anew."""
        for mapped, start, stop in self._recent:
            _advise(mapped, "MADV_DONTNEED", start, stop)


def _advise(mapped: mmap.mmap, advice: str, start: int, stop: int) -> None:
    if hasattr(mmap, advice):  # else: the system has no such call, and pages stay until they are needed elsewhere
        start -= start % mmap.PAGESIZE
        mapped.madvise(getattr(mmap, advice), start, stop - start)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, in the order of their data. Raises ModelFilesError unless all of the file is
    accounted for; reads the header alone."""
    header, start = _parse(file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(file, "__metadata__ in its header is not a table of texts")
    entries, end = {}, 0
    for name, value in sorted(header.items(), key=lambda item: _offsets(file, *item)):
        begin, stop = _offsets(file, name, value)
        shape, dtype = value.get("shape"), value.get("dtype")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _damaged(file, f"{name} has the dtype {dtype!r}; known are {', '.join(DTYPES)}")
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > 32:
            raise _damaged(file, f"{name} has the shape {str(shape)[:80]}")
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
            f"{file}: truncated: {start + end:,} bytes expected, {size:,} found; the download or copy was cut short, "
            f"repeat it"
        )
    if start + end < size:
        raise _damaged(file, f"{size - start - end:,} bytes follow the last tensor")
    return entries


def _parse(file: Path) -> tuple[dict[str, Any], int]:
    """The JSON header and where the data begins."""
    size = file.stat().st_size
    with file.open("rb") as f:
        head = f.read(8)
        if head.startswith(b"version "):
            raise ModelFilesError(
                f"{file}: is a pointer of Git LFS, not the file itself; run git lfs pull in its repository"
            )
        length = int.from_bytes(head, "little")
        if len(head) < 8:
            raise ModelFilesError(
                f"{file}: truncated: {size} bytes found, a safetensors file has more than 8; download it again"
            )
        if length > HEADER_LIMIT:
            raise _damaged(
                file, f"its header claims {length:,} bytes, of {HEADER_LIMIT:,} at most: not a safetensors file"
            )
        if 8 + length > size:
            raise ModelFilesError(
                f"{file}: truncated: {8 + length:,} bytes expected for its header alone, {size:,} found; repeat the "
                f"download or copy"
            )
        text = f.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({str(error)[:120]})") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not a table of tensors")
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
    return ModelFilesError(f"{file}: damaged: {what}; download or write it again")


def _choose(folder: Path, notes: list[str]) -> tuple[list[Path], dict[str, Any] | None]:
    """The files to read and their index, if there is one. Files in the layout of Hugging Face come before others
    (Mistral's folders hold every weight twice: as model-*.safetensors and as consolidated.safetensors)."""
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
                f"{folder}: {len(missing)} of its {int(numbered[0][3])} shards are missing: {names}; download them"
            )
        notes.append(f"there is no {INDEX}; its shards were read by their numbers")
        return [folder / m[0] for m in numbered], None
    if len(files) == 1:
        return files, None
    if files:
        raise ModelFilesError(
            f"{folder}: {len(files)} safetensors files ({', '.join(f.name for f in files[:4])}) and no {INDEX} that "
            "says which belong to the model; keep one, or download the index"
        )
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
    if pickles:
        raise ModelFilesError(
            f"{folder}: {pickles[0]} is a pickle: reading one runs whatever code it holds, so none is read. Take the "
            "model's safetensors, or make them where you trust the file: there, load it with transformers and "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    raise ModelFilesError(f"{folder}: holds no model: {SINGLE} or {INDEX} with its shards are needed")


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
        raise _damaged(path, "its weight_map must name safetensors files of the same folder")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        names = ", ".join(missing[:8])
        raise ModelFilesError(
            f"{folder}: {len(missing)} of {len(files)} files that {INDEX} names are missing: {names}; download them"
        )
    return files, index


def _check_index(folder: Path, index: dict[str, Any], entries: dict[str, Entry], notes: list[str]) -> None:
    for name, file in index["weight_map"].items():
        if name not in entries:
            raise ModelFilesError(
                f"{folder / INDEX}: {name} should be in {file}, which does not hold it: index and shards are of two "
                "checkpoints; download them again"
            )
        if entries[name].file.name != file:
            raise ModelFilesError(
                f"{folder / INDEX}: {name} should be in {file} and is in {entries[name].file.name}: index and shards "
                "are of two checkpoints; download them again"
            )
    metadata, found = index.get("metadata"), sum(entry.size for entry in entries.values())
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != found:  # so in published models: counted before tied weights were dropped
        notes.append(
            f"{INDEX}: total_size = {total}, but its tensors are {found} bytes; each is there and whole: harmless"
        )
