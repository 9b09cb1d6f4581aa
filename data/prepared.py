"""A prepared corpus: an immutable folder, local or in a bucket, whose manifest lists shards, sizes and checksums.

Nothing of it is held whole in memory except the starts of held-out documents: windows and held-out tokens are read by
ranges of bytes (data/ranges.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataError
from data.packing import token_dtype
from data.paths import Folder, bucket_client, is_local, parse_path
from data.ranges import Range, RangeReader, range_reader
from data.storage import Checksums
from data.tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
PARTS = ("tokens", "segment_ids")


@dataclass(frozen=True)
class SourceCounts:
    """Document and token counts of one source."""

    name: str
    documents: int  # distinct and readable
    skipped: int
    first_skipped: tuple[str, ...]  # "name: reason", at most five
    empty: int
    duplicates: int
    train_documents: int
    train_bytes: int
    train_tokens: int  # including the opening and end tokens of each document
    windows: int
    heldout_documents: int
    heldout_bytes: int
    heldout_tokens: int
    max_id: int
    shards: tuple[int, ...] = ()  # windows of each shard; empty for one shard


class FlatArray:
    """An .npy file of one or two dimensions whose rows are read by ranges of bytes."""

    def __init__(self, reader: RangeReader, name: str, dtype: np.dtype, shape: tuple[int, ...], size: int):
        self._reader, self._name, self.dtype, self.shape = reader, name, dtype, shape
        self._row = dtype.itemsize * int(np.prod(shape[1:]))
        self._header = size - shape[0] * self._row  # the header's length, since the size of the file is known

    def __len__(self) -> int:
        return self.shape[0]

    def ranges(self, rows: Sequence[tuple[int, int]]) -> list[Range]:
        """Return the bytes of each run of rows [first, last)."""
        return [Range(self._name, self._header + a * self._row, self._header + b * self._row) for a, b in rows]

    def runs(self, rows: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return each run of rows [first, last). Raises DataError with file and offset if they cannot be read."""
        found = self._reader.read(self.ranges(rows))
        return [np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:]) for content in found]

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        """Return the elements at indices [N, L], each row of which is read as one range."""
        spans = [(int(row[0]), int(row[-1]) + 1) for row in index]
        runs = self.runs(spans)
        return np.stack([run[row - first] for run, row, (first, _) in zip(runs, index, spans, strict=True)])


class Windows:
    """The training windows of a source: tokens and segment ids in shards."""

    def __init__(self, reader: RangeReader, shards: Sequence[tuple[FlatArray, FlatArray]]):
        self._reader, self._shards = reader, shards
        self._ends = np.cumsum([len(tokens) for tokens, _ in shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def place(self, window: int) -> tuple[int, int]:
        """Return (shard, row) of a window."""
        shard = int(np.searchsorted(self._ends, window, side="right"))
        return shard, window - (int(self._ends[shard - 1]) if shard else 0)

    def ranges(self, window: int) -> list[Range]:
        """Return the bytes of a window's tokens and of its segment ids."""
        shard, row = self.place(window)
        return [array.ranges([(row, row + 1)])[0] for array in self._shards[shard]]

    def parse(self, window: int, contents: Sequence[bytes]) -> list[np.ndarray]:
        """Return the window's tokens and segment ids from the bytes of its ranges."""
        shard, _ = self.place(window)
        arrays = self._shards[shard]
        return [np.frombuffer(content, array.dtype) for content, array in zip(contents, arrays, strict=True)]


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus. `identity` is the SHA-256 in hex of everything that determines its content."""

    directory: Folder
    identity: str
    tokenizer: Tokenizer
    sequence_length: int
    packing: str
    sources: tuple[SourceCounts, ...]
    sizes: Mapping[str, int] = field(hash=False, repr=False)  # bytes of each file

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def train_names(self) -> tuple[str, ...]:
        """Return the names of the sources with training windows."""
        return tuple(source.name for source in self.sources if source.windows)

    @property
    def heldout_names(self) -> tuple[str, ...]:
        """Return the names of the sources with held-out documents."""
        return tuple(source.name for source in self.sources if source.heldout_documents)

    def counts(self, name: str) -> SourceCounts:
        """Return the counts of one source. Raises DataError for an unknown name."""
        for source in self.sources:
            if source.name == name:
                return source
        raise DataError(f"no source named {name!r}. Sources: {[source.name for source in self.sources]}")

    @cached_property
    def reader(self) -> RangeReader:
        """Return the reader of the folder's files."""
        return range_reader(self.directory)

    def windows(self, name: str) -> Windows:
        """Return the training windows of a source."""
        counts, length = self.counts(name), self.sequence_length + 1
        rows = counts.shards or (counts.windows,)
        dtypes = token_dtype(self.vocab_size), token_dtype(length + 1)
        shards = []
        for stem, count in zip(shard_stems(name, len(rows)), rows, strict=True):
            tokens, segment_ids = (
                self._flat(f"{stem}.{part}.npy", dtype, (count, length))
                for part, dtype in zip(PARTS, dtypes, strict=True)
            )
            shards.append((tokens, segment_ids))
        return Windows(self.reader, shards)

    def heldout(self, name: str) -> tuple[FlatArray, np.ndarray]:
        """Return the stream of a source's held-out tokens [M], which is read by ranges, and its starts [D + 1]."""
        counts = self.counts(name)
        starts = self._flat(f"heldout.{name}.starts.npy", np.dtype(np.int64), (counts.heldout_documents + 1,))
        tokens = self._flat(f"heldout.{name}.tokens.npy", token_dtype(self.vocab_size), (counts.heldout_tokens,))
        return tokens, starts.runs([(0, len(starts))])[0]

    def _flat(self, file: str, dtype: np.dtype, shape: tuple[int, ...]) -> FlatArray:
        return FlatArray(self.reader, file, dtype, shape, self.sizes[file])

    def array(self, name: str) -> np.ndarray:
        """Return a memory-mapped array of a local folder, such as 'train.stdlib.tokens'."""
        return np.load(self.directory / f"{name}.npy", mmap_mode="r")


def shard_stems(name: str, count: int) -> list[str]:
    """Return the stems of a source's shards. The only shard has no number."""
    if count == 1:
        return [f"train.{name}"]
    return [f"train.{name}.{number:05}-of-{count:05}" for number in range(count)]


def open_prepared(directory: str | Folder, *, verify: bool = True) -> Prepared:
    """Open a prepared folder. Raises DataError with the file that is missing, truncated or altered.

    `verify` reads every local file and compares its checksums; otherwise, and in a bucket, which keeps checksums of its
    objects, only sizes are compared.
    """
    directory = Path(directory) if is_local(directory) else parse_path(directory)
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
        files = manifest["files"]
        fields = {name: manifest[name] for name in ("identity", "sequence_length", "packing")}
        sources = tuple(_source_counts(counts) for counts in manifest["sources"])
        sizes = {name: int(size) for name, (size, _) in files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory / MANIFEST} cannot be read ({error}). Remove the folder") from error
    found_sizes = _sizes_in(directory, sizes)
    for name, size in sizes.items():
        path, found = directory / name, found_sizes.get(name)
        if found is None:
            raise DataError(f"{path} is missing. Remove the folder")
        if found != size:
            raise DataError(f"{path} has {found} bytes instead of {size}. Remove the folder")
        if verify and isinstance(path, Path):
            _verify(path, size, files[name][1])
    tokenizer = load_tokenizer(directory / "tokenizer")
    return Prepared(directory=directory, tokenizer=tokenizer, sources=sources, sizes=sizes, **fields)


def _source_counts(counts: dict[str, Any]) -> SourceCounts:
    lists = {name: tuple(counts.get(name, ())) for name in ("first_skipped", "shards")}
    return SourceCounts(**{**counts, **lists})


def _sizes_in(directory: Folder, names: Iterable[str]) -> dict[str, int]:
    """Return the sizes of those files of a folder that exist. A bucket lists them together."""
    if isinstance(directory, Path):
        return {name: (directory / name).stat().st_size for name in names if (directory / name).is_file()}
    listing = bucket_client().find(str(directory), detail=True)
    root = str(directory).partition("://")[2] + "/"
    return {path.lstrip("/").removeprefix(root): info["size"] for path, info in listing.items()}


def _verify(path: Path, size: int, expected: int | list[int]) -> None:
    """Compare a file's checksums. Raises DataError with the first block that was altered.

    A folder of an older version has one checksum per file.
    """
    block_size = size or 1 if isinstance(expected, int) else Checksums.BLOCK
    sums = [expected] if isinstance(expected, int) else expected
    found = Checksums.of(path, block_size).sums or [0]
    for block, (one, other) in enumerate(zip(found, sums or [0], strict=True)):
        if one != other:
            first, last = block * block_size, min(size, (block + 1) * block_size)
            where = f"its {size} bytes" if len(found) == 1 else f"bytes {first} to {last} of {size}"
            raise DataError(f"{path} has the wrong checksum: {where} were altered. Remove the folder")


def heldout_documents(prepared: Prepared, name: str) -> Iterator[tuple[str, str]]:
    """Yield the held-out documents of a source as (name, text), in evaluation order."""
    if not prepared.counts(name).heldout_documents:
        raise DataError(
            f"source {name!r} has no held-out documents. Raise data.holdout_fraction, or use {prepared.heldout_names}"
        )
    return _documents(prepared.directory / f"heldout.{name}.jsonl")


def _documents(path: Folder) -> Iterator[tuple[str, str]]:
    with path.open("rb") as lines:
        for line in lines:
            record = json.loads(line)
            yield record["name"], record["text"]


def heldout_files(prepared: Prepared, name: str) -> list[tuple[str, str]]:
    """Return `heldout_documents` as a list, which holds their text in memory."""
    return list(heldout_documents(prepared, name))
