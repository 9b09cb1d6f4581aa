"""8-bit floats with block scales, against the formula in float64."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from interop.fp8 import dequantize
from interop.load import ModelFilesError, TensorInfo
from interop.translate import UnsupportedModelError

RELEASED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [4, 3]}


class Memory:
    """A Source of arrays in memory."""

    def __init__(self, **held: np.ndarray):
        self.held, self.released = held, 0
        self.tensors = {name: TensorInfo(x.shape, x.dtype.name, "a file") for name, x in held.items()}

    def read(self, name: str) -> np.ndarray:
        return self.held[name]

    def release(self) -> None:
        self.released += 1


def quantized(rows: int, columns: int) -> dict[str, np.ndarray]:
    """Return every 8-bit number except the two NaNs, in a matrix that blocks of 4 x 3 may not divide."""
    rng = np.random.default_rng(0)
    bits = np.resize(np.setdiff1d(np.arange(256), [0x7F, 0xFF]), rows * columns).astype(np.uint8)
    scales = np.exp(rng.standard_normal((-(-rows // 4), -(-columns // 3)))).astype(np.float32)
    weight = rng.permutation(bits).reshape(rows, columns).view(ml_dtypes.float8_e4m3fn)
    return {"w": weight, "w_scale_inv": scales}


def by_formula(bits: int) -> float:
    """Return the value of E4M3 bits: 1 sign bit, 4 exponent bits with bias 7, 3 fraction bits and no infinities
    (Micikevicius et al. 2022, table 1)."""
    sign, exponent, fraction = -1.0 if bits >> 7 else 1.0, bits >> 3 & 15, bits & 7
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


@pytest.mark.parametrize("rows, columns", [(18, 17), (16, 18), (3, 100)])
def test_numbers_are_multiplied_by_the_scale_of_their_block(rows: int, columns: int):
    held = quantized(rows, columns)
    norm = np.ones(5, ml_dtypes.bfloat16)
    source = dequantize(Memory(**held, norm=norm), RELEASED)
    assert source.tensors == {
        "w": TensorInfo((rows, columns), "float32", "a file"),
        "norm": TensorInfo((5,), "bfloat16", "a file"),
    }
    found = source.read("w")
    assert found.dtype == np.float32
    bits = held["w"].view(np.uint8)
    for i in range(rows):
        for j in range(columns):
            want = by_formula(int(bits[i, j])) * float(held["w_scale_inv"][i // 4, j // 3])
            assert abs(float(found[i, j]) - want) <= 1e-7 * abs(want)
    assert source.read("norm") is norm
    source.release()
    assert source.source.released == 1


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"quant_method": "gptq"}, UnsupportedModelError, "gptq"),
        ({"fmt": "e5m2"}, UnsupportedModelError, "e5m2"),
        ({"scale_fmt": "int"}, UnsupportedModelError, "scale_fmt"),
        ({"weight_block_size": [128]}, UnsupportedModelError, "weight_block_size"),
        ({"weight_block_size": [128, 128]}, ModelFilesError, "w_scale_inv"),
    ],
)
def test_unsupported_configs_are_refused(change: dict, error: type, words: str):
    with pytest.raises(error, match=words):
        dequantize(Memory(**quantized(18, 17)), RELEASED | change)


def test_missing_scales_and_other_float_formats_are_refused():
    held = quantized(18, 17)
    with pytest.raises(ModelFilesError, match="no w_scale_inv"):
        dequantize(Memory(w=held["w"]), RELEASED)
    with pytest.raises(ModelFilesError, match="float8_e5m2"):
        dequantize(Memory(w=held["w"].astype(ml_dtypes.float8_e5m2), w_scale_inv=held["w_scale_inv"]), RELEASED)
