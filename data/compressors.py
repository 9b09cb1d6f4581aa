"""General-purpose compressors as a baseline for a model's bits per byte."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Iterable

from data.config import DataError

_COMPRESSORS = {
    "gzip -9": lambda content: gzip.compress(content, 9, mtime=0),
    "bz2 -9": lambda content: bz2.compress(content, 9),
    "xz -9e": lambda content: lzma.compress(content, preset=9 | lzma.PRESET_EXTREME),
}


def compressed_sizes(files: Iterable[bytes]) -> dict[str, float]:
    """Return the bits per byte of each compressor: 8 * (sum of compressed sizes) / (sum of file sizes).

    Files are compressed separately, and headers count. Raises DataError if all files are empty.
    """
    count, total, sizes = 0, 0, dict.fromkeys(_COMPRESSORS, 0)
    for count, file in enumerate(files, 1):  # noqa: B007
        total += len(file)
        for name, pack in _COMPRESSORS.items():
            sizes[name] += len(pack(file))
    if total == 0:
        raise DataError(f"{count} files have 0 bytes in total: bits per byte requires held-out text")
    return {name: size * 8 / total for name, size in sizes.items()}
