"""Cache folders that are complete or absent, checksums of their files, and errors that report free and required space.

A local folder is written under `writing-*` and then renamed. Its writer locks a file in it, so that a later start can
distinguish leftovers of killed preparations from work in progress. A folder of a bucket is written in place, and
complete when its index file exists, which is written last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataError
from data.paths import Folder
from data.processes import SHARING

_WRITING = "writing-"
_LOCK = "lock"
_ABANDONED_SECONDS = 86_400.0  # without a usable lock, a folder is a leftover after a day without changes
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_folder(target: Folder) -> Iterator[Folder]:
    """Yield a new folder that becomes `target` if the block succeeds and is removed if it fails.

    In a bucket, it is `target`: the block must write the folder's index file last.
    """
    if not isinstance(target, Path):
        yield target
        return
    with _locked_folder(target.parent) as parent:
        temporary = parent / target.name
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process made the same content first
                raise


def discard(folder: Folder, index: str) -> None:
    """Remove a damaged folder in one step, so that no process removes another one's new folder.

    In a bucket, remove its file `index`, so that the folder counts as absent.
    """
    if not isinstance(folder, Path):
        (folder / index).unlink(missing_ok=True)
        return
    with _locked_folder(folder.parent) as parent, contextlib.suppress(FileNotFoundError):
        folder.rename(parent / folder.name)


@contextmanager
def _locked_folder(cache: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=_WRITING, dir=cache, ignore_cleanup_errors=True) as name:
        with (Path(name) / _LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # without locks, the age of a folder decides
                fcntl.flock(lock, fcntl.LOCK_EX)
                lock.write(platform.node())  # while the file is empty, its writer may not hold the lock yet
                lock.flush()
            yield Path(name)


def remove_leftovers(cache: Folder) -> list[str]:
    """Remove the leftovers of killed preparations from a local cache and return their names.

    In a bucket, they are overwritten when the same data is prepared again.
    """
    removed: list[str] = []
    if not isinstance(cache, Path):
        return removed
    for folder in sorted(cache.iterdir()):
        if (folder.name.startswith(_WRITING) and _is_leftover(folder)) or (
            folder.name.startswith(SHARING) and _is_old(folder)
        ):
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                removed.append(folder.name)
    return removed


def _is_leftover(folder: Path) -> bool:
    try:
        with (folder / _LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.read() == platform.node():  # locks of other hosts may not be visible here
                return True
    except BlockingIOError:
        return False  # its writer is running
    except OSError:
        pass  # no lock file, or a file system without locks
    return _is_old(folder)


def _is_old(folder: Path) -> bool:
    try:
        changed = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return False  # another process is removing it or writing to it
    return time.time() - changed > _ABANDONED_SECONDS


@contextmanager
def enough_space(path: Folder, needed: int | None = None) -> Iterator[None]:
    """Turn the OSError of a full disk in the block, which writes `needed` bytes to `path`, into a DataError."""
    if not isinstance(path, Path):
        yield  # buckets do not fill up
        return
    cache = _cache_of(path)
    free = shutil.disk_usage(cache).free
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        needs = "" if needed is None else f"{path.name} needs {needed:,} bytes and "
        raise _no_space(cache, f"{needs}{free:,} bytes are free; {error.strerror}") from error


def require_space(folder: Folder, needed: int) -> None:
    """Raise DataError if a local disk has fewer than about `needed` bytes left."""
    if isinstance(folder, Path) and (free := shutil.disk_usage(folder).free) < needed:
        raise _no_space(_cache_of(folder / "all"), f"it needs about {needed:,} bytes and {free:,} bytes are free")


def _cache_of(path: Path) -> Path:
    return next((parent.parent for parent in path.parents if parent.name.startswith(_WRITING)), path.parent)


def _no_space(cache: Path, reason: str) -> DataError:
    return DataError(
        f"data.cache_dir: {cache} has no space for the prepared data ({reason}). Free some space, or set "
        "data.cache_dir to a folder on another disk"
    )


class Checksums:
    """The size of a file and the CRC-32 of each of its blocks, computed while its bytes pass."""

    BLOCK = 1 << 24

    def __init__(self, block: int = BLOCK):
        self._block = block
        self.size = 0
        self.sums: list[int] = []

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes to the end of the file."""
        view = memoryview(data).cast("B")
        while view:
            inside = self.size % self._block
            block, view = view[: self._block - inside], view[self._block - inside :]
            if inside:
                self.sums[-1] = zlib.crc32(block, self.sums[-1])
            else:
                self.sums.append(zlib.crc32(block))
            self.size += len(block)

    @classmethod
    def of(cls, path: Folder, block: int = BLOCK) -> Checksums:
        """Read a file and return its checksums. Raises OSError."""
        found = cls(block)
        with path.open("rb") as file:
            while part := file.read(cls.BLOCK):
                found.update(part)
        return found


class ChecksummedFile:
    """Writes to an open file and keeps the checksums of what was written."""

    def __init__(self, file: Any):
        self._file = file
        self.checksums = Checksums()

    def write(self, data: bytes | memoryview) -> None:
        """Write bytes. Raises OSError."""
        self._file.write(data)
        self.checksums.update(data)


def array_header(shape: tuple[int, ...], dtype: np.dtype) -> dict[str, Any]:
    """Return the header of an .npy file."""
    return {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}


@contextmanager
def open_array(path: Folder, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Callable[[np.ndarray], Checksums]]:
    """Yield a function that writes blocks of rows to an .npy file whose space is reserved first, on a local disk.

    The function returns the checksums of the file so far. Plain writes raise OSError on a full disk, where a
    memory-mapped file would end the process with SIGBUS.
    """
    with path.open("wb") as file:
        out = ChecksummedFile(file)
        np.lib.format.write_array_header_1_0(out, array_header(shape, dtype))  # type: ignore[arg-type]
        size = out.checksums.size + math.prod(shape) * dtype.itemsize
        if isinstance(path, Path):
            _reserve(file.fileno(), size)

        def write(block: np.ndarray) -> Checksums:
            out.write(np.ascontiguousarray(block, dtype).data)
            return out.checksums

        yield write
        file.flush()
        if isinstance(path, Path):
            os.fsync(file.fileno())  # a network file system may report a full disk only here
        if out.checksums.size != size:
            raise AssertionError(f"{path}: {out.checksums.size} bytes written, {size} expected")


def _reserve(file: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS: the writes report a full disk
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise  # other errors: the file system cannot reserve space, and writing will report a full disk
