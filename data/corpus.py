"""Find a source's documents by globs, read them as UTF-8, remove exact duplicates, and split them by content hash.

A survey reads every file once and holds a name, a digest and a size per document. `KeptText` keeps document text in
memory up to a limit; `reread` reads only the files of documents that are not kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.config import DataError, SourceConfig

# Excludes installed packages and tests, and _sysconfigdata, which holds paths of the build machine.
STDLIB_EXCLUDE = (
    "site-packages/**", "dist-packages/**", "**/test/**", "**/tests/**", "**/idle_test/**", "**/__pycache__/**",
    "**/_sysconfigdata*",
)  # fmt: skip

# A fixed limit: the depth at which Python's JSON parser fails depends on its version and the caller's stack.
_MAX_NESTING = 500


class Document(NamedTuple):
    """A document's name (its path within the source, with `:line` for JSONL) and its UTF-8 bytes."""

    name: str
    content: bytes


class Entry(NamedTuple):
    """A document without its text; `digest` is the SHA-256 of its bytes in hex."""

    name: str
    digest: str
    size: int


class KeptText:
    """Document text by digest, kept in memory up to `limit` bytes; later documents that exceed it are not kept."""

    def __init__(self, limit: int):
        self._left = limit
        self._texts: dict[str, bytes] = {}

    def keep(self, digest: str, content: bytes) -> None:
        if len(content) <= self._left:
            self._left -= len(content)
            self._texts[digest] = content

    def get(self, digest: str) -> bytes | None:
        return self._texts.get(digest)


@dataclass(frozen=True)
class Survey:
    """The distinct documents of one source in reading order, and counts of those left out."""

    source: SourceConfig
    entries: tuple[Entry, ...]
    skipped: tuple[str, ...]  # "name: reason" for each file or record that could not be read
    empty: int
    duplicates: int


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Return a regular expression for a glob over '/'-separated paths: `*` and `?` stay in a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    wild = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts) + r"\Z", re.DOTALL)


def source_root(source: SourceConfig) -> Path:
    """Return the folder or file that a source reads."""
    return Path(sysconfig.get_path("stdlib") if source.path == "stdlib" else source.path).expanduser()


def find_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """Return the (name, path) pairs that a source selects, ordered by name. Raises DataError for a missing path."""
    if "://" in source.path:
        raise DataError(
            f"source {source.name!r}: path = {source.path!r}: text is read from local folders only. Mount the "
            "store, or copy the text to a local folder"
        )
    root = source_root(source)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise DataError(f"source {source.name!r}: path = {source.path!r}: not a folder or file. Correct it")
    include = [glob_pattern(glob) for glob in source.include]
    exclude = [glob_pattern(glob) for glob in source.exclude + (STDLIB_EXCLUDE if source.path == "stdlib" else ())]
    found = []

    def refuse(error: OSError) -> None:
        raise DataError(
            f"source {source.name!r}: folder {error.filename} cannot be read ({error.strerror}). Fix its permissions, "
            "or add it to source.exclude"
        )

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        prefix = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix() + "/"
        # 'name/**' matches 'name/', so that excluded folders are not walked.
        subfolders[:] = [s for s in subfolders if s[0] != "." and not any(e.match(f"{prefix}{s}/") for e in exclude)]
        for file in files:
            name = prefix + file
            if file[0] != "." and any(i.match(name) for i in include) and not any(e.match(name) for e in exclude):
                found.append((name, Path(folder, file)))
    return sorted(found)


def read_documents(source: SourceConfig, skipped: list[str]) -> Iterator[Document]:
    """Yield a source's documents by name; append "name: reason" to `skipped` for those that cannot be read."""
    for name, path in find_files(source):
        yield from _read_file(source, name, path, skipped)


def _read_file(source: SourceConfig, name: str, path: Path, skipped: list[str]) -> Iterator[Document]:
    if not path.is_file():  # a pipe or a dangling link: opening it could block
        skipped.append(f"{name}: not a regular file")
        return
    try:
        with path.open("rb") as file:
            if source.kind == "jsonl":
                yield from _read_records(name, file, source.text_field, skipped)
                return
            content = file.read()
    except OSError as error:
        skipped.append(f"{name}: {error.strerror}")
        return
    if reason := _not_utf8(content):
        skipped.append(f"{name}: {reason}")
    else:
        yield Document(name, content)


def _not_utf8(content: bytes) -> str:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    return ""


def _read_records(file: str, lines: Iterable[bytes], text_field: str, skipped: list[str]) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name = f"{file}:{number}"
        try:
            record = json.loads(line)
            too_deep = _is_nested_deeper(record, _MAX_NESTING)
        except RecursionError:
            too_deep = True
        except ValueError:
            skipped.append(f"{name}: not JSON")
            continue
        if too_deep:
            skipped.append(f"{name}: JSON nested deeper than {_MAX_NESTING}")
            continue
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            has = sorted(record) if isinstance(record, dict) else type(record).__name__
            skipped.append(f"{name}: no text in field {text_field!r} (the record has {has})")
            continue
        try:
            yield Document(name, record[text_field].encode("utf-8"))
        except UnicodeEncodeError:
            skipped.append(f"{name}: a lone surrogate, which UTF-8 cannot encode")


def _is_nested_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [item for outer in containers for item in (outer.values() if isinstance(outer, dict) else outer)]
    return True


def survey(source: SourceConfig, seen: set[str], kept: KeptText | None = None) -> Survey:
    """Read a source once. Count digests in `seen` as duplicates; add new ones to `seen` and their text to `kept`.

    Raises DataError if no document remains.
    """
    skipped: list[str] = []
    entries: list[Entry] = []
    empty = duplicates = 0
    for name, content in read_documents(source, skipped):
        digest = hashlib.sha256(content).hexdigest()
        if not content:
            empty += 1
        elif digest in seen:
            duplicates += 1
        else:
            seen.add(digest)
            entries.append(Entry(name, digest, len(content)))
            if kept is not None:
                kept.keep(digest, content)
    if not entries:
        reasons = f"; first skipped: {'; '.join(skipped[:3])}" if skipped else ""
        raise DataError(
            f"source {source.name!r} is empty: path {source.path!r}, include {source.include}, exclude "
            f"{source.exclude} give no document ({len(skipped)} skipped, {empty} empty, {duplicates} duplicates of "
            f"others){reasons}. Correct the path or the globs"
        )
    return Survey(source, tuple(entries), tuple(skipped), empty, duplicates)


def split(entries: Sequence[Entry], fraction: float, source_name: str) -> tuple[list[Entry], list[Entry]]:
    """Split documents into (train, held-out) by content hash, independently of the other documents.

    An empty side gets the document with the nearest hash. Raises DataError for a source of one document.
    """
    if fraction == 0:
        return list(entries), []
    if len(entries) < 2:
        raise DataError(
            f"source {source_name!r} has 1 document and data.holdout_fraction = {fraction}: a document is never split. "
            "Add documents, or set data.holdout_fraction to 0 and set data.evaluation_sources"
        )
    ranked = sorted(entry.digest for entry in entries)
    count = sum(int(digest[:8], 16) < fraction * 2**32 for digest in ranked)
    held_out = set(ranked[: min(max(count, 1), len(entries) - 1)])
    return [e for e in entries if e.digest not in held_out], [e for e in entries if e.digest in held_out]


def reread(source: SourceConfig, entries: Iterable[Entry], kept: KeptText | None = None) -> Iterator[Document]:
    """Yield the documents of `entries`, which must be in reading order.

    Each comes from `kept` or from its file, which is read once. Raises DataError if a document has changed.
    """
    root = source_root(source)
    for name, of_file in itertools.groupby(entries, lambda entry: _file_of(source, entry)):
        wanted = list(of_file)
        found = {entry.digest: kept.get(entry.digest) for entry in wanted} if kept is not None else {}
        if any(found.get(entry.digest) is None for entry in wanted):
            path = root if root.is_file() else root / name
            yield from _unchanged(source, wanted, _read_file(source, name, path, []))
        else:
            for entry in wanted:
                yield Document(entry.name, found[entry.digest] or b"")


def _file_of(source: SourceConfig, entry: Entry) -> str:
    return entry.name.rpartition(":")[0] if source.kind == "jsonl" else entry.name


def _unchanged(source: SourceConfig, wanted: Sequence[Entry], documents: Iterable[Document]) -> Iterator[Document]:
    """Yield the wanted documents of a file. Raises DataError if one is missing or has changed."""
    missing = {entry.name: entry.digest for entry in wanted}
    for document in documents:
        if document.name in missing:
            if hashlib.sha256(document.content).hexdigest() != missing[document.name]:
                break
            del missing[document.name]
            yield document
    if missing:
        raise DataError(
            f"source {source.name!r}: {next(iter(missing))} in {source.path!r} changed while it was being read. Run "
            "again when no process writes there"
        )
