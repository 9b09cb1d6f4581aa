"""What general compressors make of a set of files: the yardstick beside a model's bits per byte."""

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
    """Bits per byte of each compressor, every file by itself (headers included): sum of sizes * 8 / sum of bytes.

    Raises DataError when there is no byte to compress.
    """
    total = sum(map(len, files))
    if total == 0:
        raise DataError(f"{len(files)} files of 0 bytes in all: bits per byte needs at least one byte of held-out text")
    return {name: sum(len(pack(file)) for file in files) * 8 / total for name, pack in _COMPRESSORS.items()}
