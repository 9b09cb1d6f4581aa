"""DeepSeek-V3: round trips of its released config.json, FP8 files, and the ignored multi-token prediction layer."""

from __future__ import annotations

import json
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interop import families
from interop.load import ModelFilesError, abstract
from interop.published import open_published
from interop.save import save_published
from interop.translate import UnsupportedModelError, architecture, differences, yarn_mscale
from model.config import LatentConfig
from model.cost import count_parameters
from sharding.rules import ShardingRules
from tests.model.test_reference import changed
from tests.parity.families import BY_NAME, write_folder

RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def test_the_released_config_round_trips():
    name, config, unread = families.family_of(RELEASED)
    assert (name, unread) == ("deepseek_v3", [])
    assert config.attention.latent == LatentConfig(1536, 512, 64, 128)
    assert config.attention.query_scale == pytest.approx(192**-0.5 * yarn_mscale(40.0) ** 2)
    count = count_parameters(config)
    assert (round(count.total / 1e9), round(count.active / 1e9)) == (671, 38)  # the paper's 37 excludes the embedding
    written = families.to_json(config)[1]
    assert architecture(families.family_of(written)[1]) == architecture(config)
    for key in set(written) & set(RELEASED) - {"num_nextn_predict_layers", "rope_scaling"}:
        assert written[key] == RELEASED[key], key
    for key in ("beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim", "original_max_position_embeddings"):
        assert written["rope_scaling"][key] == RELEASED["rope_scaling"][key], key


@pytest.mark.parametrize(
    "change",
    [
        {"q_lora_rank": None}, {"attention_bias": True}, {"rope_interleave": False}, {"norm_topk_prob": False},
        {"first_k_dense_replace": 0}, {"first_k_dense_replace": 61}, {"n_shared_experts": 3}, {"rms_norm_eps": 1e-5},
        {"rope_scaling": None}, {"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}},
        {"rope_scaling": RELEASED["rope_scaling"] | {"mscale_all_dim": 0}},
        {"rope_scaling": RELEASED["rope_scaling"] | {"mscale": 0.5}}, {"tie_word_embeddings": True},
    ],
)  # fmt: skip
def test_each_option_round_trips(change: dict):
    released, config = (families.family_of(values)[1] for values in (RELEASED, RELEASED | change))
    assert config != released
    again = families.family_of(families.to_json(config, "deepseek_v3")[1])[1]
    assert differences(architecture(config), architecture(again)) == []


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_key_value_heads", 64), ("scoring_func", "softmax"), ("topk_method", "greedy"), ("moe_layer_freq", 2),
        ("hidden_act", "gelu"),
    ],
)  # fmt: skip
def test_unsupported_values_are_refused(key: str, value: object):
    with pytest.raises(UnsupportedModelError, match=key):
        families.family_of(RELEASED | {key: value})


@pytest.mark.parametrize(
    "path, value",
    [
        ("attention.latent", None),
        ("attention.sinks", True),
        ("attention.bias", "qkv"),
        ("attention.softcap", 5.0),
        ("moe.bias_rate", None),
        ("moe.weights", "renormalized"),
        ("moe.layers", ("moe", "dense")),
        ("attention.query_scale", 0.01),
        ("attention.layers", ("sliding",)),
        ("norm.unit_offset", True),
    ],
)
def test_networks_outside_the_family_are_refused(path: str, value: object):
    config = families.family_of(RELEASED)[1]
    with pytest.raises(UnsupportedModelError):
        families.to_json(changed(config, path, value), "deepseek_v3")
    dense = replace(config, moe=None)
    assert families.to_json(dense)[1]["first_k_dense_replace"] == 61


def test_without_shared_experts_empty_tensors_are_written_for_transformers(tmp_path):
    family = BY_NAME["deepseek_v3"]
    config = families.family_of(family.config | {"n_shared_experts": 0})[1]
    weights = abstract(config, ShardingRules(), None)
    model = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), weights)
    save_published(jax.device_put(model), config, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    shared = {name: x.shape for name, x in found.items() if "shared_experts" in name}
    parts = {"gate_proj": (0, 32), "up_proj": (0, 32), "down_proj": (32, 0)}
    assert shared == {
        f"model.layers.{i}.mlp.shared_experts.{part}.weight": shape for i in (1, 2) for part, shape in parts.items()
    }
    published = open_published(tmp_path / "out")  # ignores them
    assert published.config.moe.shared_experts == 0


def test_fp8_tensors_are_decoded_and_the_extra_layer_is_ignored(tmp_path):
    family = BY_NAME["deepseek_v3"]
    write_folder(family, tmp_path)
    tensors = {name: x for shard in tmp_path.glob("*.safetensors") for name, x in load_file(shard).items()}
    path = tmp_path / "model.safetensors"  # takes precedence over the shards
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    plain = tensors[name]
    scale = np.float32(np.abs(plain).max() / 448)
    tensors[name] = (plain / scale).astype(ml_dtypes.float8_e4m3fn)
    tensors[name + "_scale_inv"] = np.full([-(-size // 16) for size in plain.shape], scale)
    values = json.loads((tmp_path / "config.json").read_text())
    last = values["num_hidden_layers"]
    further = {f"model.layers.{last}.{part}.weight": np.ones(3, np.float32) for part in ("eh_proj", "self_attn.o_proj")}
    save_file(tensors | further, path)
    values["quantization_config"] = RELEASED["quantization_config"] | {"weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(values))

    published = open_published(tmp_path)
    found = published.source.read(name)
    np.testing.assert_array_equal(found, tensors[name].astype(np.float32) * scale)
    # With 3 fraction bits, the relative error is at most 2^-4 (half the last bit); below 2^-6 the error is 2^-10.
    assert (np.abs(found - plain) <= np.maximum(np.abs(plain) * (2**-4 + 1e-6), scale * 2**-10)).all()
    for wrong in (f"model.layers.{last - 1}.eh_proj.weight", "model.further.weight"):
        save_file(tensors | further | {wrong: np.ones(3, np.float32)}, path)
        with pytest.raises(ModelFilesError, match="unexpected"):
            open_published(tmp_path)
