"""Decode MXFP4 weights (OCP Microscaling Formats 1.0, sec. 5.2, 6.3), as OpenAI releases the experts of gpt-oss.

Each group of 32 4-bit floats shares a scale. They are read as bfloat16, which represents every such number exactly.

On disk, a tensor [E, K, N] is `<name>_blocks` uint8 [E, N, K / 32, 16], with two numbers per byte and the first in the
low bits, and `<name>_scales` uint8 [E, N, K / 32]. A number is its FP4 value (1 sign bit, 2 exponent bits, 1 mantissa
bit) times 2^(scale - 127).

Letters: E experts, K inputs, N outputs.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from interop.load import ModelFilesError, Source, TensorInfo
from interop.translate import UnsupportedModelError

BLOCKS, SCALES = "_blocks", "_scales"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by their 4 bits
BYTES = 16  # size of a block
NAN = 255  # scale of a block of NaNs
BFLOAT16 = np.dtype(jnp.bfloat16)
ROWS = 512  # rows of a matrix decoded at once


def dequantize(source: Source, quantization: dict[str, Any]) -> Source:
    """Return `source` with each pair of blocks and scales as one bfloat16 tensor.

    Reading such a tensor holds all of it in host memory as bfloat16: 1.1 GB for the largest of gpt-oss-20b. Raises
    UnsupportedModelError for another method and ModelFilesError if blocks and scales do not fit.
    """
    method = quantization.get("quant_method")
    if method != "mxfp4":
        raise UnsupportedModelError(
            f"config.json: quantization_config.quant_method = {method!r}: not supported (supported: 'mxfp4')"
        )
    return MXFP4(source)


class MXFP4:
    """A Source that decodes MXFP4 tensors when it reads them."""

    def __init__(self, source: Source):
        self.source = source
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in source.tensors.items():
            whole = name.removesuffix(BLOCKS)
            if whole != name:
                self.tensors[whole] = self._checked(whole, info)
            elif not (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in source.tensors):
                self.tensors[name] = info

    def _checked(self, name: str, blocks: TensorInfo) -> TensorInfo:
        scales = self.source.tensors.get(name + SCALES)
        if scales is None:
            raise ModelFilesError(
                f"{blocks.file}: {name}{BLOCKS} has no {name}{SCALES}: a file with scales is missing. Download it"
            )
        if name in self.source.tensors:
            raise ModelFilesError(
                f"{blocks.file}: {name} exists twice, as 4-bit floats and as {self.source.tensors[name].dtype}. Use "
                f"the files of one release"
            )
        right = len(blocks.shape) == 4 and blocks.shape[-1] == BYTES and scales.shape == blocks.shape[:-1]
        if not right or (blocks.dtype, scales.dtype) != ("uint8", "uint8"):
            raise ModelFilesError(
                f"{blocks.file}: {name}{BLOCKS} is {blocks.dtype}{list(blocks.shape)} and {name}{SCALES} "
                f"{scales.dtype}{list(scales.shape)}: "
                f"must be uint8 [experts, outputs, inputs / 32, {BYTES}] and uint8 [experts, outputs, inputs / 32]. "
                f"Use the files of one release"
            )
        E, N, groups, _ = blocks.shape
        return TensorInfo((E, groups * 2 * BYTES, N), "bfloat16", blocks.file)

    def read(self, name: str) -> np.ndarray:
        """Return the tensor: decoded to bfloat16 in memory if it is MXFP4, else as the source returns it."""
        if name + BLOCKS not in self.source.tensors:
            return self.source.read(name)
        blocks_ENGB, scales_ENG = self.source.read(name + BLOCKS), self.source.read(name + SCALES)
        E, N, groups, _ = blocks_ENGB.shape
        out_ENX = np.empty((E, N, groups * BYTES), np.uint32)
        for e, n in np.ndindex(E, -(-N // ROWS)):
            rows = e, slice(n * ROWS, (n + 1) * ROWS)
            entry_NGB = (scales_ENG[rows].astype(np.uint16) << 8)[..., None] | blocks_ENGB[rows]
            out_ENX[rows] = TABLE[entry_NGB.reshape(len(entry_NGB), -1)]
        return out_ENX.view(BFLOAT16).swapaxes(1, 2)

    def release(self) -> None:
        """Release the file pages that were read."""
        self.source.release()


def _table() -> np.ndarray:
    """Return the uint32 that packs the two bfloat16 numbers of each entry 256 * scale + byte, in memory order."""
    with np.errstate(over="ignore"):  # overflow gives infinity, which loading reports
        pairs = np.stack([VALUES[np.arange(256) & 15], VALUES[np.arange(256) >> 4]], 1)
        floats = np.ldexp(pairs, np.arange(256, dtype=np.int32)[:, None, None] - 127).astype(BFLOAT16)
    floats[NAN] = np.nan
    return floats.view(np.uint32).reshape(-1)


TABLE = _table()
