"""Llama 2 and 3 (Touvron et al. 2023; Dubey et al. 2024)."""

from __future__ import annotations

from typing import Any

from interop.decoder import decoder
from interop.tensor_map import TensorEntry
from interop.translate import Keys, UnsupportedModelError, gated, gated_json, rope, rope_json
from model.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, PositionConfig

ARCHITECTURES = ("LlamaForCausalLM",)
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # in old checkpoints; computed here
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    return base_config(keys)


def base_config(
    keys: Keys,
    *,
    theta: float = 10_000.0,
    epsilon: float = 1e-6,
    bias: bool | None = None,
    activation: str = "hidden_act",
    position: PositionConfig | None = None,
) -> ModelConfig:
    """Return the ModelConfig from the keys that Llama and its descendants share.

    `theta`, `epsilon`: defaults of the family's class in transformers. `bias`: whether attention has biases; None: read
    `attention_bias`. `activation`: key of the activation. `position`: positions, if the family reads them differently.
    """
    num_heads, width = keys.count("num_attention_heads"), keys.count("hidden_size")
    if position is None:
        theta, scaling = rope(keys, theta)
        position = PositionConfig(theta=theta, scaling=scaling)
    biased = keys.take("attention_bias", False) if bias is None else bias
    return ModelConfig(
        vocab_size=keys.count("vocab_size"),
        num_layers=keys.count("num_hidden_layers"),
        embed_dim=width,
        max_length=keys.count("max_position_embeddings", 2048),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=keys.count("num_key_value_heads", num_heads),
            head_dim=keys.count("head_dim", max(1, width // num_heads)),
            bias="all" if biased else "none",
        ),
        position=position,
        norm=NormConfig(epsilon=keys.take("rms_norm_eps", epsilon)),
        mlp=MLPConfig(gated(keys, activation), keys.count("intermediate_size"), bias=keys.take("mlp_bias", False)),
        tied_embeddings=keys.take("tie_word_embeddings", False),
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    if config.embed_dim % config.attention.num_heads:
        raise UnsupportedModelError(
            f"model.embed_dim = {config.embed_dim}: transformers' Llama requires a multiple of num_heads = "
            f"{config.attention.num_heads}"
        )
    return base_json(config) | {
        "architectures": list(ARCHITECTURES),
        "model_type": "llama",
        "mlp_bias": config.mlp.bias,
    }


def base_json(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `base_config` reads."""
    a = config.attention
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "attention_bias": a.bias == "all",
        "rms_norm_eps": config.norm.epsilon,
        "intermediate_size": config.mlp.hidden_dim,
        "hidden_act": gated_json(config),
        "tie_word_embeddings": config.tied_embeddings,
    } | rope_json(config)


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS)
