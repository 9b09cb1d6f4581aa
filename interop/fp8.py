"""Weights of 8-bit floats with a scale a block, as DeepSeek releases them (DeepSeek-V3, sec. 3.3.2), read as float32.

On disk a matrix [M, N] is float8_e4m3fn and `<name>_scale_inv` [ceil(M / b), ceil(N / c)] what each block of [b, c] of
it, 128 x 128, is to be multiplied by. Tensors without scales are as they are (embeddings, norms, routers).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from interop.load import ModelFilesError, Source, TensorInfo
from interop.translate import UnsupportedModelError

SUFFIX = "_scale_inv"
# Of `quantization_config`: what can be read. Activations are not quantized here, whatever their scheme.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", None),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8", None),
}
SCALES = ("float32", "bfloat16", "float16")


def dequantize(source: Source, quantization: dict[str, Any]) -> Source:
    """`source` with each scaled tensor as float32 and without the scales. Of a tensor that is read, the host holds all
    of it as float32. Raises UnsupportedModelError, and ModelFilesError where scales do not fit their tensors."""
    for key, allowed in SUPPORTED.items():
        if quantization.get(key) not in allowed:
            raise UnsupportedModelError(
                f"config.json: quantization_config.{key} = {quantization.get(key)!r} cannot be read; supported: "
                f"{', '.join(repr(value) for value in allowed if value is not None)}; take the model's release in "
                f"bfloat16"
            )
    block = quantization.get("weight_block_size") or (128, 128)
    if (
        not isinstance(block, (list, tuple))
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
    ):
        raise UnsupportedModelError(
            f"config.json: quantization_config.weight_block_size = {block!r}: must be rows and columns of a block, as "
            f"[128, 128]"
        )
    return Float8(source, (block[0], block[1]))


class Float8:
    """A Source whose 8-bit floats are multiplied by their scales when they are read."""

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
                        f"{info.file}: {name} has one scale, {name}_scale, and not one a block: such releases cannot "
                        "be read; take the model's release in bfloat16"
                    )
                raise ModelFilesError(
                    f"{info.file}: {name} is {info.dtype}, and there is no {name}{SUFFIX}: a file with scales is "
                    f"missing; download it"
                )

    def _checked(self, name: str, info: TensorInfo, scale: TensorInfo) -> TensorInfo:
        wanted = tuple(-(-size // b) for size, b in zip(info.shape, self.block, strict=False))
        if len(info.shape) != 2 or scale.shape != wanted or info.dtype != "float8_e4m3fn" or scale.dtype not in SCALES:
            raise ModelFilesError(
                f"{scale.file}: {name}{SUFFIX} is {scale.dtype}{list(scale.shape)}, for {name}, "
                f"{info.dtype}{list(info.shape)}: blocks of {list(self.block)} need a matrix of float8_e4m3fn and "
                f"scales {list(wanted)} of {', '.join(SCALES)}; take the files and config.json of one release"
            )
        return TensorInfo(info.shape, "float32", info.file)

    def read(self, name: str) -> np.ndarray:
        """The tensor: float32 and in memory where it has scales, else as the source gives it."""
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
        """Gives the pages that were read back to the system."""
        self.source.release()
