"""DeepSeek-V3 and R1 (DeepSeek-AI 2024), Kimi K2, Moonlight: latent attention, and experts chosen within groups by
biased sigmoids.

The extra layers for multi-token prediction (`num_nextn_predict_layers`) are not loaded.

Letters: D width, N heads, H head dimension, P its rotated part, V value dimension, R rank of keys and values, E
experts, F hidden width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from interop.decoder import decoder, mlp
from interop.tensor_map import ALL, Layer, TensorEntry
from interop.translate import (
    Keys,
    UnsupportedModelError,
    gated,
    gated_json,
    pattern,
    rope,
    rope_json,
    yarn_mscale,
)
from model.config import AttentionConfig, LatentConfig, MLPConfig, ModelConfig, NormConfig, PositionConfig, layer_specs
from model.moe_config import MoEConfig

ARCHITECTURES = ("DeepseekV3ForCausalLM",)
IGNORED = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)  # in old checkpoints; computed here
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
# Defaults of DeepseekV3Config in transformers.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_interleave": True,
    "attention_bias": False,
}
# Unused keys: for training, for layers that are not loaded, or computed from other keys.
UNUSED_KEYS = (
    "aux_loss_alpha",
    "ep_size",
    "head_dim",
    "num_mtp_layers",
    "num_nextn_predict_layers",
    "qk_head_dim",
    "router_aux_loss_coef",
    "seq_aux",
)


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.assume(DEFAULTS)
    for name in UNUSED_KEYS:
        keys.take(name, None)
    heads, rope_dim = keys.take("num_attention_heads"), keys.take("qk_rope_head_dim")
    keys.must("num_key_value_heads", heads, default=heads)
    head_dim = keys.take("qk_nope_head_dim") + rope_dim
    theta, scaling = rope(keys)
    mscale = _attention_mscale(keys)
    return ModelConfig(
        vocab_size=keys.take("vocab_size"),
        num_layers=keys.take("num_hidden_layers"),
        embed_dim=keys.take("hidden_size"),
        max_length=keys.take("max_position_embeddings"),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            latent=LatentConfig(_q_rank(keys), keys.take("kv_lora_rank"), rope_dim, keys.take("v_head_dim")),
            bias="all" if keys.take("attention_bias") else "none",
            query_scale=None if mscale == 1 else head_dim**-0.5 * mscale**2,
        ),
        position=PositionConfig(theta=theta, scaling=scaling, interleaved=keys.take("rope_interleave")),
        norm=NormConfig(epsilon=keys.take("rms_norm_eps")),
        mlp=MLPConfig(gated(keys), keys.take("intermediate_size")),
        moe=_moe(keys),
        tied_embeddings=keys.take("tie_word_embeddings"),
    )


def _q_rank(keys: Keys) -> int | None:
    """Return `q_lora_rank`; an explicit null means that queries are projected directly from the residual stream."""
    return None if "q_lora_rank" in keys.values and keys.values["q_lora_rank"] is None else keys.take("q_lora_rank")


def _attention_mscale(keys: Keys) -> float:
    """Return YaRN's factor on all dimensions of queries and keys, which `mscale_all_dim` sets."""
    scaling = keys.inside("rope_scaling") or keys.inside("rope_parameters")
    if scaling is None or scaling.take("rope_type", scaling.take("type", "default")) == "default":
        return 1.0
    all_dim = scaling.take("mscale_all_dim", 0.0)
    return yarn_mscale(scaling.take("factor", 1.0), all_dim) if all_dim else 1.0


def _moe(keys: Keys) -> MoEConfig | None:
    layers, dense = keys.take("num_hidden_layers"), keys.take("first_k_dense_replace")
    keys.must("moe_layer_freq", 1, default=1)
    keys.must("scoring_func", "sigmoid", default="sigmoid")
    keys.must("topk_method", "noaux_tc", default="noaux_tc")
    moe = MoEConfig(
        num_experts=keys.take("n_routed_experts"),
        top_k=keys.take("num_experts_per_tok"),
        hidden_dim=keys.take("moe_intermediate_size"),
        shared_experts=keys.take("n_shared_experts"),
        layers=pattern(["dense" if i < dense else "moe" for i in range(layers)]),  # type: ignore[arg-type]
        weights="sigmoid_renormalized" if keys.take("norm_topk_prob") else "sigmoid",
        scale=keys.take("routed_scaling_factor"),
        groups=(keys.take("n_group"), keys.take("topk_group")),
        bias_rate=0.0,
        load_balance=0.0,
        z_loss=0.0,
    )
    return moe if dense < layers else None


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    a, latent = config.attention, config.attention.latent
    if latent is None:
        raise UnsupportedModelError("model.attention.latent = none: DeepSeek-V3 requires latent attention")
    kinds = ["moe" if spec.moe else "dense" for spec in layer_specs(config)]
    dense = kinds.index("moe") if "moe" in kinds else len(kinds)
    if "dense" in kinds[dense:]:
        raise UnsupportedModelError(f"model.moe.layers = {kinds}: DeepSeek-V3 requires dense layers to come first")
    return {
        "architectures": list(ARCHITECTURES),
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": 0,
        "hidden_size": config.embed_dim,
        "max_position_embeddings": config.max_length,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "q_lora_rank": latent.q_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": a.head_dim - latent.rope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "attention_bias": a.bias == "all",
        "rms_norm_eps": config.norm.epsilon,
        "intermediate_size": config.mlp.hidden_dim,
        "hidden_act": gated_json(config),
        "tie_word_embeddings": config.tied_embeddings,
        "rope_interleave": config.position.interleaved,
        "first_k_dense_replace": dense,
    } | _moe_json(config.moe) | _rope_json(config)  # fmt: skip


def _moe_json(moe: MoEConfig | None) -> dict[str, Any]:
    if moe is None:
        return {}
    if moe.bias_rate is None:
        raise UnsupportedModelError(
            "model.moe.bias_rate = none: DeepSeek-V3's routers have a selection bias. Set it to 0 to add one (of zeros)"
        )
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden_dim,
        "n_shared_experts": moe.shared_experts,
        "moe_layer_freq": 1,
        "norm_topk_prob": moe.weights == "sigmoid_renormalized",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "routed_scaling_factor": moe.scale,
        "n_group": moe.groups[0],
        "topk_group": moe.groups[1],
    }


def _rope_json(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of RoPE; `mscale_all_dim` expresses the ratio of the query scale to head_dim ** -0.5."""
    a, found = config.attention, rope_json(config)
    ratio = 1.0 if a.query_scale is None else a.query_scale * a.head_dim**0.5
    if math.isclose(ratio, 1.0):
        return found
    scaling = config.position.scaling
    if scaling is None or scaling.factor <= 1 or ratio < 1:
        raise UnsupportedModelError(
            f"model.attention.query_scale = {a.query_scale}: DeepSeek-V3 can only express a scale above "
            f"head_dim ** -0.5 together with scaled positions"
        )
    step = 0.1 * math.log(scaling.factor)
    more = {"mscale_all_dim": round((ratio**0.5 - 1) / step, 12)}
    if scaling.kind == "yarn":  # for readers that do not support attention_factor
        cosines = scaling.attention_factor or yarn_mscale(scaling.factor)
        more["mscale"] = round((cosines * ratio**0.5 - 1) / step, 12)
        found["rope_scaling"]["attention_factor"] = cosines
    found["rope_scaling"] |= more
    return found


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    return decoder(config, norms=NORMS, attention=_attention, experts=_experts)


def _attention(config: ModelConfig, layer: Layer) -> Iterable[TensorEntry]:
    a, D = config.attention, config.embed_dim
    assert a.latent is not None
    N, H, P, V, R = a.num_heads, a.head_dim, a.latent.rope_dim, a.latent.value_dim, a.latent.kv_rank
    if (Q := a.latent.q_rank) is None:
        yield layer.linear("self_attn.q_proj.weight", "attention/q", (N, H), (D,))
    else:
        yield layer.linear("self_attn.q_a_proj.weight", "attention/q_down", (Q,), (D,))
        yield layer.vector("self_attn.q_a_layernorm.weight", "attention/q_down_norm/scale", (Q,))
        yield layer.linear("self_attn.q_b_proj.weight", "attention/q", (N, H), (Q,))
    yield layer.linear("self_attn.kv_a_proj_with_mqa.weight", "attention/kv_down", (R + P,), (D,))
    yield layer.vector("self_attn.kv_a_layernorm.weight", "attention/kv_down_norm/scale", (R,))
    K = H - P
    for leaf, part in (("k_up", slice(0, K)), ("v_up", slice(K, K + V))):
        yield TensorEntry(
            f"{layer.theirs}self_attn.kv_b_proj.weight",
            (N * (K + V), R),
            f"{layer.ours}attention/{leaf}",
            (layer.repeat,),
            split=(N, K + V, R),
            take=(ALL, part),
            order=(2, 0, 1),
        )
    yield layer.linear("self_attn.o_proj.weight", "attention/out", (D,), (N, V))
    if a.bias != "none":
        if Q is not None:
            yield layer.vector("self_attn.q_a_proj.bias", "attention/q_down_bias", (Q,))
        yield layer.vector("self_attn.kv_a_proj_with_mqa.bias", "attention/kv_down_bias", (R + P,))
    if a.bias == "all":
        yield layer.vector("self_attn.o_proj.bias", "attention/out_bias", (D,))


def _experts(config: ModelConfig, layer: Layer) -> Iterable[TensorEntry]:
    moe, D = config.moe, config.embed_dim
    assert moe is not None
    E, F = moe.num_experts, moe.hidden_dim
    yield layer.linear("mlp.gate.weight", "mlp/router", (E,), (D,))
    yield layer.vector("mlp.gate.e_score_correction_bias", "mlp/router_bias", (E,))
    for e in range(E):
        for g, name in enumerate(("gate_proj", "up_proj")):
            yield layer.linear(f"mlp.experts.{e}.{name}.weight", "mlp/up", (F,), (D,), at=(e, ALL, g))
        yield layer.linear(f"mlp.experts.{e}.down_proj.weight", "mlp/down", (D,), (F,), at=(e,))
    if moe.shared_experts:
        yield from mlp(config, layer, theirs="mlp.shared_experts.", ours="mlp/shared/", hidden=moe.shared_experts * F)


def empty(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Return names and shapes of the tensors without elements that transformers expects.

    Without shared experts, it has a shared expert of width 0 and would report its tensors as missing.
    """
    if config.moe is None or config.moe.shared_experts:
        return {}
    D = config.embed_dim
    shapes = {"gate_proj": (0, D), "up_proj": (0, D), "down_proj": (D, 0)}
    return {
        f"model.layers.{i}.mlp.shared_experts.{name}.weight": shape
        for i, spec in enumerate(layer_specs(config))
        if spec.moe
        for name, shape in shapes.items()
    }


def ignored(config: ModelConfig, name: str) -> bool:
    """Return whether a tensor has no elements or belongs to an extra layer for multi-token prediction."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return name in empty(config) or (layer is not None and int(layer[1]) >= config.num_layers)
