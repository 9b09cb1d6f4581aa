"""Qwen3 with many small experts (Yang et al. 2025) in some or all layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, NORMS, base_config, base_json
from interop.mixtral import expert_pieces, moe_config, moe_json, needed, normalized_json, one_of
from interop.tensor_map import TensorEntry
from interop.translate import Keys, UnsupportedModelError, layer_types
from model.config import ModelConfig, layer_specs

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
DEFAULTS = {
    "max_position_embeddings": 32_768, "num_key_value_heads": 4, "sliding_window": 4096, "router_aux_loss_coef": 0.001,
    "mlp_only_layers": [], "intermediate_size": 6144,
}  # fmt: skip


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    config = base_config(keys)
    attention = replace(config.attention, qk_norm="head")
    window = keys.take("sliding_window", None)
    keys.take("max_window_layers", None)  # unused: unlike Qwen2, either every layer has a window or none
    if keys.take("use_sliding_window", False) and window is not None:
        attention = replace(attention, layers=("sliding",), window=keys.count("sliding_window"))
    dense, step = keys.take("mlp_only_layers", []), keys.count("decoder_sparse_step", 1)
    layers = range(config.num_layers)
    if any(type(i) is not int or i not in layers for i in dense):
        raise UnsupportedModelError(
            f"{keys.where}: mlp_only_layers = {str(dense)[:60]}: must be layer numbers of at "
            f"least 0 and below {config.num_layers}"
        )
    kinds = ["moe" if i not in dense and (i + 1) % step == 0 else "dense" for i in layers]
    weights = "renormalized" if keys.take("norm_topk_prob", False) else "softmax"
    experts = one_of(keys, ("num_experts", "num_local_experts"), 128)  # older and newer transformers
    moe = moe_config(keys, kinds, experts, 8, keys.count("moe_intermediate_size", 768), weights)
    return replace(config, attention=attention, moe=moe)


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    moe, slides = needed(config), layer_types(config)[0] == "sliding_attention"
    return base_json(config) | {
        "architectures": list(ARCHITECTURES),
        "model_type": "qwen3_moe",
        "use_sliding_window": slides,
        "sliding_window": config.attention.window if slides else None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, spec in enumerate(layer_specs(config)) if not spec.moe],
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.hidden_dim,
    } | moe_json(config) | normalized_json(config)  # fmt: skip


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS, experts=expert_pieces)
