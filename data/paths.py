"""Paths of runs, checkpoints and records: `etils.epath.Path`, on a local disk or in a bucket of Google Cloud Storage.

Strings become paths only here, because `pathlib` turns "gs://bucket" into the local folder "gs:/bucket". A bucket has
no append, rename or locks: an object appears whole when its upload ends, and a folder exists only as a prefix of object
names. Code that depends on the difference calls `is_local`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import secrets
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

Folder: TypeAlias = "Path | epath.Path"  # a local folder or file, or one in a bucket
MAX_NAME_BYTES = 255  # limit for one part of a local path on common file systems


class PathError(ValueError):
    """A path that cannot be used; the message names the field, the value and the fix."""


def parse_path(value: str | os.PathLike[str], field: str = "path") -> epath.Path:
    """Return the path that a user wrote as `value` of `field`: local, or gs://BUCKET/NAME. Does not access the disk.

    Raises PathError for another scheme, an address without a bucket, or a name that no file system accepts.
    """
    text = os.fspath(value)
    shown = text if len(text) <= 100 else f"{text[:100]}... ({len(text)} characters)"
    scheme, separator, rest = text.partition("://")
    if separator:
        if scheme != "gs":
            raise PathError(
                f"{field} = {shown!r}: only local folders and gs:// are supported, not {scheme}://. "
                f"Try gs://BUCKET/NAME or a local path"
            )
        bucket = rest.partition("/")[0]
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]+", bucket) or "//" in rest:
            raise PathError(
                f"{field} = {shown!r}: a path in a bucket has the form gs://BUCKET/NAME. Try gs://BUCKET/runs/a"
            )
        _configure_bucket_client()
    elif mangled := re.match(r"(gs|s3|az|hf|https?|file):/", text):
        raise PathError(
            f"{field} = {shown!r}: {mangled[0]} has one slash instead of two and would be a local folder. "
            f"Try gs://BUCKET/NAME or a local path"
        )
    if "\0" in text or not text:
        raise PathError(f"{field} = {shown!r}: not a valid file name. Try a name of letters, digits, '-' and '_'")
    if longest := max((len(os.fsencode(part)) for part in text.split("/")), default=0):
        if longest > MAX_NAME_BYTES:
            raise PathError(
                f"{field} = {shown!r}: a name has {longest} bytes, but file systems allow at most {MAX_NAME_BYTES}. "
                f"Try a shorter name"
            )
    return epath.Path(text)


def is_local(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is on a file system of this machine, with append, rename and locks."""
    return "://" not in os.fspath(path)


def require_backend(path: epath.Path, field: str = "path") -> epath.Path:
    """Return `path`. Raises PathError if it is in a bucket and gcsfs is not installed."""
    if not is_local(path):
        import fsspec

        try:
            fsspec.get_filesystem_class("gcs")
        except ImportError as error:
            raise PathError(
                f"{field} = {os.fspath(path)!r}: Google Cloud Storage needs gcsfs, which is not installed. "
                f"Try pip install gcsfs, or a local path"
            ) from error
    return path


@functools.cache
def _configure_bucket_client() -> None:
    """Set how gcsfs works in this process, before its first use."""
    import fsspec.config

    # Other processes and TensorStore write to the same folders, so a listing is old as soon as it is read.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    # gcsfs asks for the type of the bucket before every access, and repeats it where an account may not know the type.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a traceback of each error that it raises


def bucket_client() -> Any:
    """Return the gcsfs file system through which epath reaches buckets."""
    import fsspec

    return fsspec.filesystem("gcs", finalize_on_close=True)  # the same instance for equal arguments


def list_names(folder: Folder) -> list[str]:
    """Return the sorted names in a folder, or [] if it does not exist. Raises OSError for any other failure."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:  # an empty folder of a bucket does not exist
        return []


def list_files(folder: epath.Path) -> list[str]:
    """Return the sorted paths of all files below a folder, relative to it."""
    if is_local(folder):
        found = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
        return sorted(os.path.relpath(file, folder) for file in found)
    # epath's walk gives paths without gs://.
    prefix = f"{os.fspath(folder).partition('://')[2].rstrip('/')}/"
    return sorted(file.lstrip("/").removeprefix(prefix) for file in bucket_client().find(os.fspath(folder)))


def file_size(file: epath.Path) -> int:
    """Return the size of a file in bytes. Raises OSError."""
    # epath's local stat fails if the user id has no name.
    return os.stat(file).st_size if is_local(file) else file.stat().length


def write_whole(file: str | os.PathLike[str], content: str | bytes, *, local: bool | None = None) -> None:
    """Write a file so that a reader finds either the old or the new content, even after a crash. Raises OSError.

    local: whether the file system of `file` can rename (default: taken from the path).
    """
    path = parse_path(file)
    data = content.encode("utf-8") if isinstance(content, str) else content
    if not (is_local(path) if local is None else local):
        try:
            path.write_bytes(data)  # an object is replaced when its upload ends
        except Exception as error:  # gcsfs raises its own exception classes, with messages of several lines
            raise OSError(f"{path}: {' '.join(str(error).split())}") from error
        return
    temporary = os.path.join(path.parent, f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
