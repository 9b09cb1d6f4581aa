"""Text part of Gemma 3 (Gemma team 2025): Gemma 2 with query and key norms instead of soft caps, five sliding layers
for each global one, and a RoPE base for each of the two kinds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.gemma2 import DEFAULTS as GEMMA2
from interop.gemma2 import NORMS, gemma_config, gemma_json
from interop.llama import IGNORED as LLAMA
from interop.tensor_map import TensorEntry
from interop.translate import Keys, UnsupportedModelError, rope
from model.config import ModelConfig, PositionConfig

ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
IGNORED = (*LLAMA, r"(model\.)?(vision_tower|multi_modal_projector)\..*")
DEFAULTS = GEMMA2 | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
VISION = (
    "vision_config",
    "mm_tokens_per_image",
    "boi_token_index",
    "eoi_token_index",
    "image_token_index",
    "boi_token_id",
    "eoi_token_id",
    "image_token_id",
)


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes, from its text_config if the model takes images. Raises
    UnsupportedModelError."""
    defaults = DEFAULTS
    if (text := keys.inside("text_config")) is not None:
        for key in VISION:
            keys.take(key, None)
        defaults = DEFAULTS | {"tie_word_embeddings": keys.take("tie_word_embeddings", True)}
        keys = text
        keys.ordinary()
    keys.assume(defaults)
    keys.take("_sliding_window_pattern", None)  # already expanded into layer_types
    keys.must("attn_logit_softcapping", None)  # transformers has the key and does not apply it
    config = gemma_config(keys, keys.count("sliding_window_pattern", 6), _position(keys))
    return replace(config, attention=replace(config.attention, qk_norm="head"))


def _position(keys: Keys) -> PositionConfig:
    if not set(keys.take("rope_parameters", {})) <= {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(
            f"{keys.where}: rope_parameters must have the keys full_attention and sliding_attention only"
        )
    theta, scaling = rope(keys, layer_type="full_attention")
    local_theta, local_scaling = rope(keys, layer_type="sliding_attention", theta="rope_local_base_freq")
    if local_scaling is not None and (local_theta, local_scaling) != (theta, scaling):
        raise UnsupportedModelError(
            f"{keys.where}: rope_parameters.sliding_attention: only full_attention can have a separate scaling"
        )
    return PositionConfig(theta=theta, scaling=scaling, local_theta=None if local_scaling else local_theta)


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    return gemma_json(config) | {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
        "rope_local_base_freq": config.position.local_theta or config.position.theta,
    }  # fmt: skip


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS)


def rename(names: Iterable[str]) -> dict[str, str]:
    """Return {name on disk: name in `tensor_map`} for the text tensors of a model that takes images."""
    prefixes = (
        ("language_model.model.", "model."),
        ("model.language_model.", "model."),
        ("language_model.lm_head.", "lm_head."),
    )
    return {name: new + name.removeprefix(old) for name in names for old, new in prefixes if name.startswith(old)}
