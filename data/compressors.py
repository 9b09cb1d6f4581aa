"""General-purpose compressors as a baseline for a model's bits per byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Sequence

from data.config import DataError

_COMPRESSORS = {
    "gzip -9": lambda content: gzip.compress(content, 9, mtime=0),
    "bz2 -9": lambda content: bz2.compress(content, 9),
    "xz -9e": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}


def compressed_sizes(files: Sequence[bytes]) -> dict[str, float]:
    """Return the bits per byte of each compressor: 8 * (sum of compressed sizes) / (sum of file sizes).

    Files are compressed separately, and headers count. Raises DataError if all files are empty.
    """
    total = sum(map(len, files))
    if total == 0:
        raise DataError(f"{len(files)} files have 0 bytes in total: bits per byte requires held-out text")
    return {name: sum(len(pack(file)) for file in files) * 8 / total for name, pack in _COMPRESSORS.items()}
