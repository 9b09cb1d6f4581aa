"""GPT-2 (Radford et al. 2019): LayerNorm, learned positions, an ungated MLP, biases everywhere, tied embeddings.

Matrices are stored [in, out], and queries, keys and values share one. Letters: D width, N heads, H head dimension, F
hidden width, V vocabulary, T positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from interop.tensor_map import ALL, Index, Layer, TensorEntry, layers
from interop.translate import Keys, UnsupportedModelError
from model.config import AttentionConfig, MLPConfig, ModelConfig, NormConfig, PositionConfig

ARCHITECTURES = ("GPT2LMHeadModel",)
IGNORED = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)  # the mask
PREFIX = "transformer."


def to_config(keys: Keys) -> ModelConfig:
    """Return the ModelConfig that config.json describes. Raises UnsupportedModelError."""
    keys.must("activation_function", "gelu_new", "gelu_pytorch_tanh", default="gelu_new")
    keys.must("scale_attn_weights", True, default=True)
    keys.must("scale_attn_by_inverse_layer_idx", False, default=False)
    keys.must("reorder_and_upcast_attn", False, True, default=False)  # softmax is always in float32 here
    for key in keys.values:
        if key.startswith("summary_") or key in ("n_ctx", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
            keys.take(key, None)  # for other heads, older versions and training
    width, num_heads = keys.count("n_embd"), keys.count("n_head")
    if width % num_heads:
        raise UnsupportedModelError(f"{keys.where}: n_embd = {width} is not a multiple of n_head = {num_heads}")
    return ModelConfig(
        vocab_size=keys.count("vocab_size"),
        num_layers=keys.count("n_layer"),
        embed_dim=width,
        max_length=keys.count("n_positions", 1024),
        attention=AttentionConfig(num_heads=num_heads, num_kv_heads=num_heads, head_dim=width // num_heads, bias="all"),
        position=PositionConfig(kind="learned"),
        norm=NormConfig("layernorm", epsilon=keys.take("layer_norm_epsilon", 1e-5), bias=True),
        mlp=MLPConfig("gelu", keys.count("n_inner", 4 * width), bias=True),
        tied_embeddings=keys.take("tie_word_embeddings", True),
    )


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Return config.json for `config`; `families.to_json` reads it back to check that no field is lost."""
    return {
        "architectures": list(ARCHITECTURES),
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_embd": config.embed_dim,
        "n_positions": config.max_length,
        "n_head": config.attention.num_heads,
        "n_inner": config.mlp.hidden_dim,
        "layer_norm_epsilon": config.norm.epsilon,
        "tie_word_embeddings": config.tied_embeddings,
    }


def tensor_map(config: ModelConfig) -> list[TensorEntry]:
    """Return the map from tensors on disk to weights."""
    V, D, T = config.vocab_size, config.embed_dim, config.max_length
    found = [
        TensorEntry(f"{PREFIX}wte.weight", (V, D), "embedding"),
        TensorEntry(f"{PREFIX}wpe.weight", (T, D), "positions"),
        TensorEntry(f"{PREFIX}ln_f.weight", (D,), "final_norm/scale"),
        TensorEntry(f"{PREFIX}ln_f.bias", (D,), "final_norm/bias"),
    ]
    if not config.tied_embeddings:
        found.append(TensorEntry("lm_head.weight", (V, D), "head", order=(1, 0)))
    for layer in layers(config, f"{PREFIX}h."):
        found += _layer(config, layer)
    return found


def _layer(config: ModelConfig, layer: Layer) -> Iterable[TensorEntry]:
    D, N, H, F = config.embed_dim, config.attention.num_heads, config.attention.head_dim, config.mlp.hidden_dim

    def matrix(
        name: str, leaf: str, split: tuple[int, ...], shape: tuple[int, int], at: Index = (), take: Index = ()
    ) -> TensorEntry:
        return TensorEntry(f"{layer.theirs}{name}.weight", shape, layer.ours + leaf, (layer.repeat, *at), split, take)

    for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        yield layer.vector(f"{theirs}.weight", f"{ours}/scale", (D,))
        yield layer.vector(f"{theirs}.bias", f"{ours}/bias", (D,))
    for i, ours in enumerate("qkv"):
        yield matrix("attn.c_attn", f"attention/{ours}", (D, 3, N, H), (D, 3 * D), take=(ALL, i))
        yield TensorEntry(
            f"{layer.theirs}attn.c_attn.bias",
            (3 * D,),
            f"{layer.ours}attention/{ours}_bias",
            (layer.repeat,),
            (3, N, H),
            (i,),
        )
    yield matrix("attn.c_proj", "attention/out", (N, H, D), (D, D))
    yield layer.vector("attn.c_proj.bias", "attention/out_bias", (D,))
    yield matrix("mlp.c_fc", "mlp/up", (D, F), (D, F), at=(ALL, 0))
    yield layer.vector("mlp.c_fc.bias", "mlp/up_bias", (F,), at=(0,))
    yield matrix("mlp.c_proj", "mlp/down", (F, D), (F, D))
    yield layer.vector("mlp.c_proj.bias", "mlp/down_bias", (D,))


def rename(names: Iterable[str]) -> dict[str, str]:
    """Return {name on disk: name in `tensor_map`} for tensors of the first releases, which lack the prefix."""
    return {name: PREFIX + name for name in names if name.split(".")[0] in ("wte", "wpe", "ln_f", "h")}
