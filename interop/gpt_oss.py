"""gpt-oss (OpenAI 2025): fused expert tensors, biases everywhere, attention sinks, and alternating sliding and global
layers. The released expert weights are MXFP4 (`mxfp4.py`).

Letters: D width, E experts, F hidden width of an expert, G 2 (gate, up).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, NORMS, base_config, base_json
from interop.mixtral import moe_config, moe_json, needed, one_of
from interop.tensor_map import Layer, TensorEntry
from interop.translate import Keys, sliding_json, windowed
from model.config import ModelConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("GptOssForCausalLM",)
THETA = 150_000.0
DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "attention_bias": True,
    "router_aux_loss_coef": 0.001,
}
# Default of transformers if config.json has neither `rope_parameters` nor `rope_scaling`, or null.
ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
SWIGLU = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    if "rope_parameters" not in keys and "rope_scaling" not in keys:
        keys.values = keys.values | {"rope_parameters": ROPE}
    keys.must("hidden_act", "silu", default="silu")
    for key, value in SWIGLU.items():
        keys.must(key, value, default=value)
    keys.take("initial_context_length", 0)  # unused: rope_scaling repeats it
    config = base_config(keys, theta=THETA, epsilon=1e-5)
    attention = replace(config.attention, sinks=True, **windowed(keys, config.num_layers, ("sliding", "global")))
    # The released files use two names for each count.
    chosen = one_of(keys, ("num_experts_per_tok", "experts_per_token"), 4)
    experts = one_of(keys, ("num_local_experts", "num_experts"), 128)
    moe = moe_config(keys, ["moe"] * config.num_layers, experts, chosen, config.mlp.hidden_dim, "softmax_top_k")
    return replace(config, attention=attention, mlp=replace(config.mlp, kind="swiglu_clamped", bias=True), moe=moe)


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    moe = needed(config)
    values = base_json(config) | SWIGLU | sliding_json(config) | {
        "architectures": list(ARCHITECTURES),
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "intermediate_size": moe.hidden_dim,
        "num_local_experts": moe.num_experts,
    } | moe_json(config)  # fmt: skip
    if values["rope_scaling"] is None:  # null would be read as the default, YaRN
        del values["rope_scaling"]
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": values["rope_theta"]}
    return values


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS, experts=_experts)


def _experts(config: ModelConfig, layer: Layer) -> Iterable[TensorEntry]:
    """Yield the router and the experts. Columns of gate and up alternate: gate 0, up 0, gate 1, up 1, ..."""
    moe, D, G = config.moe, config.embed_dim, 2
    assert moe is not None
    E, F = moe.num_experts, moe.hidden_dim

    def experts(
        name: str, leaf: str, shape: tuple[int, ...], split: tuple[int, ...], order: tuple[int, ...]
    ) -> TensorEntry:
        return TensorEntry(
            f"{layer.theirs}mlp.{name}", shape, f"{layer.ours}mlp/{leaf}", (layer.repeat,), split=split, order=order
        )

    yield layer.linear("mlp.router.weight", "mlp/router", (E,), (D,))
    yield layer.vector("mlp.router.bias", "mlp/router_logit_bias", (E,))
    yield experts("experts.gate_up_proj", "up", (E, D, F * G), (E, D, F, G), (0, 1, 3, 2))
    yield experts("experts.gate_up_proj_bias", "up_bias", (E, F * G), (E, F, G), (0, 2, 1))
    yield experts("experts.down_proj", "down", (E, F, D), (E, F, D), (0, 1, 2))
    yield experts("experts.down_proj_bias", "down_bias", (E, D), (E, D), (0, 1))
