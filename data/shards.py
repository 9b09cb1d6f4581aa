"""Shards of prepared data: sections of a source's training documents are encoded and packed one at a time.

A source's training documents are divided in reading order into sections of about 64 MiB of text, and packing restarts
in each. So any process can write any section, with equal bytes, in memory that does not grow with the corpus. A
section's windows are one shard: a file of tokens and a file of segment ids. Each section ends with a partly filled
window, which pads less than T tokens per section in the packing 'split'.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.array_files import read_arrays, write_arrays
from data.config import DataConfig, DataError, SourceConfig
from data.corpus import Files, source_root
from data.packing import concatenate, packed_blocks, token_dtype
from data.paths import Folder
from data.storage import ChecksummedFile, Checksums, enough_space, open_array
from data.survey import KeptText, Rereader, Survey
from data.tokenizer import Tokenizer

SECTION_BYTES = 1 << 26
SECTION_DOCUMENTS = 1 << 17  # limits the memory of a section of tiny documents
_ENCODE_DOCUMENTS = 1024
_ENCODE_BYTES = 1 << 22
_COPY_BYTES = 1 << 24
_LOG_SECONDS = 30.0


@dataclass(frozen=True)
class Section:
    """Training documents that become one shard."""

    source: int  # index in DataConfig.sources
    stem: str  # of the shard's files, such as 'train.stdlib' or 'train.web.00003-of-00160'
    files: Files
    table: np.ndarray  # ENTRY [D] of the source
    rows: np.ndarray  # the section's rows of the table

    @property
    def entries(self) -> np.ndarray:
        """Return the section's rows, ENTRY."""
        return self.table[self.rows]

    def save(self, file: Folder) -> None:
        """Write the section for another process. Raises OSError."""
        entries = self.entries
        used, renumbered = np.unique(entries["file"], return_inverse=True)
        entries["file"] = renumbered
        about = [self.source, self.stem, self.files.is_file, [self.files.names[i] for i in used]]
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        write_arrays(file, {"entries": entries, "about": text}, compress=True)

    @classmethod
    def load(cls, file: Folder, sources: tuple[SourceConfig, ...]) -> Section:
        """Read a section. Raises OSError or ValueError."""
        arrays = read_arrays(file)
        source, stem, is_file, names = json.loads(arrays["about"].tobytes())
        entries = arrays["entries"]
        files = Files(source_root(sources[source]), names, is_file)
        return cls(source, stem, files, entries, np.arange(len(entries)))


@dataclass(frozen=True)
class Shard:
    """Figures of a written shard."""

    windows: int
    tokens: int
    max_id: int
    files: dict[str, tuple[int, list[int]]]  # size and checksums of each file


def write_shards(
    folder: Folder,
    config: DataConfig,
    tokenizer: Tokenizer,
    sections: Iterable[Section],
    kept: KeptText | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Shard]:
    """Encode, pack and write sections in order. Return the shards by stem."""
    shards: dict[str, Shard] = {}
    size, started = 0, time.monotonic()
    logged = started
    for source, group in itertools.groupby(sections, lambda section: section.source):
        reader: Rereader | None = None
        try:
            for section in group:
                if reader is None:
                    reader = Rereader(config.sources[source], section.files, kept)
                reader.files = section.files
                shards[section.stem] = _write_shard(folder, config, tokenizer, section, reader)
                size += int(section.entries["size"].sum())
                if (now := time.monotonic()) - logged > _LOG_SECONDS:
                    logged = now
                    log(
                        f"encoded {size / 1e6:,.0f} MB of text into {len(shards)} shards, up to {section.stem} "
                        f"({size / 1e6 / (now - started):.1f} MB/s)"
                    )
        finally:
            if reader is not None:
                reader.close()
    return shards


def _write_shard(folder: Folder, config: DataConfig, tokenizer: Tokenizer, section: Section, reader: Rereader) -> Shard:
    dtype, length = token_dtype(tokenizer.vocab_size), config.sequence_length + 1
    segment_dtype = token_dtype(length + 1)
    contents = (ids for ids, _ in encode(reader.texts(section.entries), tokenizer, dtype))
    stream, starts = concatenate(contents, tokenizer.special.document_start, tokenizer.special.end, dtype)
    max_id = _checked_max(stream, tokenizer, config.sources[section.source].name)
    windows, blocks = packed_blocks(stream, starts, length, config.packing)
    paths = [folder / f"{section.stem}.{part}.npy" for part in ("tokens", "segment_ids")]
    with (
        enough_space(folder / f"{section.stem}.*", windows * length * (dtype.itemsize + segment_dtype.itemsize)),
        open_array(paths[0], (windows, length), dtype) as write_tokens,
        open_array(paths[1], (windows, length), segment_dtype) as write_segment_ids,
    ):
        for tokens, segment_ids in blocks:
            found = write_tokens(tokens), write_segment_ids(segment_ids)
    files = {path.name: (sums.size, sums.sums) for path, sums in zip(paths, found, strict=True)}
    return Shard(windows, len(stream), max_id, files)


def _checked_max(stream: np.ndarray, tokenizer: Tokenizer, name: str) -> int:
    max_id = int(stream.max(initial=0))
    if max_id >= tokenizer.vocab_size:
        raise DataError(f"source {name!r}: token id {max_id} is outside the vocabulary of {tokenizer.vocab_size}")
    return max_id


def encode(texts: Iterator[bytes], tokenizer: Tokenizer, dtype: np.dtype) -> Iterator[tuple[np.ndarray, str]]:
    """Yield (ids, text) of each text. Several texts are encoded together, by threads of the tokenizer's library."""
    while True:
        batch: list[str] = []
        size = 0
        for content in itertools.islice(texts, _ENCODE_DOCUMENTS):
            batch.append(content.decode("utf-8"))
            size += len(content)
            if size >= _ENCODE_BYTES:
                break
        if not batch:
            return
        for ids, text in zip(tokenizer.encode_many(batch), batch, strict=True):
            yield ids.astype(dtype), text


def bytes_per_text_byte(config: DataConfig, tokenizer: Tokenizer, read: Survey, entries: np.ndarray) -> float:
    """Return an estimate of the bytes of shards per byte of training text, from the first documents."""
    few = entries[: max(1, int(np.searchsorted(np.cumsum(entries["size"]), 1 << 20)))][:_ENCODE_DOCUMENTS]
    dtype, segment_dtype = token_dtype(tokenizer.vocab_size), token_dtype(config.sequence_length + 2)
    with Rereader(read.source, read.files) as reader:
        tokens = sum(len(ids) + 2 for ids, _ in encode(reader.texts(few), tokenizer, dtype))
    return tokens * (dtype.itemsize + segment_dtype.itemsize) / int(few["size"].sum())


@dataclass(frozen=True)
class Heldout:
    """Figures of a source's held-out documents."""

    tokens: int
    max_id: int
    files: dict[str, tuple[int, list[int]]]


def write_heldout(
    folder: Folder, read: Survey, entries: np.ndarray, kept: KeptText | None, tokenizer: Tokenizer
) -> Heldout:
    """Write a source's held-out documents as text and one stream of tokens, through a temporary file."""
    name, dtype = read.source.name, token_dtype(tokenizer.vocab_size)
    start, end = tokenizer.special.document_start, tokenizer.special.end
    copy_path, size = folder / f"heldout.{name}.jsonl", int(entries["size"].sum())
    starts, max_id, files = array("q", [0]), 0, {}
    with (
        enough_space(copy_path, size),  # also for the temporary file, which may report a full disk when it is closed
        tempfile.TemporaryFile(dir=folder if isinstance(folder, Path) else None) as spool,
        Rereader(read.source, read.files, kept) as reader,
    ):
        with copy_path.open("wb") as file:
            copy = ChecksummedFile(file)
            encoded = encode(reader.texts(entries), tokenizer, dtype)
            for entry, (ids, text) in zip(entries, encoded, strict=True):
                copy.write((json.dumps({"name": read.name(entry), "text": text}) + "\n").encode())
                document = np.concatenate([np.array([start], dtype), ids, np.array([end], dtype)])
                max_id = max(max_id, _checked_max(document, tokenizer, name))
                spool.write(document.data)
                starts.append(starts[-1] + len(document))
            spool.flush()
        files[copy_path.name] = (copy.checksums.size, copy.checksums.sums)
        spool.seek(0)
        tokens = (np.frombuffer(part, dtype) for part in iter(lambda: spool.read(_COPY_BYTES), b""))
        for what, count, parts, kind in (
            ("tokens", starts[-1], tokens, dtype),
            ("starts", len(starts), iter([np.frombuffer(starts, np.int64)]), np.dtype(np.int64)),
        ):
            path = folder / f"heldout.{name}.{what}.npy"
            sums = _write_flat(path, count, kind, parts)
            files[path.name] = (sums.size, sums.sums)
    return Heldout(starts[-1], max_id, files)


def _write_flat(path: Folder, count: int, dtype: np.dtype, parts: Iterator[np.ndarray]) -> Checksums:
    with enough_space(path, count * dtype.itemsize), open_array(path, (count,), dtype) as write:
        sums = write(np.empty(0, dtype))
        for part in parts:
            sums = write(part)
    return sums


def result_text(shards: dict[str, Shard]) -> str:
    """Return shards as JSON, for the process that collects them."""
    return json.dumps({stem: asdict(shard) for stem, shard in shards.items()})


def read_results(text: str | bytes) -> dict[str, Shard]:
    """Return the shards of `result_text`."""
    return {stem: Shard(**fields) for stem, fields in json.loads(text).items()}


def text_is_here(section: Section) -> bool:
    """Return whether this process sees the first files of a section."""
    return all(section.files.path(index).exists() for index in range(min(8, len(section.files))))
