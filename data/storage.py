"""The cache folder on disk: folders that appear whole or not at all, and errors that say how much space is missing.

A folder is written under `writing-*` and renamed. Its writer holds a lock on a file in it, so that a later start knows
the leftovers of killed preparations from the work of live ones.
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
_ABANDONED_SECONDS = 86_400.0  # a folder whose lock says nothing is a leftover after a day without a change
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give a new folder that becomes `target` when the block succeeds and vanishes when it fails."""
    with _locked_folder(target.parent) as parent:
        temporary = parent / target.name
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # else another process made the same content first
                raise


def discard(folder: Path) -> None:
    """Remove a damaged folder in one step, so that no process removes what another one has just put there."""
    with _locked_folder(folder.parent) as parent, contextlib.suppress(FileNotFoundError):
        folder.rename(parent / folder.name)


@contextmanager
def _locked_folder(cache: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=_WRITING, dir=cache, ignore_cleanup_errors=True) as name:
        with (Path(name) / _LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: leftovers are known by their age
                fcntl.flock(lock, fcntl.LOCK_EX)
                lock.write(platform.node())  # while it is empty, its writer may not hold it yet
                lock.flush()
            yield Path(name)


def remove_leftovers(cache: Path) -> list[str]:
    """Remove what killed preparations left in the cache, and return the names of the folders."""
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
            if lock.read() == platform.node():  # locks of another host may not reach this one
                return True
    except BlockingIOError:
        return False  # its writer is alive
    except OSError:
        pass  # no lock file, or a file system without locks
    return _is_old(folder)


def _is_old(folder: Path) -> bool:
    try:
        changed = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return False  # somebody else removes it, or writes to it
    return time.time() - changed > _ABANDONED_SECONDS


@contextmanager
def enough_space(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn a full disk in the block, which writes `needed` bytes to `path`, into a DataError that says what to do."""
    cache = next((parent.parent for parent in path.parents if parent.name.startswith(_WRITING)), path.parent)
    free = shutil.disk_usage(cache).free
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        needs = "" if needed is None else f"{path.name} needs {needed:,} bytes and "
        raise DataError(
            f"data.cache_dir: {cache} has no space for the prepared data: {needs}{free:,} bytes are free "
            f"({error.strerror}). Free space there, or set data.cache_dir to a folder on another disk"
        ) from error


@contextmanager
def open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that writes blocks of rows to an .npy file, as plain writes into space that is reserved first.

    A memory-mapped file would end the process with SIGBUS on a full disk; this raises OSError.
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
            raise AssertionError(f"{path}: {file.tell()} bytes were written, {size} expected")


def _reserve(file: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS: the writes report a full disk
        return
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise  # else the file system cannot reserve, and the writes will report a full disk


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found = zlib.crc32(block, found)
    return found
