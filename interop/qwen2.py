"""Qwen2 and Qwen2.5 (Yang et al. 2024): Llama with query, key and value biases, and sliding windows in some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, NORMS, base_config, base_json
from interop.tensor_map import TensorEntry
from interop.translate import Keys, sliding_json, windowed
from model.config import ModelConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("Qwen2ForCausalLM",)
DEFAULTS = {
    "max_position_embeddings": 32_768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    config = base_config(keys, bias=False)
    keys.must("use_mrope", False, default=False)  # image positions
    return replace(config, attention=replace(config.attention, bias="qkv", **qwen_windows(keys, config.num_layers)))


def qwen_windows(keys: Keys, num_layers: int) -> dict[str, Any]:
    """Return `layers` and `window` of AttentionConfig.

    They come from `layer_types`; without it, layers from `max_window_layers` have a window if `use_sliding_window`.
    """
    first = keys.take("max_window_layers", 28)
    if not keys.take("use_sliding_window", False):
        keys.take("sliding_window", None)
        keys = Keys({"layer_types": keys.take("layer_types", None)}, keys.where)  # refuses types with a window
        return windowed(keys, num_layers, ("global",))
    sliding = "sliding" if "sliding_window" in keys or "sliding_window" not in keys.values else "global"
    return windowed(keys, num_layers, tuple(sliding if i >= first else "global" for i in range(num_layers)))


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    values = (
        base_json(config) | {"architectures": list(ARCHITECTURES), "model_type": "qwen2"} | qwen_windows_json(config)
    )
    del values["attention_bias"]
    return values


def qwen_windows_json(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `qwen_windows` reads, including the older ones."""
    values = sliding_json(config)
    types = values["layer_types"]
    slides = "sliding_attention" in types
    first = types.index("sliding_attention") if slides else len(types)
    if not slides:
        values["sliding_window"] = None
    return values | {"use_sliding_window": slides, "max_window_layers": first}


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS)
