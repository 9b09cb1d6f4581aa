"""Find a source's documents by globs, and read them as UTF-8 one at a time, from a local folder or a bucket.

A record is a document with its place: the number of its file, its line in a JSONL file and the offset of that line.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data.config import DataError, SourceConfig
from data.paths import Folder, PathError, bucket_client, is_local, parse_path, require_backend

# Excludes installed packages and tests, and _sysconfigdata, which holds paths of the build machine.
STDLIB_EXCLUDE = (
    "site-packages/**", "dist-packages/**", "**/test/**", "**/tests/**", "**/idle_test/**", "**/__pycache__/**",
    "**/_sysconfigdata*",
)  # fmt: skip

# A fixed limit: the depth at which Python's JSON parser fails depends on its version and the caller's stack.
_MAX_NESTING = 500
_BUFFER = 1 << 20
_BAD_GZIP = (EOFError, zlib.error)


class Record(NamedTuple):
    """A document's UTF-8 bytes and its place in the source."""

    file: int  # index in Files.names
    line: int  # from 1; 0 for a file that is one document
    offset: int  # first byte of the line, in a compressed file after decompression
    content: bytes


@dataclass
class Skipped:
    """The number of files and records that cannot be read, and "name: reason" for the first few."""

    count: int = 0
    first: list[str] = field(default_factory=list)  # at most five

    def append(self, reason: str) -> None:
        self.count += 1
        if len(self.first) < 5:
            self.first.append(reason)


@dataclass(frozen=True)
class Files:
    """The files that a source selects, ordered by name. Iteration gives (name, path) pairs."""

    root: Folder  # the folder, or the file if the source is one file
    names: Sequence[str]
    is_file: bool  # whether the source is one file

    def path(self, index: int) -> Folder:
        """Return the path of a file by its index in `names`."""
        return self.root if self.is_file else self.root / self.names[index]

    def name(self, index: int, line: int) -> str:
        """Return a document's name: that of its file, with `:line` for JSONL."""
        return f"{self.names[index]}:{line}" if line else self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[tuple[str, Folder]]:
        return ((name, self.path(index)) for index, name in enumerate(self.names))


def glob_pattern(glob: str) -> re.Pattern[str]:
    """Return a regular expression for a glob over '/'-separated paths: `*` and `?` stay in a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    wild = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts) + r"\Z", re.DOTALL)


def source_root(source: SourceConfig) -> Folder:
    """Return the folder or file that a source reads. Raises DataError for an address that cannot be read."""
    if is_local(source.path):
        return Path(sysconfig.get_path("stdlib") if source.path == "stdlib" else source.path).expanduser()
    try:
        field = f"source {source.name!r}: path"
        return require_backend(parse_path(source.path.rstrip("/"), field), field)
    except PathError as error:
        raise DataError(str(error)) from error


def find_files(source: SourceConfig) -> Files:
    """Return the files that a source selects. Raises DataError for a missing path."""
    root = source_root(source)
    include = [glob_pattern(glob) for glob in source.include]
    exclude = [glob_pattern(glob) for glob in source.exclude + (STDLIB_EXCLUDE if source.path == "stdlib" else ())]
    if not isinstance(root, Path):
        return _find_in_bucket(source, root, include, exclude)
    if root.is_file():
        return Files(root, [root.name], True)
    if not root.is_dir():
        raise DataError(f"source {source.name!r}: path = {source.path!r}: not a folder or file. Correct it")
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
                found.append(name)
    found.sort()
    return Files(root, found, False)


def _find_in_bucket(
    source: SourceConfig, root: epath.Path, include: list[re.Pattern[str]], exclude: list[re.Pattern[str]]
) -> Files:
    store = bucket_client()
    where = os.fspath(root).partition("://")[2]
    try:
        found = [path.partition("://")[2] or path for path in store.find(os.fspath(root))]
    except Exception as error:  # gcsfs raises errors of several packages
        raise DataError(
            f"source {source.name!r}: path = {source.path!r}: the bucket cannot be read ({error}). Check the name and "
            "the credentials"
        ) from error
    if [path.lstrip("/") for path in found] == [where]:
        return Files(root, [root.name], True)
    names = sorted(path.lstrip("/").removeprefix(where + "/") for path in found)
    if not names:
        raise DataError(f"source {source.name!r}: path = {source.path!r}: not a folder or file. Correct it")

    def selected(name: str) -> bool:
        folders = [name[: match.end()] for match in re.finditer("/", name)]
        hidden = any(part.startswith(".") for part in name.split("/"))
        excluded = any(e.match(part) for e in exclude for part in (name, *folders))
        return not hidden and not excluded and any(i.match(name) for i in include)

    return Files(root, [name for name in names if selected(name)], False)


def read_records(source: SourceConfig, files: Files, skipped: Skipped) -> Iterator[Record]:
    """Yield a source's documents in the order of its files; append those that cannot be read to `skipped`."""
    for index in range(len(files)):
        yield from _read_file(source, files, index, skipped)


def _read_file(source: SourceConfig, files: Files, index: int, skipped: Skipped) -> Iterator[Record]:
    path, name = files.path(index), files.names[index]
    if isinstance(path, Path) and not path.is_file():  # a pipe or a dangling link: opening it could block
        skipped.append(f"{name}: not a regular file")
        return
    try:
        with open_text(source, path) as file:
            if source.kind == "jsonl":
                yield from _read_lines(source, files, index, file, skipped)
                return
            content = file.read()
    except _BAD_GZIP:
        skipped.append(f"{name}: the compressed file is damaged")
        return
    except OSError as error:
        skipped.append(f"{name}: {error.strerror or error}")
        return
    if reason := _not_utf8(content):
        skipped.append(f"{name}: {reason}")
    else:
        yield Record(index, 0, 0, content)


@contextlib.contextmanager
def open_text(source: SourceConfig, path: Folder) -> Iterator[io.BufferedReader]:
    """Open a source's file to read bytes. JSONL in a file '*.gz' is decompressed. Raises OSError."""
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        if source.kind == "jsonl" and path.name.endswith(".gz"):
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        if not isinstance(file, io.BufferedReader):  # other files read lines slowly
            file = stack.enter_context(io.BufferedReader(file, _BUFFER))
        yield file


def _not_utf8(content: bytes) -> str:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"not UTF-8 (byte {error.start})"
    return ""


def _read_lines(
    source: SourceConfig, files: Files, index: int, lines: io.BufferedReader, skipped: Skipped
) -> Iterator[Record]:
    offset = 0
    for number, line in enumerate(lines, 1):
        start, offset = offset, offset + len(line)
        if not line.strip():
            continue
        content, reason = text_of_line(line, source.text_field)
        if content is None:
            skipped.append(f"{files.name(index, number)}: {reason}")
        else:
            yield Record(index, number, start, content)


def text_of_line(line: bytes, text_field: str) -> tuple[bytes | None, str]:
    """Return (the UTF-8 text of a JSONL record, ''), or (None, the reason why it cannot be read)."""
    try:
        record = json.loads(line)
        too_deep = _is_nested_deeper(record, _MAX_NESTING)
    except RecursionError:
        too_deep = True
    except ValueError:
        return None, "not JSON"
    if too_deep:
        return None, f"JSON nested deeper than {_MAX_NESTING}"
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        has = sorted(record) if isinstance(record, dict) else type(record).__name__
        return None, f"no text in field {text_field!r} (the record has {has})"
    try:
        return record[text_field].encode("utf-8"), ""
    except UnicodeEncodeError:
        return None, "a lone surrogate, which UTF-8 cannot encode"


def _is_nested_deeper(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        containers = [item for item in level if isinstance(item, dict | list)]
        if not containers:
            return False
        level = [item for outer in containers for item in (outer.values() if isinstance(outer, dict) else outer)]
    return True
