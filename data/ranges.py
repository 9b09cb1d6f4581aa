"""Read ranges of bytes of a prepared folder's files: from a local disk, or from a bucket through a bounded cache.

Files are not memory-mapped, because mapped pages count as memory of the process, and a long run touches all of them.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from etils import epath

from data.config import DataError
from data.paths import Folder, bucket_client

_OPEN_FILES = 64
CACHE_BYTES = 1 << 26
_ENTRY_OVERHEAD = 300  # memory of a cached range besides its bytes


class Range(NamedTuple):
    """Bytes `start` to `stop` (exclusive) of a file of the folder."""

    file: str
    start: int
    stop: int


class RangeReader(Protocol):
    """Reads ranges of the files of one folder. Threads may share it."""

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the bytes of each range. Raises DataError with file and offset for missing bytes."""
        ...


def range_reader(folder: Folder, cache_bytes: int = CACHE_BYTES) -> RangeReader:
    """Return the reader for a folder. `cache_bytes`: memory for ranges of a bucket that may be read again."""
    return LocalRanges(folder) if isinstance(folder, Path) else BucketRanges(folder, cache_bytes)


class LocalRanges:
    """Reads from a local disk, with few files open at a time; the operating system caches what it reads."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        with self._lock:  # no other thread closes a file that this one reads
            return [self._read(part) for part in ranges]

    def _read(self, part: Range) -> bytes:
        path = self._folder / part.file
        try:
            if part.file not in self._open:
                if len(self._open) >= _OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[part.file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(part.file)
            content = os.pread(self._open[part.file], part.stop - part.start, part.start)
        except OSError as error:
            raise _unreadable(str(path), part, error.strerror or str(error)) from error
        return _whole(content, str(path), part)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class BucketRanges:
    """Requests ranges from a bucket, those of one call together, and keeps the last `cache_bytes` of answers."""

    def __init__(self, folder: epath.Path, cache_bytes: int = CACHE_BYTES):
        self._folder, self._left = folder, cache_bytes
        self._store = bucket_client()
        self._cache: OrderedDict[Range, bytes] = OrderedDict()
        self._lock = threading.Lock()
        self.requested_bytes = 0
        self.requests = 0

    def read(self, ranges: Sequence[Range]) -> list[bytes]:
        with self._lock:
            found = {part: self._cache[part] for part in ranges if part in self._cache}
        missing = _joined(sorted({part for part in ranges if part not in found}))
        for (whole, parts), content in zip(missing, self._request([whole for whole, _ in missing]), strict=True):
            for part in parts:
                found[part] = content[part.start - whole.start : part.stop - whole.start]
        with self._lock:
            for part in ranges:
                self._remember(part, found[part])
        return [found[part] for part in ranges]

    def _request(self, ranges: Sequence[Range]) -> list[bytes]:
        if not ranges:
            return []
        paths = [os.fspath(self._folder / part.file) for part in ranges]
        answers = self._store.cat_ranges(
            paths, [part.start for part in ranges], [part.stop for part in ranges], on_error="return"
        )
        contents = []
        for path, part, answer in zip(paths, ranges, answers, strict=True):
            if isinstance(answer, BaseException):
                raise _unreadable(path, part, f"{type(answer).__name__}: {answer}") from answer
            contents.append(_whole(bytes(answer), path, part))
        self.requests += len(ranges)
        self.requested_bytes += sum(map(len, contents))
        return contents

    def _remember(self, part: Range, content: bytes) -> None:
        if part in self._cache:
            self._cache.move_to_end(part)
            return
        self._cache[part] = content
        self._left -= len(content) + _ENTRY_OVERHEAD
        while self._left < 0 and self._cache:
            self._left += len(self._cache.popitem(last=False)[1]) + _ENTRY_OVERHEAD


def _joined(ranges: Sequence[Range]) -> list[tuple[Range, list[Range]]]:
    """Join sorted ranges that touch or overlap. Return each joined range with its parts."""
    joined: list[tuple[Range, list[Range]]] = []
    for part in ranges:
        if joined and joined[-1][0].file == part.file and part.start <= joined[-1][0].stop:
            whole, parts = joined[-1]
            joined[-1] = (Range(part.file, whole.start, max(whole.stop, part.stop)), [*parts, part])
        else:
            joined.append((part, [part]))
    return joined


def _whole(content: bytes, path: str, part: Range) -> bytes:
    if len(content) != part.stop - part.start:
        raise _unreadable(path, part, f"the file has only {len(content)} of them")
    return content


def _unreadable(path: str, part: Range, reason: str) -> DataError:
    return DataError(
        f"{path}: bytes {part.start} to {part.stop} of the prepared data cannot be read ({reason}). If the file is "
        "damaged, remove its folder and prepare the data again"
    )
