"""OLMo 2 (OLMo team 2024): norms after attention and MLP instead of before, and query and key norms over all heads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, base_config, base_json
from interop.tensor_map import TensorEntry
from interop.translate import Keys
from model.config import ModelConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("Olmo2ForCausalLM",)
NORMS = {"post_attention_layernorm": "attention_post_norm", "post_feedforward_layernorm": "mlp_post_norm"}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    config = base_config(keys, epsilon=1e-5)
    return replace(
        config, attention=replace(config.attention, qk_norm="full"), norm=replace(config.norm, placement="post")
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    return base_json(config) | {"architectures": list(ARCHITECTURES), "model_type": "olmo2"}


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS)
