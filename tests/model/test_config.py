"""A configuration that cannot be built is refused with the field, its value and a fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.config import ModelConfig, MoEConfig, PositionConfig, RopeScalingConfig
from tests.model.test_reference import CASES, changed
from tests.models import TINY_ATTENTION, tiny_config

MOE = tiny_config(moe=MoEConfig(4, 2, 24))
SCALED = tiny_config(position=PositionConfig(scaling=RopeScalingConfig()))


def router(name: str, k: int, weights: str = "renormalized", bidirectional: bool = False) -> ModelConfig:
    attention = replace(TINY_ATTENTION, mask="bidirectional" if bidirectional else "causal")
    return tiny_config(moe=MoEConfig(4, k, 24, router=name, weights=weights), attention=attention)


BAD = [
    *((tiny_config(), f, 0) for f in ("num_layers", "embed_dim", "max_length", "mlp.hidden_dim")),
    *(
        (tiny_config(), f"attention.{f}", value)
        for f in ("num_heads", "num_kv_heads", "head_dim", "window")
        for value in (0, -1)
    ),
    *((tiny_config(), "attention.blocks", value) for value in ((), (4, 2), (0, 1, 2), (4, 0, 2), (4, 1, -1))),
    (tiny_config(), "attention.num_kv_heads", 3),
    (tiny_config(), "attention.layers", ()),
    (tiny_config(), "attention.layers", ("global", "slidng")),
    (tiny_config(), "attention.mask", "casual"),
    (tiny_config(), "attention.softcap", 0.0),
    (tiny_config(), "attention.query_scale", 0.0),
    (tiny_config(), "attention.head_dim", 7),
    (tiny_config(), "attention.implementation", "cuda"),
    (tiny_config(), "attention.context_parallel", "rings"),
    (tiny_config(attention=replace(TINY_ATTENTION, layers=("block_sparse",))), "attention.context_parallel", "ulysses"),
    (tiny_config(attention=replace(TINY_ATTENTION, mask="prefix")), "attention.context_parallel", "ring"),
    (tiny_config(position=PositionConfig("alibi")), "attention.context_parallel", "ring"),
    (tiny_config(), "vocab_size", -5),
    (tiny_config(), "final_softcap", -1.0),
    (tiny_config(), "dropout", 1.0),
    (tiny_config(), "dropout", -0.1),
    (tiny_config(), "mup_base_dim", 0),
    (tiny_config(), "scan_unroll", -1),
    (tiny_config(), "norm.epsilon", -1e-6),
    (tiny_config(), "norm.kind", "rms"),
    (tiny_config(), "mlp.kind", "swish"),
    (tiny_config(), "dtype", "fp8"),
    (tiny_config(), "remat", "all"),
    (tiny_config(remat="names"), "remat_names", ()),
    (tiny_config(), "init.scale", -1.0),
    (tiny_config(), "position.kind", "rotary"),
    (tiny_config(), "position.theta", 0.0),
    (tiny_config(), "position.local_theta", -1.0),
    (tiny_config(), "position.rotary_fraction", 0.0),
    (tiny_config(), "position.rotary_fraction", 1.5),
    (tiny_config(), "position.rotary_fraction", 0.4),  # 3 of 8 dimensions
    (tiny_config(position=PositionConfig("sinusoidal")), "embed_dim", 31),
    (SCALED, "position.kind", "alibi"),
    (SCALED, "position.scaling.kind", "longrope"),
    (SCALED, "position.scaling.factor", 0.5),
    (SCALED, "position.scaling.original_length", 0),
    (changed(SCALED, "position.scaling.kind", "llama3"), "position.scaling.beta_fast", 1.0),
    (changed(SCALED, "position.scaling.kind", "yarn"), "position.scaling.beta_fast", 0.5),
    (changed(SCALED, "position.scaling.kind", "ntk"), "attention.head_dim", 2),
    *((MOE, "moe.num_experts", value) for value in (0, 1)),
    *((MOE, "moe.top_k", value) for value in (0, 5)),
    (MOE, "moe.layers", ()),
    (MOE, "moe.layers", ("dense",)),
    (MOE, "moe.layers", ("dense", "dense", "moe")),
    (MOE, "moe.hidden_dim", 0),
    (MOE, "moe.load_balance", -0.1),
    (MOE, "moe.z_loss", -0.1),
    (MOE, "moe.shared_experts", -1),
    *(
        (MOE, f"moe.{f}", value)
        for f in ("scale", "capacity_factor", "all_to_all_buffer_factor")
        for value in (0.0, -1.0, float("inf"))
    ),
    *((MOE, f"moe.{f}", value) for f in ("jitter", "router_dropout") for value in (1.0, -0.1)),
    (MOE, "moe.router", "topk"),
    (MOE, "moe.router", "expert_choice"),  # reads later tokens
    (MOE, "moe.router", "soft"),
    (MOE, "moe.top_k", 1),  # every weight 1
    (router("switch", 1), "moe.top_k", 2),
    (router("gshard", 2), "moe.top_k", 3),
    (router("dense", 4), "moe.top_k", 2),
    (router("gshard", 2), "moe.weights", "sigmoid"),
    (router("hash", 2), "moe.weights", "softmax"),
    (router("hash", 2), "moe.jitter", 0.01),
    (router("random", 2), "moe.router_dropout", 0.1),
    (router("sinkhorn", 1, weights="sigmoid"), "moe.weights", "softmax_top_k"),
    (router("gshard", 2), "moe.bias_rate", 0.1),
    (MOE, "moe.bias_rate", -0.1),
    *((MOE, "moe.groups", value) for value in ((3, 1), (2, 3), (0, 1), (2,), (4, 1))),
    (router("sinkhorn", 2), "moe.groups", (2, 1)),
    *((MOE, "moe.dispatch", value) for value in ("gather", "einsum", "scatter")),
    (router("soft", 2, bidirectional=True), "moe.capacity_factor", 1.0),
    (router("soft", 2, bidirectional=True), "moe.dispatch", "gather"),
    (router("dense", 4), "moe.capacity_factor", 1.0),
]


@pytest.mark.parametrize("config, path, value", BAD, ids=lambda x: "" if isinstance(x, ModelConfig) else str(x))
def test_errors_name_the_field_its_value_and_a_fix(config, path, value):
    config.validate()
    with pytest.raises(ValueError) as error:
        changed(config, path, value).validate()
    message = str(error.value)
    assert message.startswith("model.") and "\n" not in message
    assert path.rsplit(".", 1)[-1] in message and "model." + path.rsplit(".", 1)[0] in message
    wrong = value[-1] if isinstance(value, tuple) and value else value
    assert str(wrong) in message
    assert len(message.split(":", 1)[1].strip()) > 10  # the reason and the fix


@pytest.mark.parametrize("name", CASES)
def test_the_published_architectures_are_accepted(name):
    CASES[name][0].validate()


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(256, 8, weights="sigmoid_renormalized", groups=(8, 4), scale=2.5, bias_rate=0.001, shared_experts=1),
        MoEConfig(4, 1, router="switch", capacity_factor=1.0, dispatch="einsum", jitter=0.01),
        MoEConfig(4, 1, weights="sigmoid"),
        MoEConfig(4, 2, dispatch="dense", capacity_factor=0.5),
        MoEConfig(1, 1),  # one expert needs no weights
        *(MoEConfig(4, 2, router=name) for name in ("gshard", "noisy_top_k", "sinkhorn", "hash", "random")),
    ],
)
def test_causal_routers_are_accepted_in_decoders(moe):
    moe.validate(causal=True)


def test_noncausal_routers_are_accepted_in_encoders_only():
    for moe in (MoEConfig(4, 2, router="expert_choice", dispatch="gather"), MoEConfig(4, 2, router="soft", scale=2.0)):
        moe.validate(causal=False)
        with pytest.raises(ValueError, match=r"model\.moe\.router = .*later ones.*train\.objective='masked'"):
            moe.validate(causal=True)
