"""Read the metadata and tensors of a GGUF file, version 2 or 3, memory-mapped and checked when opened.

The reader of the `gguf` package is not used: it takes seconds for a vocabulary's strings and returns short arrays for a
truncated file. Layout: ggml's GGUF specification, docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from interop.load import ModelFilesError
from interop.translate import UnsupportedModelError

# Metadata type codes and their NumPy dtypes. 7 is a bool, 8 a string and 9 an array.
_SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F64": np.dtype(np.float64),
}
_SLICE_BYTES = 1 << 20  # float32 output of one dequantize call, which holds a few copies of that size


class Tensor(NamedTuple):
    """Location and type of a tensor in the file."""

    shape: tuple[int, ...]  # in NumPy's order, rows first
    kind: str  # 'Q4_0', 'F16', ...
    offset: int  # first byte, from the start of the file
    row_bytes: int

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of the array from `GGUFFile.array`: float32 if the tensor is quantized."""
        return _PLAIN.get(self.kind, np.dtype(np.float32))

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return self.rows * self.row_bytes


class GGUFFile:
    """An open GGUF file. `metadata`: numbers, strings, bools and lists of them. `tensors`: by their names in the file.

    Raises ModelFilesError if the file is truncated or not GGUF, and UnsupportedModelError for a quantization that the
    `gguf` package cannot decode in NumPy.
    """

    def __init__(self, path: Path):
        self.path, self.quants = path, _package()
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelFilesError(f"{path}: {error.strerror}. Give a readable GGUF file") from error
        except ValueError as error:  # mmap raises this for an empty file
            raise ModelFilesError(f"{path}: the file is empty. Download it again") from error
        self._at = 0
        self.metadata, self.tensors = self._header()

    def array(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return the tensor: a view of the file, or a new float32 array if it is quantized.

        `rows`: reorder the rows of a matrix, so that row i of the file becomes row rows[i]. Decoding needs a few
        megabytes besides the result.
        """
        tensor = self.tensors[name]
        data = np.frombuffer(self._map, np.uint8, tensor.rows * tensor.row_bytes, tensor.offset)
        data = data.reshape(tensor.rows, tensor.row_bytes)
        if tensor.kind in _PLAIN:
            plain = data.view(tensor.dtype)
            if rows is None:
                return plain.reshape(tensor.shape)
            ordered = np.empty_like(plain)
            ordered[rows] = plain
            return ordered.reshape(tensor.shape)
        made = np.empty((tensor.rows, tensor.shape[-1]), np.float32)
        step = max(1, _SLICE_BYTES // (4 * tensor.shape[-1]))
        with np.errstate(all="ignore"):  # loading reports values that are not finite
            for start in range(0, tensor.rows, step):
                part = slice(start, start + step)
                made[part if rows is None else rows[part]] = self.quants.dequantize(data[part], self._kind(tensor.kind))
        return made.reshape(tensor.shape)

    def release(self) -> None:
        """Release the file pages that were read."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def _kind(self, kind: str) -> Any:
        return self.quants.GGMLQuantizationType[kind]

    # The header is read front to back with a cursor that never passes the end of the file.

    def _take(self, size: int) -> bytes:
        if size > len(self._map) - self._at:
            raise ModelFilesError(
                f"{self.path}: the file ends inside its header, after {len(self._map)} bytes. It is truncated or "
                f"damaged. Download it again"
            )
        self._at += size
        return self._map[self._at - size : self._at]

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _string(self) -> str:
        raw = self._take(self._number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFilesError(
                f"{self.path}: a string in the header is not UTF-8 ({error}). The file is damaged. Download it again"
            ) from error

    def _value(self, code: int) -> Any:
        if code == _STRING:
            return self._string()
        if code == _ARRAY:
            inner, count = self._number("<I"), self._number("<Q")
            if inner == _STRING:
                return [self._string() for _ in range(count)]
            return self._scalars(inner, count).tolist()
        return self._scalars(code, 1)[0].item()

    def _scalars(self, code: int, count: int) -> np.ndarray:
        if code not in _SCALARS:
            raise ModelFilesError(
                f"{self.path}: the header holds a value of the unknown type {code}. The file is damaged. Download it "
                "again"
            )
        dtype = np.dtype(_SCALARS[code])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _header(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._take(4) != b"GGUF":
            raise ModelFilesError(f"{self.path}: does not begin with 'GGUF', so it is not a GGUF file")
        version = self._number("<I")
        if version not in (2, 3):
            swapped = version & 0xFFFF == 0
            raise UnsupportedModelError(
                f"{self.path}: {'big-endian GGUF' if swapped else f'GGUF version {version}'} is not supported. "
                "Supported: little-endian files of version 2 or 3"
            )
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise ModelFilesError(
                    f"{self.path}: {key} occurs twice in the metadata. The file is damaged. Download it again"
                )
            metadata[key] = self._value(self._number("<I"))
        found = [self._tensor() for _ in range(num_tensors)]
        align = metadata.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise ModelFilesError(
                f"{self.path}: general.alignment = {align!r}: must be a power of 2, in bytes. The file is damaged. "
                "Download it again"
            )
        first = -(-self._at // align) * align
        tensors: dict[str, Tensor] = {}
        for name, tensor in found:
            if name in tensors:
                raise ModelFilesError(
                    f"{self.path}: tensor {name} occurs twice in the header. The file is damaged. Download it again"
                )
            tensors[name] = tensor._replace(offset=first + tensor.offset)
        self._check_layout(tensors, first, align)
        return metadata, tensors

    def _check_layout(self, tensors: dict[str, Tensor], first: int, align: int) -> None:
        """Raise ModelFilesError unless the tensors fill the rest of the file in some order, each beginning at the next
        multiple of `align` after the previous one, as ggml's readers require."""
        for name, tensor in tensors.items():
            if tensor.offset + tensor.size > len(self._map):
                raise ModelFilesError(
                    f"{self.path}: {name} ends at byte {tensor.offset + tensor.size}, but the file has only "
                    f"{len(self._map)} bytes: it is truncated. Download it again"
                )
        before, end = "the header", first
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            begin = tensor.offset
            wanted = -(-end // align) * align
            if begin != wanted:
                what = (
                    f"begins at byte {begin}, but {before} ends at byte {end}: they overlap"
                    if begin < end
                    else f"begins at byte {begin}, not at {wanted}, the next multiple of {align} after {before}"
                )
                raise ModelFilesError(f"{self.path}: {name} {what}. The file is damaged. Download it again")
            before, end = name, begin + tensor.size
        last = -(-end // align) * align
        if len(self._map) > last:
            raise ModelFilesError(
                f"{self.path}: {len(self._map) - last} bytes follow {before}, the last tensor in the header. The file "
                "is damaged. Download it again"
            )

    def _tensor(self) -> tuple[str, Tensor]:
        name, dims = self._string(), self._number("<I")
        if not 1 <= dims <= 4:
            raise ModelFilesError(
                f"{self.path}: {name} has {dims} dimensions, but GGUF allows 1 to 4. The file is damaged. Download it "
                "again"
            )
        shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
        code, offset = self._number("<I"), self._number("<Q")
        try:
            kind = self.quants.GGMLQuantizationType(code)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{self.path}: {name} has the unknown type {code}. Convert the file to Q8_0 or F16"
            ) from error
        block, size = self.quants.GGML_QUANT_SIZES[kind]
        if min(shape) < 1 or shape[-1] % block:
            raise ModelFilesError(
                f"{self.path}: {name} of shape {list(shape)} cannot be {kind.name}, which needs rows of whole blocks "
                f"of {block}"
            )
        if kind.name not in _PLAIN:
            try:
                self.quants.dequantize(np.zeros((1, size), np.uint8), kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self.path}: {name} is {kind.name}, which the gguf package cannot decode in NumPy. Convert the "
                    f"file to Q8_0 or F16"
                ) from error
        return name, Tensor(shape, kind.name, offset, shape[-1] // block * size)


def _package() -> Any:
    """Import the gguf package, which decodes the quantizations."""
    try:
        import gguf
    except ImportError as error:
        raise ModelFilesError("GGUF files require the gguf package: pip install 'meshwork[interop]'") from error
    return gguf
