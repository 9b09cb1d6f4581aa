"""config.json of families with experts: round trips, the spellings of all versions, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from interop.families import family_of, to_json
from interop.translate import UnsupportedModelError, architecture
from model.config import ModelConfig
from tests.parity.families import BY_NAME

NAMES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
# Changes to the config that the family's config.json can express.
CAN_SAY = {
    "mixtral": {"attention.layers": ("sliding",), "attention.window": 5, "moe.load_balance": 0.07},
    "qwen3_moe": {
        "attention.bias": "all",
        "moe.weights": "softmax",
        "moe.layers": ("dense", "moe"),
        "tied_embeddings": True,
    },
    "olmoe": {"attention.clip_qkv": None, "moe.weights": "renormalized", "moe.load_balance": 0.02},
    "gpt_oss": {
        "position.scaling": None,
        "attention.layers": ("global",),
        "moe.num_experts": 6,
        "attention.bias": "none",
    },
}


def read(name: str, **changes) -> ModelConfig:
    """Return the config of the family's config.json with `changes`; None removes a key."""
    values = {k: v for k, v in (BY_NAME[name].config | changes).items() if v is not None or k not in changes}
    family, config, unread = family_of(values)
    assert family == name and unread == []
    return config


def changed(config, changes: dict):
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        config = replace(config, **{first: changed(getattr(config, first), {rest: value}) if rest else value})
    return config


@pytest.mark.parametrize("name", NAMES)
def test_configs_round_trip(name):
    for config in (read(name), changed(read(name), CAN_SAY[name])):
        family, values = to_json(config)
        assert family == name
        again = family_of(values)[1]
        assert architecture(again) == architecture(config)
        assert again.moe.load_balance == pytest.approx(config.moe.load_balance)


@pytest.mark.parametrize("name", NAMES)
def test_networks_outside_the_family_are_refused(name):
    config = read(name)
    wrong = [
        {"moe": None},
        {"moe.shared_experts": 1},
        {"moe.scale": 2.0},
        {"moe.router": "sinkhorn"},
        {"moe.bias_rate": 0.0},
        {"mlp.kind": "relu2"},
        {"mlp.bias": not config.mlp.bias},
        {"moe.weights": "sigmoid"},
        {"norm.placement": "post"},
        {"attention.sinks": not config.attention.sinks},
        {"attention.qk_norm": "head" if name != "qwen3_moe" else "full"},
        {"moe.capacity_factor": 1.5},
    ]
    for change in wrong:
        with pytest.raises(UnsupportedModelError):
            to_json(changed(config, change), name)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: there are only 4 experts"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mixtral", {"mlp_bias": True}, "mlp_bias = True"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts = 8, num_local_experts = 4"),
        ("qwen3_moe", {"mlp_only_layers": [3]}, r"mlp_only_layers = \[3\]"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ("olmoe", {"clip_qkv": -1.0}, r"clip_qkv = -1\.0"),
        ("olmoe", {"clip_qkv": "2"}, "clip_qkv = '2'"),
        ("gpt_oss", {"swiglu_limit": 6.0}, r"swiglu_limit = 6\.0"),
        ("gpt_oss", {"swiglu_alpha": 1.0}, r"swiglu_alpha = 1\.0"),
        ("gpt_oss", {"experts_per_token": 3}, "num_experts_per_tok = 2, experts_per_token = 3"),
        ("gpt_oss", {"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ],
)
def test_unsupported_values_are_refused_by_name(name, changes, message):
    with pytest.raises(UnsupportedModelError, match=message):
        read(name, **changes)


def test_missing_keys_have_the_defaults_of_transformers():
    """By default, gpt-oss has YaRN and alternating layers."""
    config = read(
        "gpt_oss",
        rope_scaling=None,
        rope_theta=None,
        layer_types=None,
        sliding_window=None,
        swiglu_limit=None,
        head_dim=None,
    )
    scaling = config.position.scaling
    assert (scaling.kind, scaling.factor, scaling.original_length, scaling.truncate) == ("yarn", 32.0, 4096, False)
    assert config.position.theta == 150_000 and config.attention.window == 128 and config.attention.head_dim == 64
    assert config.attention.layers == ("sliding", "global") and config.attention.bias == "all"
    for nothing in ({"rope_scaling": None}, {"rope_parameters": None}, {"rope_parameters": None, "rope_scaling": None}):
        values = {k: v for k, v in BY_NAME["gpt_oss"].config.items() if k != "rope_scaling"} | nothing
        assert family_of(values)[1].position.scaling == scaling, "null does not mean unscaled positions"
    assert read("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=None).moe.layers == ("dense", "moe")
    assert read("qwen3_moe", mlp_only_layers=[0, 1, 2]).moe is None
    renamed = {k: v for k, v in BY_NAME["qwen3_moe"].config.items() if k != "num_experts"} | {"num_local_experts": 8}
    assert family_of(renamed)[1] == read("qwen3_moe")
    window = read("qwen3_moe", use_sliding_window=True, sliding_window=9)
    assert (window.attention.layers, window.attention.window) == (("sliding",), 9)


def test_the_balance_loss_coefficient_is_converted():
    assert read("mixtral").moe.load_balance == pytest.approx(
        0.02 * 2 / 2
    )  # in transformers, top_k at perfect balance and averaged over layers
    assert read("qwen3_moe").moe.load_balance == pytest.approx(0.001 * 3 / 2)  # 2 of 3 layers have experts
