"""Survey a corpus: one row of 56 bytes per document, exact duplicates removed, and a split by content hash.

A survey reads every file once and keeps no text, unless the whole corpus fits in the limit of `KeptText`. `Rereader`
reads documents again by their offsets and compares their digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import struct
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data.config import DataError, SourceConfig
from data.corpus import Files, Skipped, find_files, open_text, read_records, text_of_line

ENTRY = np.dtype(
    [("digest", np.uint8, (32,)), ("size", "<i8"), ("offset", "<i8"), ("file", "<i4"), ("line", "<i4")]
)  # a document: SHA-256 and size of its bytes, and its place in the source
_PACK = struct.Struct("<32sqqii").pack
_MAX_LINE = 2**31 - 1
_KEPT_OVERHEAD = 200  # memory of a kept text besides its bytes
_CHUNK = 1 << 16
_SPOOL_BYTES = 1 << 24  # of a table in memory while it grows, without copies; more is in a temporary file


class KeptText:
    """The text of all documents by digest, in memory while it fits in `limit` bytes; after that, of none."""

    def __init__(self, limit: int):
        self._left = limit
        self._texts: dict[bytes, bytes] = {}

    def keep(self, digest: bytes, content: bytes) -> None:
        if self._left >= 0 and digest not in self._texts:
            self._left -= len(content) + _KEPT_OVERHEAD
            self._texts[digest] = content
        if self._left < 0:
            self._texts.clear()

    def get(self, digest: bytes) -> bytes | None:
        return self._texts.get(digest)


@dataclass
class Survey:
    """The documents of one source in reading order, and counts of those left out."""

    source: SourceConfig
    files: Files
    entries: np.ndarray  # ENTRY [D]
    skipped: Skipped
    empty: int
    duplicates: int = 0

    def name(self, entry: np.void) -> str:
        """Return the name of a document."""
        return self.files.name(int(entry["file"]), int(entry["line"]))


def survey(source: SourceConfig, kept: KeptText | None = None) -> Survey:
    """Read a source once. Offer the text to `kept`. Raises DataError if it has no document."""
    files, skipped, empty = find_files(source), Skipped(), 0
    with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as table:
        for record in read_records(source, files, skipped):
            if not record.content:
                empty += 1
                continue
            if record.line > _MAX_LINE:
                raise DataError(
                    f"source {source.name!r}: {files.names[record.file]} has over {_MAX_LINE} lines. Split the file"
                )
            digest = hashlib.sha256(record.content).digest()
            table.write(_PACK(digest, len(record.content), record.offset, record.file, record.line))
            if kept is not None:
                kept.keep(digest, record.content)
        entries = np.empty(table.tell() // ENTRY.itemsize, ENTRY)
        table.seek(0)
        table.readinto(entries.view(np.uint8).data)
    found = Survey(source, files, entries, skipped, empty)
    _require_documents(found)
    return found


def remove_duplicates(surveys: Sequence[Survey]) -> None:
    """Keep only the first of equal documents over all surveys, in their order. Raises DataError for an empty source."""
    kept = _first_of_equals([read.entries for read in surveys])
    for read, mask in zip(surveys, kept, strict=True):
        read.duplicates = int(len(mask) - np.count_nonzero(mask))
        if read.duplicates:
            read.entries = _compress(read.entries, mask)
        _require_documents(read)


def _first_of_equals(tables: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return masks of the documents whose digest no earlier document has."""
    prefix = np.concatenate([_prefix(table) for table in tables])
    order = np.argsort(prefix, kind="stable")
    equal = prefix[order[1:]] == prefix[order[:-1]]
    suspect = np.sort(order[np.append(equal, False) | np.insert(equal, 0, False)])
    del prefix, order
    bounds = np.cumsum([0] + [len(table) for table in tables])
    first = np.ones(bounds[-1], bool)
    if len(suspect):
        tables_of = np.searchsorted(bounds, suspect, side="right") - 1
        digests = np.concatenate(
            [table["digest"][suspect[tables_of == i] - bounds[i]] for i, table in enumerate(tables)]
        )
        _, firsts = np.unique(digests.view("S32").ravel(), return_index=True)
        first[suspect] = False
        first[suspect[firsts]] = True
    return [first[start:end] for start, end in itertools.pairwise(bounds.tolist())]


def _compress(entries: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Move the masked rows to the front of the table, and return them."""
    count = 0
    for start in range(0, len(entries), _CHUNK):
        rows = entries[start : start + _CHUNK][mask[start : start + _CHUNK]]
        entries[count : count + len(rows)] = rows
        count += len(rows)
    return entries[:count]


def _require_documents(read: Survey) -> None:
    if len(read.entries):
        return
    source, skipped = read.source, read.skipped
    reasons = f"; first skipped: {'; '.join(skipped.first[:3])}" if skipped.count else ""
    raise DataError(
        f"source {source.name!r} is empty: path {source.path!r}, include {source.include}, exclude "
        f"{source.exclude} give no document ({skipped.count} skipped, {read.empty} empty, {read.duplicates} "
        f"duplicates of others){reasons}. Correct the path or the globs"
    )


def _prefix(entries: np.ndarray) -> np.ndarray:
    """Return the first 8 bytes of each digest as native uint64 [D], which sort like the digests."""
    return np.ascontiguousarray(entries["digest"][:, :8]).view(">u8").ravel().astype(np.uint64)


def split(entries: np.ndarray, fraction: float, source_name: str) -> np.ndarray:
    """Return a mask of the held-out documents, chosen by content hash, independently of the other documents.

    An empty side gets the document with the nearest hash. Raises DataError for a source of one document.
    """
    heldout = np.zeros(len(entries), bool)
    if fraction == 0:
        return heldout
    if len(entries) < 2:
        raise DataError(
            f"source {source_name!r} has 1 document and data.holdout_fraction = {fraction}: a document is never split. "
            "Add documents, or set data.holdout_fraction to 0 and set data.evaluation_sources"
        )
    prefix = _prefix(entries)
    heldout = (prefix >> np.uint64(32)).astype(np.float64) < fraction * 2**32
    if not heldout.any() or heldout.all():
        nearest = prefix.max() if heldout.all() else prefix.min()
        rows = np.flatnonzero(prefix == nearest).tolist()
        pick = (max if heldout.all() else min)(rows, key=lambda row: entries["digest"][row].tobytes())
        heldout[pick] = not heldout[pick]
    return heldout


def lowest_digests(tables: Sequence[np.ndarray], limit: int) -> list[np.ndarray]:
    """Return masks of the documents with the lowest digests over all tables, until they have `limit` bytes.

    Digests give a random order that does not depend on names and paths.
    """
    prefix = np.concatenate([_prefix(table) for table in tables])
    sizes = np.concatenate([table["size"] for table in tables])
    order = np.argsort(prefix, kind="stable")
    before = np.cumsum(sizes[order]) - sizes[order]
    chosen = np.zeros(len(prefix), bool)
    chosen[order[before < limit]] = True
    return np.split(chosen, np.cumsum([len(table) for table in tables])[:-1])


def sections(sizes: np.ndarray, limit: int, documents: int) -> list[tuple[int, int]]:
    """Divide documents into consecutive sections [first, last) of at most `limit` bytes and a number of documents.

    A document larger than `limit` is a section.
    """
    ends, bounds, first = np.cumsum(sizes), [], 0
    while first < len(sizes):
        before = ends[first - 1] if first else 0
        last = max(first + 1, min(first + documents, int(np.searchsorted(ends, before + limit, side="right"))))
        bounds.append((first, last))
        first = last
    return bounds


class Rereader:
    """Reads documents of a source again, from `kept` or from their files.

    The last file stays open, so that rows in reading order read each file once. Close it after use.
    """

    def __init__(self, source: SourceConfig, files: Files, kept: KeptText | None = None):
        self._source, self.files, self._kept = source, files, kept
        self._opened: tuple[str, io.BufferedReader] | None = None
        self._stack = contextlib.ExitStack()

    def texts(self, entries: np.ndarray) -> Iterator[bytes]:
        """Yield the documents of the entries. Raises DataError if a document is missing or has changed."""
        for start in range(0, len(entries), _CHUNK):
            rows = entries[start : start + _CHUNK]
            digests = np.ascontiguousarray(rows["digest"]).tobytes()
            columns = (rows[name].tolist() for name in ("file", "line", "offset"))
            for row, (file, line, offset) in enumerate(zip(*columns, strict=True)):
                digest = digests[32 * row : 32 * row + 32]
                content = self._kept.get(digest) if self._kept is not None else None
                if content is None:
                    content = self._read(file, line, offset)
                    if content is None or hashlib.sha256(content).digest() != digest:
                        raise DataError(
                            f"source {self._source.name!r}: {self.files.name(file, line)} in {self._source.path!r} "
                            "changed while it was being read. Run again when no process writes there"
                        )
                yield content

    def _read(self, file: int, line: int, offset: int) -> bytes | None:
        path = self.files.path(file)
        try:
            if not line:
                return path.read_bytes()
            if self._opened is None or self._opened[0] != str(path):
                self.close()
                self._opened = str(path), self._stack.enter_context(open_text(self._source, path))
            lines = self._opened[1]
            if lines.tell() != offset:
                lines.seek(offset)
            return text_of_line(lines.readline(), self._source.text_field)[0]
        except (OSError, EOFError, zlib.error):
            return None

    def close(self) -> None:
        self._opened = None
        self._stack.close()

    def __enter__(self) -> Rereader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
