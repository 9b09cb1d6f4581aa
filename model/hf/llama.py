"""Llama 2 and 3 (Touvron et al. 2023; Dubey et al. 2024)."""

from __future__ import annotations

from typing import Any

from model.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, PositionConfig
from model.hf.decoder import decoder
from model.hf.pieces import Piece
from model.hf.translate import Keys, rope, rope_json

ARCHITECTURES = ("LlamaForCausalLM",)
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # of old checkpoints; computed
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}


def to_config(keys: Keys) -> ModelConfig:
    """ModelConfig of config.json. Raises UnsupportedModelError."""
    return base_config(keys)


def base_config(keys: Keys, *, theta: float = 10_000.0, epsilon: float = 1e-6, bias: bool | None = None) -> ModelConfig:
    """What Llama and its descendants say alike; theirs differ in the defaults of transformers' config classes."""
    num_heads, width = keys.take("num_attention_heads"), keys.take("hidden_size")
    keys.must("hidden_act", "silu", default="silu")
    theta, scaling = rope(keys, theta)
    biased = keys.take("attention_bias", False) if bias is None else bias
    return ModelConfig(
        vocab_size=keys.take("vocab_size"),
        num_layers=keys.take("num_hidden_layers"),
        embed_dim=width,
        max_length=keys.take("max_position_embeddings", 2048),
        attention=AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=keys.take("num_key_value_heads", num_heads),
            head_dim=keys.take("head_dim", width // num_heads),
            bias="all" if biased else "none",
        ),
        position=PositionConfig(theta=theta, scaling=scaling),
        norm=NormConfig(epsilon=keys.take("rms_norm_eps", epsilon)),
        mlp=MLPConfig("swiglu", keys.take("intermediate_size"), bias=keys.take("mlp_bias", False)),
        tied_embeddings=keys.take("tie_word_embeddings", False),
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """config.json of a config; whether it says all of it, `families.py` finds out by reading it back."""
    return base_json(config) | {"architectures": list(ARCHITECTURES), "model_type": "llama", "mlp_bias": config.mlp.bias}


def base_json(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `base_config`."""
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
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_embeddings,
    } | rope_json(config)


def pieces(config: ModelConfig) -> list[Piece]:
    """The tensors on disk and the weights they are."""
    return decoder(config, norms=NORMS)
