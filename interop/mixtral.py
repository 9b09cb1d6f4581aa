"""Mixtral (Jiang et al. 2024): Mistral with a few large experts in every layer. w1 is the gate, w3 up, w2 down.

Also provides MoEConfig and the tensor map of experts for later families.
Letters: D width, E experts, F hidden width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from interop.decoder import decoder
from interop.llama import IGNORED, NORMS, base_config, base_json
from interop.tensor_map import ALL, Layer, TensorEntry
from interop.translate import Keys, UnsupportedModelError, layer_types, pattern
from model.config import ModelConfig, layer_specs
from model.moe_config import MoEConfig

__all__ = ["ARCHITECTURES", "IGNORED", "tensor_map", "to_config", "to_json"]

ARCHITECTURES = ("MixtralForCausalLM",)
DEFAULTS = {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "sliding_window": None,
    "router_aux_loss_coef": 0.001,
}


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    config = base_config(keys, theta=1e6, epsilon=1e-5, bias=False)
    window = keys.take("sliding_window", None)
    if window is not None:
        config = replace(
            config, attention=replace(config.attention, layers=("sliding",), window=keys.count("sliding_window"))
        )
    hidden = config.mlp.hidden_dim
    return replace(
        config, moe=moe_config(keys, ["moe"] * config.num_layers, keys.count("num_local_experts", 8), 2, hidden)
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    moe = needed(config)
    values = base_json(config) | {"architectures": list(ARCHITECTURES), "model_type": "mixtral"}
    values |= {"num_local_experts": moe.num_experts, "intermediate_size": moe.hidden_dim} | moe_json(config)
    values["sliding_window"] = config.attention.window if layer_types(config)[0] == "sliding_attention" else None
    del values["attention_bias"]
    return values


def moe_config(
    keys: Keys, kinds: list[str], experts: int, top_k: int, hidden_dim: int, weights: str = "renormalized"
) -> MoEConfig | None:
    """Return MoEConfig for layers of these `kinds` ('dense', 'moe'), or None if all are dense.

    `top_k`: default of `num_experts_per_tok`. The load-balancing coefficient is converted: transformers averages the
    loss over the layers and its value at perfect balance is top_k, while this code sums the layers' losses.
    """
    keys.must("mlp_bias", False, default=False)
    chosen, coefficient = keys.count("num_experts_per_tok", top_k), keys.take("router_aux_loss_coef", 0.0)
    if "moe" not in kinds:
        return None
    if chosen > experts:
        raise UnsupportedModelError(
            f"{keys.where}: num_experts_per_tok = {chosen}: there are only {experts} experts. Use the published "
            "config.json"
        )
    if chosen == 1 < experts and weights != "softmax":
        raise UnsupportedModelError(
            f"{keys.where}: num_experts_per_tok = 1: the expert's renormalized weight would always be 1. Supported: 2 "
            f"or more"
        )
    return MoEConfig(
        num_experts=experts,
        top_k=chosen,
        hidden_dim=hidden_dim,
        layers=pattern(kinds),  # type: ignore[arg-type]
        weights=weights,  # type: ignore[arg-type]
        load_balance=coefficient * chosen / kinds.count("moe"),
        z_loss=0.0,
    )


def one_of(keys: Keys, names: tuple[str, ...], default: int) -> int:
    """Return a count that has several names in transformers. Raises UnsupportedModelError if their values differ."""
    found = {name: keys.count(name) for name in names if name in keys}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name} = {value}" for name, value in found.items())
        raise UnsupportedModelError(f"{keys.where}: {said}: different values of one number. Remove the wrong one")
    return next(iter(found.values()), default)


def needed(config: ModelConfig) -> MoEConfig:
    """Return `config.moe`. Raises UnsupportedModelError if it is None."""
    if config.moe is None:
        raise UnsupportedModelError("model.moe = none: the family requires experts")
    return config.moe


def moe_json(config: ModelConfig) -> dict[str, Any]:
    """Return the keys that `moe_config` reads."""
    moe = needed(config)
    layers = sum(spec.moe for spec in layer_specs(config))
    return {"num_experts_per_tok": moe.top_k, "router_aux_loss_coef": moe.load_balance * layers / moe.top_k}


def normalized_json(config: ModelConfig) -> dict[str, Any]:
    """Return the key `norm_topk_prob`."""
    return {"norm_topk_prob": needed(config).weights == "renormalized"}


def expert_pieces(
    config: ModelConfig,
    layer: Layer,
    theirs: str = "mlp.",
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterable[TensorEntry]:
    """Yield the router and each expert's gate, up and down projections."""
    moe, D = config.moe, config.embed_dim
    assert moe is not None
    E, F = moe.num_experts, moe.hidden_dim
    yield layer.linear(f"{theirs}gate.weight", "mlp/router", (E,), (D,))
    for e in range(E):
        for g, name in enumerate(names[:2]):
            yield layer.linear(f"{theirs}experts.{e}.{name}.weight", "mlp/up", (F,), (D,), at=(e, ALL, g))
        yield layer.linear(f"{theirs}experts.{e}.{names[2]}.weight", "mlp/down", (D,), (F,), at=(e,))


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS, experts=_experts)


def _experts(config: ModelConfig, layer: Layer) -> Iterable[TensorEntry]:
    return expert_pieces(config, layer, "block_sparse_moe.", ("w1", "w3", "w2"))
