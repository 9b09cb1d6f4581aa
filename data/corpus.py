"""Documents of a source: found by globs, read as UTF-8, exactly deduplicated, and split by the hash of their content.

Nothing here keeps text: a survey holds a name, a digest and a size per document, and the text is read again where
needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.config import DataError, SourceConfig

# Installed packages and tests are no part of the library proper; _sysconfigdata holds the paths of one build machine.
STDLIB_EXCLUDE = (
    "site-packages/**", "dist-packages/**", "**/test/**", "**/tests/**", "**/idle_test/**", "**/__pycache__/**",
    "**/_sysconfigdata*",
)  # fmt: skip


class Document(NamedTuple):
    """A document's name (its path within the source, with `:line` for JSONL) and its UTF-8 bytes."""

    name: str
    content: bytes


class Entry(NamedTuple):
    """What a survey keeps of a document; `digest` is the SHA-256 of its bytes in hex."""

    name: str
    digest: str
    size: int


@dataclass(frozen=True)
class Survey:
    """The distinct documents of one source in reading order, and what was left out."""

    source: SourceConfig
    entries: tuple[Entry, ...]
    skipped: tuple[str, ...]  # "name: reason" of what could not be read
    empty: int
    duplicates: int


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Regular expression of a glob over '/'-separated paths: `*` and `?` stay in a folder, `**` crosses folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    wild = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts) + r"\Z", re.DOTALL)


def source_root(source: SourceConfig) -> Path:
    """The folder or file a source reads."""
    return Path(sysconfig.get_path("stdlib") if source.path == "stdlib" else source.path).expanduser()


def find_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """The (name, path) pairs a source selects, ordered by name. Raises DataError when the path does not exist."""
    root = source_root(source)
    if root.is_file():
        return [(root.name, root)]
    if not root.is_dir():
        raise DataError(f"source {source.name!r}: path {source.path!r} is not a folder or a file; correct source.path")
    include = [glob_pattern(glob) for glob in source.include]
    exclude = [glob_pattern(glob) for glob in source.exclude + (STDLIB_EXCLUDE if source.path == "stdlib" else ())]
    found = []

    def refuse(error: OSError) -> None:
        raise DataError(
            f"source {source.name!r}: folder {error.filename} cannot be read ({error.strerror}); mend it, or exclude "
            f"it by "
            "source.exclude"
        )

    for folder, subfolders, files in os.walk(root, onerror=refuse):
        prefix = "" if Path(folder) == root else Path(folder).relative_to(root).as_posix() + "/"
        # 'name/**' matches 'name/', so that an excluded folder is not even walked.
        subfolders[:] = [s for s in subfolders if s[0] != "." and not any(e.match(f"{prefix}{s}/") for e in exclude)]
        for file in files:
            name = prefix + file
            if file[0] != "." and any(i.match(name) for i in include) and not any(e.match(name) for e in exclude):
                found.append((name, Path(folder, file)))
    return sorted(found)


def read_documents(source: SourceConfig, skipped: list[str]) -> Iterator[Document]:
    """Yield a source's documents in order of name; what cannot be read is appended to `skipped` as "name: reason"."""
    for name, path in find_files(source):
        if not path.is_file():  # a pipe or a dangling link: opening it could block
            skipped.append(f"{name}: not a regular file")
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            skipped.append(f"{name}: {error.strerror}")
            continue
        if source.kind == "jsonl":
            yield from _read_records(name, content, source.text_field, skipped)
        elif reason := _not_utf8(content):
            skipped.append(f"{name}: {reason}")
        else:
            yield Document(name, content)


def _not_utf8(content: bytes) -> str:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    return ""


def _read_records(file: str, content: bytes, text_field: str, skipped: list[str]) -> Iterator[Document]:
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        name = f"{file}:{number}"
        try:
            record = json.loads(line)
        except ValueError:
            skipped.append(f"{name}: not JSON")
            continue
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            has = sorted(record) if isinstance(record, dict) else type(record).__name__
            skipped.append(f"{name}: no text in field {text_field!r} (the record has {has})")
            continue
        try:
            yield Document(name, record[text_field].encode("utf-8"))
        except UnicodeEncodeError:
            skipped.append(f"{name}: a lone surrogate, which UTF-8 cannot hold")


def survey(source: SourceConfig, seen: set[str]) -> Survey:
    """Read a source once. Digests already in `seen` count as duplicates; new ones are added to it.

    Raises DataError when nothing is left.
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
    if not entries:
        reasons = f"; the first skipped: {'; '.join(skipped[:3])}" if skipped else ""
        raise DataError(
            f"source {source.name!r} is empty: path {source.path!r}, include {source.include}, exclude "
            f"{source.exclude} "
            f"gave no document ({len(skipped)} skipped, {empty} empty, {duplicates} duplicates of others){reasons}; "
            "correct the path or the globs"
        )
    return Survey(source, tuple(entries), tuple(skipped), empty, duplicates)


def split(entries: Sequence[Entry], fraction: float, source_name: str) -> tuple[list[Entry], list[Entry]]:
    """Part documents into (train, held-out) by the hash of their content, so that other documents never move one.

    A source so small that a side would stay empty gives it the nearest document. Raises DataError when it has just one.
    """
    if fraction == 0:
        return list(entries), []
    if len(entries) < 2:
        raise DataError(
            f"source {source_name!r} has 1 document and data.holdout_fraction = {fraction}: a document is never cut in "
            "two; give it more documents, or set data.holdout_fraction to 0 and name data.evaluation_sources"
        )
    ranked = sorted(entry.digest for entry in entries)
    count = sum(int(digest[:8], 16) < fraction * 2**32 for digest in ranked)
    held_out = set(ranked[: min(max(count, 1), len(entries) - 1)])
    return [e for e in entries if e.digest not in held_out], [e for e in entries if e.digest in held_out]


def reread(source: SourceConfig, digests: AbstractSet[str]) -> Iterator[Document]:
    """Yield the documents with these digests, each once, in reading order. Raises DataError when one has changed."""
    missing = set(digests)
    for document in read_documents(source, []):
        digest = hashlib.sha256(document.content).hexdigest()
        if digest in missing:
            missing.remove(digest)
            yield document
    if missing:
        raise DataError(
            f"source {source.name!r}: {len(missing)} documents of {source.path!r} changed while they were being read; "
            "run again when nothing writes there"
        )
