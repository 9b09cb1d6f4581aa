"""Small .npz files on local disks and in buckets."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np

from data.paths import parse_path, write_whole


def write_arrays(file: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], *, compress: bool = False) -> None:
    """Write an .npz file of small arrays atomically. Raises OSError.

    No array may be named "file".
    """
    content = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(content, **arrays)  # type: ignore[arg-type]
    write_whole(file, content.getvalue())


def read_arrays(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file. Raises OSError, or ValueError if the file is not a complete .npz file."""
    try:
        with np.load(io.BytesIO(parse_path(file).read_bytes()), allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (zipfile.BadZipFile, EOFError, KeyError, zlib.error) as error:
        raise ValueError(f"{file}: not a complete .npz file ({error})") from error
