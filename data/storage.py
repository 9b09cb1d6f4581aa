"""Cache folders on disk that are complete or absent, and errors that report the free and required space.

A folder is written under `writing-*` and then renamed. Its writer locks a file in it, so that a later start can
distinguish leftovers of killed preparations from work in progress.
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

import numpy as np

from data.config import DataError
from data.processes import SHARING

_WRITING = "writing-"
_LOCK = "lock"
_ABANDONED_SECONDS = 86_400.0  # without a usable lock, a folder is a leftover after a day without changes
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that becomes `target` if the block succeeds and is removed if it fails."""
    with _locked_folder(target.parent) as parent:
        temporary = parent / target.name
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process made the same content first
                raise


def discard(folder: Path) -> None:
    """Remove a damaged folder in one step, so that no process removes another one's new folder."""
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


def remove_leftovers(cache: Path) -> list[str]:
    """Remove the leftovers of killed preparations from the cache and return their names."""
    removed = []
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
def enough_space(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the OSError of a full disk in the block, which writes `needed` bytes to `path`, into a DataError."""
    cache = next((parent.parent for parent in path.parents if parent.name.startswith(_WRITING)), path.parent)
    free = shutil.disk_usage(cache).free
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        needs = "" if needed is None else f"{path.name} needs {needed:,} bytes and "
        raise DataError(
            f"data.cache_dir: {cache} has no space for the prepared data ({needs}{free:,} bytes are free; "
            f"{error.strerror}). Free some space, or set data.cache_dir to a folder on another disk"
        ) from error


@contextmanager
def open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that writes blocks of rows to an .npy file whose space is reserved first.

    Plain writes raise OSError on a full disk, where a memory-mapped file would end the process with SIGBUS.
    """
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        size = file.tell() + math.prod(shape) * dtype.itemsize
        _reserve(file.fileno(), size)

        def write(block: np.ndarray) -> None:
            file.write(np.ascontiguousarray(block, dtype).data)

        yield write
        file.flush()
        os.fsync(file.fileno())  # a network file system may report a full disk only here
        if file.tell() != size:
            raise AssertionError(f"{path}: {file.tell()} bytes written, {size} expected")


def _reserve(file: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS: the writes report a full disk
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise  # other errors: the file system cannot reserve space, and writing will report a full disk


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return found
