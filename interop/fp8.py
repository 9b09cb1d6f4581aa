"""Decode 8-bit float weights with block scales, as DeepSeek releases them (DeepSeek-V3, sec. 3.3.2), to float32.

On disk, a matrix [M, N] is float8_e4m3fn, and `<name>_scale_inv` [ceil(M / b), ceil(N / c)] holds the factor of each
[b, c] block (128 x 128). Tensors without scales (embeddings, norms, routers) are not changed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from interop.load import ModelFilesError, Source, TensorInfo
from interop.translate import UnsupportedModelError

SUFFIX = "_scale_inv"
# Supported values in `quantization_config`. Activations are never quantized here, whatever scheme it names.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
}
SCALES = ("float32", "bfloat16", "float16")


def dequantize(source: Source, quantization: dict[str, Any]) -> Source:
    """Return `source` with each scaled tensor as float32 and without the scales.

    Reading a scaled tensor holds all of it in host memory as float32. Raises UnsupportedModelError for an unsupported
    config and ModelFilesError if scales do not fit their tensors.
    """
    for key, allowed in SUPPORTED.items():
        if quantization.get(key) not in allowed:
            raise UnsupportedModelError(
                f"config.json: quantization_config.{key} = {quantization.get(key)!r}: not supported (supported: "
                f"{', '.join(repr(value) for value in allowed if value is not None)}). Use the model's bfloat16 "
                f"release"
            )
    block = quantization.get("weight_block_size") or (128, 128)
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise UnsupportedModelError(
            f"config.json: quantization_config.weight_block_size = {block!r}: must be a block's rows and columns, such "
            f"as [128, 128]"
        )
    return Float8(source, (block[0], block[1]))


class Float8:
    """A Source that multiplies 8-bit floats by their scales when it reads them."""

    def __init__(self, source: Source, block: tuple[int, int]):
        self.source, self.block = source, block
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in source.tensors.items():
            if name.endswith(SUFFIX) and name.removesuffix(SUFFIX) in source.tensors:
                continue
            scale = source.tensors.get(name + SUFFIX)
            self.tensors[name] = info if scale is None else self._checked(name, info, scale)
            if scale is None and info.dtype.startswith("float8"):
                if name + "_scale" in source.tensors:
                    raise UnsupportedModelError(
                        f"{info.file}: {name} has a single scale, {name}_scale, instead of one per block, which is not "
                        "supported. Use the model's bfloat16 release"
                    )
                raise ModelFilesError(
                    f"{info.file}: {name} is {info.dtype}, but there is no {name}{SUFFIX}: a file with scales is "
                    f"missing. Download it"
                )

    def _checked(self, name: str, info: TensorInfo, scale: TensorInfo) -> TensorInfo:
        wanted = tuple(-(-size // b) for size, b in zip(info.shape, self.block, strict=False))
        if len(info.shape) != 2 or scale.shape != wanted or info.dtype != "float8_e4m3fn" or scale.dtype not in SCALES:
            raise ModelFilesError(
                f"{scale.file}: {name}{SUFFIX} is {scale.dtype}{list(scale.shape)} and {name} is "
                f"{info.dtype}{list(info.shape)}, but blocks of {list(self.block)} need a matrix of float8_e4m3fn and "
                f"scales {list(wanted)} of {', '.join(SCALES)}. Use files and config.json of the same release"
            )
        return TensorInfo(info.shape, "float32", info.file)

    def read(self, name: str) -> np.ndarray:
        """Return the tensor: decoded to float32 in memory if it has scales, else as the source returns it."""
        tensor = self.source.read(name)
        if name + SUFFIX not in self.source.tensors:
            return tensor
        scale = np.asarray(self.source.read(name + SUFFIX), np.float32)
        (rows, columns), out = self.block, np.empty(tensor.shape, np.float32)
        wide = np.repeat(scale, columns, axis=1)[:, : tensor.shape[1]]
        for i, scales in enumerate(wide):
            part = slice(i * rows, (i + 1) * rows)
            np.multiply(tensor[part].astype(np.float32), scales, out=out[part])
        return out

    def release(self) -> None:
        """Release the file pages that were read."""
        self.source.release()
