"""Gemma 2 (Gemma team 2024): sandwich norms that scale by 1 + w, soft caps, scaled embeddings, and a sliding window in
every other layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, base_config, base_json
from interop.tensor_map import TensorEntry
from interop.translate import Keys, UnsupportedModelError, gated_json, sliding_json, windowed
from model.config import ModelConfig, PositionConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("Gemma2ForCausalLM",)
NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}
# Gemma's config.json files leave out many values that equal the class's defaults, including sizes.
DEFAULTS = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256.0,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    config = gemma_config(keys, period=2)
    cap = keys.number("attn_logit_softcapping", None)
    return replace(config, attention=replace(config.attention, softcap=cap))


def gemma_config(keys: Keys, period: int, position: PositionConfig | None = None) -> ModelConfig:
    """Return the ModelConfig from the keys that Gemma 2 and 3 share. `period`: without `layer_types`, every `period`th
    layer is global and the others slide."""
    config = base_config(keys, activation="hidden_activation", position=position)
    keys.take("hidden_act", None)  # in older files; transformers uses hidden_activation
    scalar = keys.number("query_pre_attn_scalar")
    if scalar <= 0:
        raise UnsupportedModelError(f"{keys.where}: query_pre_attn_scalar = {scalar}: must be above 0")
    layers = ("sliding",) * (period - 1) + ("global",)
    attention = replace(config.attention, query_scale=scalar**-0.5, **windowed(keys, config.num_layers, layers))
    return replace(
        config, attention=attention, norm=replace(config.norm, unit_offset=True, placement="sandwich"),
        embedding_scale=math.sqrt(config.embed_dim), final_softcap=keys.number("final_logit_softcapping", None),
    )  # fmt: skip


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    return gemma_json(config) | {
        "architectures": list(ARCHITECTURES),
        "model_type": "gemma2",
        "attn_logit_softcapping": config.attention.softcap,
    }


def gemma_json(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `gemma_config` reads."""
    a = config.attention
    if config.embed_dim % a.num_heads:
        raise UnsupportedModelError(
            f"model.embed_dim = {config.embed_dim}: transformers' Gemma requires a multiple of num_heads = "
            f"{a.num_heads}"
        )
    scalar = a.head_dim if a.query_scale is None else round(a.query_scale**-2)  # transformers requires an integer
    values = (
        base_json(config)
        | sliding_json(config)
        | {
            "hidden_activation": gated_json(config),
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": config.final_softcap,
        }
    )
    del values["hidden_act"]
    return values


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS)
