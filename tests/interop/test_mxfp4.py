"""MXFP4 weights against transformers, and in a folder of gpt-oss.

tests/parity/mxfp4.npz holds the bits that `convert_moe_packed_tensors` of transformers 5.23.0 makes from `drawn`.
"""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from interop.load import ModelFilesError, TensorInfo, load, named
from interop.mxfp4 import dequantize
from interop.published import open_published
from interop.tensor_map import layer_stacks
from interop.translate import UnsupportedModelError
from sharding.rules import ShardingRules
from tests import parity
from tests.parity.families import BY_NAME, write_folder

METHOD = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


class Memory:
    def __init__(self, **tensors: np.ndarray):
        self.held, self.released = tensors, 0
        self.tensors = {name: TensorInfo(x.shape, str(x.dtype), "a.safetensors") for name, x in tensors.items()}

    def read(self, name: str) -> np.ndarray:
        return self.held[name]

    def release(self) -> None:
        self.released += 1


def drawn() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.RandomState(0)
    return random.randint(0, 256, (2, 6, 3, 16)).astype(np.uint8), random.randint(118, 130, (2, 6, 3)).astype(np.uint8)


def test_decoded_bits_match_transformers():
    blocks, scales = drawn()
    source = dequantize(
        Memory(x_blocks=blocks, x_scales=scales, y=np.ones(3, np.float32), z_scales=np.ones(1, np.uint8)), METHOD
    )
    assert source.tensors == {
        "x": TensorInfo((2, 96, 6), "bfloat16", "a.safetensors"),
        "y": TensorInfo((3,), "float32", "a.safetensors"),
        "z_scales": TensorInfo((1,), "uint8", "a.safetensors"),
    }
    found = source.read("x")
    assert found.dtype == ml_dtypes.bfloat16 and found.shape == (2, 96, 6)
    with np.load(Path(parity.__file__).parent / "mxfp4.npz") as file:
        np.testing.assert_array_equal(np.ascontiguousarray(found).view(np.int16), file["bits"])
    np.testing.assert_array_equal(source.read("y"), 1)
    source.release()
    assert source.source.released == 1


def test_every_number_and_scale_matches_the_formula():
    """In OCP Microscaling Formats 1.0, bits s e e m are (-1)^s 2^(e - 1) (1 + m / 2), or (-1)^s m / 2 if e is 0. The
    test has more rows than are decoded at once."""
    rows = 1100
    random = np.random.RandomState(1)
    blocks, scales = (
        random.randint(0, 256, (1, rows, 1, 16)).astype(np.uint8),
        (np.arange(rows) % 255).astype(np.uint8)[None, :, None],
    )
    found = dequantize(Memory(x_blocks=blocks, x_scales=scales), METHOD).read("x")[0].T.astype(np.float64)
    bits = np.stack([blocks[0, :, 0] & 15, blocks[0, :, 0] >> 4], -1).reshape(rows, 32).astype(int)
    s, e, m = bits >> 3, (bits >> 1) & 3, bits & 1
    value = (-1.0) ** s * np.where(e == 0, m / 2, 2.0 ** (e - 1) * (1 + m / 2))
    exact = value * 2.0 ** (scales[0].astype(int) - 127)
    normal = np.abs(exact) < 2.0**128
    np.testing.assert_array_equal(found[normal], exact[normal])
    assert np.isinf(found[~normal]).all() and 0 < (~normal).sum() < 400
    not_a_number = dequantize(Memory(x_blocks=blocks, x_scales=np.full_like(scales, 255)), METHOD).read("x")
    assert np.isnan(not_a_number.astype(np.float32)).all()


def test_blocks_and_scales_that_do_not_fit_are_refused():
    blocks, scales = drawn()
    for tensors, message in (
        ({"x_blocks": blocks}, "x_blocks has no x_scales: a file with scales is missing"),
        ({"x_blocks": blocks, "x_scales": scales[:, :5]}, r"x_scales uint8\[2, 5, 3\]: must be"),
        ({"x_blocks": blocks[..., :8], "x_scales": scales}, r"x_blocks is uint8\[2, 6, 3, 8\]"),
        ({"x_blocks": blocks, "x_scales": scales.astype(np.float32)}, "x_scales float32"),
        ({"x_blocks": blocks, "x_scales": scales, "x": np.ones(3)}, "x exists twice"),
    ):
        with pytest.raises(ModelFilesError, match=message):
            dequantize(Memory(**tensors), METHOD)
    with pytest.raises(UnsupportedModelError, match="quant_method = 'gptq'"):
        dequantize(Memory(), {"quant_method": "gptq"})


def test_a_gpt_oss_folder_with_mxfp4_experts_is_read(tmp_path):
    """As in the release, blocks and scales replace the experts' matrices, and columns of gate and up alternate."""
    family = BY_NAME["gpt_oss"]
    folder = write_folder(family, tmp_path, {})
    config = family.config | {
        "quantization_config": METHOD,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    D, F, E, random = 64, 32, 4, np.random.RandomState(2)
    shapes = {"model.embed_tokens.weight": (96, D), "model.norm.weight": (D,), "lm_head.weight": (96, D)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{name}.weight": (D,) for name in ("input_layernorm", "post_attention_layernorm")}
        for name, out, inner in (("q", 64, D), ("k", 32, D), ("v", 32, D), ("o", D, 64)):
            shapes |= {
                f"{layer}self_attn.{name}_proj.weight": (out, inner),
                f"{layer}self_attn.{name}_proj.bias": (out,),
            }
        shapes |= {
            f"{layer}self_attn.sinks": (4,),
            f"{layer}mlp.router.weight": (E, D),
            f"{layer}mlp.router.bias": (E,),
        }
        shapes |= {f"{layer}mlp.experts.gate_up_proj_bias": (E, 2 * F), f"{layer}mlp.experts.down_proj_bias": (E, D)}
    tensors = {name: random.standard_normal(shape).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()}
    for i in range(2):
        for name, rows, columns in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            blocks = random.randint(0, 256, (E, rows, columns // 32, 16)).astype(np.uint8)
            scales = random.randint(118, 125, (E, rows, columns // 32)).astype(np.uint8)
            tensors |= {
                f"model.layers.{i}.mlp.experts.{name}_blocks": blocks,
                f"model.layers.{i}.mlp.experts.{name}_scales": scales,
            }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    published = open_published(folder)
    assert published.family == "gpt_oss" and published.unread == []
    weights = named(load(published.source, published.tensor_map, published.config, ShardingRules()))
    prefix = "model.layers.1.mlp.experts."
    layer_1 = dequantize(
        Memory(**{k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}), METHOD
    )
    up_EDX, down_EFD = layer_1.read("gate_up_proj").astype(np.float32), layer_1.read("down_proj").astype(np.float32)
    path, i = layer_stacks(published.config)[1]
    np.testing.assert_array_equal(weights[f"{path}/mlp/up"][i], np.stack([up_EDX[..., ::2], up_EDX[..., 1::2]], 2))
    np.testing.assert_array_equal(weights[f"{path}/mlp/down"][i], down_EFD)
