"""Mistral (Jiang et al. 2023): Llama with a sliding window in every layer or in none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, NORMS, base_config, base_json
from interop.tensor_map import TensorEntry
from interop.translate import Keys, UnsupportedModelError, attention_layers, layer_types
from model.config import ModelConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("MistralForCausalLM",)
DEFAULTS = {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    config = base_config(keys, bias=False)
    window = keys.take("sliding_window", None)
    kind = "global" if window is None else "sliding"
    if attention_layers(keys, config.num_layers) not in (None, (kind,)):
        raise UnsupportedModelError(
            f"{keys.where}: layer_types does not match sliding_window = {window}, which applies to every layer of a "
            f"Mistral"
        )
    attention = replace(config.attention, layers=(kind,))  # type: ignore[arg-type]
    return replace(
        config, attention=attention if window is None else replace(attention, window=keys.count("sliding_window"))
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    values = base_json(config) | {"architectures": list(ARCHITECTURES), "model_type": "mistral"}
    values["sliding_window"] = config.attention.window if layer_types(config)[0] == "sliding_attention" else None
    del values["attention_bias"]
    return values


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS)
