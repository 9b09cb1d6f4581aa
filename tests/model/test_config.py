"""Every configuration that cannot be built is refused with the field, the value and the fix."""

from __future__ import annotations

from dataclasses import replace

import pytest

from model.config import ModelConfig, MoEConfig, PositionConfig, RopeScalingConfig
from tests.model.test_reference import CASES, changed
from tests.models import TINY_ATTENTION, tiny_config

MOE = tiny_config(moe=MoEConfig(4, 2, 24))
SCALED = tiny_config(position=PositionConfig(scaling=RopeScalingConfig()))

BAD = [
    *((tiny_config(), f, 0) for f in ("num_layers", "embed_dim", "max_length", "mlp.hidden_dim")),
    *(
        (tiny_config(), f"attention.{f}", value)
        for f in ("num_heads", "num_kv_heads", "head_dim", "window", "block_size", "local_blocks", "block_stride")
        for value in (0, -1)
    ),
    (tiny_config(), "attention.num_kv_heads", 3),
    (tiny_config(), "attention.layers", ()),
    (tiny_config(), "attention.layers", ("global", "slidng")),
    (tiny_config(), "attention.mask", "casual"),
    (tiny_config(), "attention.softcap", 0.0),
    (tiny_config(), "attention.query_scale", 0.0),
    (tiny_config(), "attention.head_dim", 7),
    (tiny_config(), "attention.implementation", "cuda"),
    (tiny_config(), "attention.context", "rings"),
    (tiny_config(attention=replace(TINY_ATTENTION, layers=("block_sparse",))), "attention.context", "ulysses"),
    (tiny_config(attention=replace(TINY_ATTENTION, mask="prefix")), "attention.context", "ring"),
    (tiny_config(position=PositionConfig("alibi")), "attention.context", "ring"),
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
    (changed(SCALED, "position.scaling.kind", "llama3"), "position.scaling.high_freq_factor", 1.0),
    (changed(SCALED, "position.scaling.kind", "yarn"), "position.scaling.beta_fast", 0.5),
    (changed(SCALED, "position.scaling.kind", "ntk"), "attention.head_dim", 2),
    *((MOE, "moe.num_experts", value) for value in (0, 1)),
    *((MOE, "moe.top_k", value) for value in (0, 5)),
    (MOE, "moe.layers", ()),
    (MOE, "moe.layers", ("dense",)),
    (MOE, "moe.hidden_dim", 0),
    (MOE, "moe.load_balance", -0.1),
    (MOE, "moe.z_loss", -0.1),
]


@pytest.mark.parametrize("config, path, value", BAD, ids=lambda x: "" if isinstance(x, ModelConfig) else str(x))
def test_a_bad_field_is_named_with_its_value_and_a_fix(config, path, value):
    config.validate()
    with pytest.raises(ValueError) as error:
        changed(config, path, value).validate()
    message = str(error.value)
    assert message.startswith("model.") and "\n" not in message
    assert path.rsplit(".", 1)[-1] in message and "model." + path.rsplit(".", 1)[0] in message
    wrong = value[-1] if isinstance(value, tuple) and value else value
    assert str(wrong) in message
    assert len(message.split(":", 1)[1].strip()) > 10  # what to do


@pytest.mark.parametrize("name", CASES)
def test_the_published_architectures_are_accepted(name):
    CASES[name][0].validate()
