"""Dense Qwen3 (Yang et al. 2025): Llama with per-head query and key norms, and sliding windows in some layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, NORMS, base_config, base_json
from interop.qwen2 import DEFAULTS as QWEN2
from interop.qwen2 import qwen_windows, qwen_windows_json
from interop.tensor_map import TensorEntry
from interop.translate import Keys
from model.config import ModelConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("Qwen3ForCausalLM",)
DEFAULTS = QWEN2 | {"head_dim": 128}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    config = base_config(keys)
    return replace(config, attention=replace(config.attention, qk_norm="head", **qwen_windows(keys, config.num_layers)))


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    return base_json(config) | {"architectures": list(ARCHITECTURES), "model_type": "qwen3"} | qwen_windows_json(config)


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS)
