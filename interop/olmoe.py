"""OLMoE (Muennighoff et al. 2024): experts in every layer, query and key norms over all heads, optional clipping."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, NORMS, base_config, base_json
from interop.mixtral import expert_pieces, moe_config, moe_json, needed, normalized_json, one_of
from interop.tensor_map import TensorEntry
from interop.translate import Keys, UnsupportedModelError
from model.config import ModelConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("OlmoeForCausalLM",)
DEFAULTS = {"max_position_embeddings": 4096, "router_aux_loss_coef": 0.01, "clip_qkv": None}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    config = base_config(keys, epsilon=1e-5)
    clip = None if keys.take("clip_qkv", None) is None else keys.number("clip_qkv")
    if clip is not None and clip <= 0:
        raise UnsupportedModelError(f"{keys.where}: clip_qkv = {clip}: must be above 0, or null")
    weights = "renormalized" if keys.take("norm_topk_prob", False) else "softmax"
    experts = one_of(keys, ("num_experts", "num_local_experts"), 64)
    return replace(
        config,
        attention=replace(config.attention, qk_norm="full", clip_qkv=clip),
        moe=moe_config(keys, ["moe"] * config.num_layers, experts, 8, config.mlp.hidden_dim, weights),
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    moe, a = needed(config), config.attention
    if a.num_heads * a.head_dim != config.embed_dim:
        raise UnsupportedModelError(
            f"model.attention.head_dim = {a.head_dim}: transformers' OLMoE normalizes queries over model.embed_dim = "
            f"{config.embed_dim} numbers, but {a.num_heads} heads of {a.head_dim} have {a.num_heads * a.head_dim}. Try "
            f"a network whose model.attention.num_heads * head_dim is model.embed_dim"
        )
    return base_json(config) | {
        "architectures": list(ARCHITECTURES),
        "model_type": "olmoe",
        "clip_qkv": config.attention.clip_qkv,
        "num_experts": moe.num_experts,
        "intermediate_size": moe.hidden_dim,
    } | moe_json(config) | normalized_json(config)  # fmt: skip


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS, experts=expert_pieces)
