"""Tensor map that Llama and its descendants share.

Letters: V vocabulary, D width, N query heads, K key/value heads, H head dimension, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from interop.tensor_map import ALL, Layer, TensorEntry, layers
from model.config import ModelConfig, layer_specs
from model.mlp import gates

TensorMap = Iterable[TensorEntry]


def decoder(
    config: ModelConfig,
    *,
    norms: dict[str, str],
    attention: Callable[[ModelConfig, Layer], TensorMap] | None = None,
    experts: Callable[[ModelConfig, Layer], TensorMap] | None = None,
    prefix: str = "model.",
) -> list[TensorEntry]:
    """Return every entry of a decoder.

    `norms`: the Block's norms, as {name on disk: attribute}. `attention`: default `llama_attention`. `experts`: needed
    if a layer has experts.
    """
    V, D = config.vocab_size, config.embed_dim
    found = [
        TensorEntry(f"{prefix}embed_tokens.weight", (V, D), "embedding"),
        TensorEntry(f"{prefix}norm.weight", (D,), "final_norm/scale"),
    ]
    if not config.tied_embeddings:
        found.append(TensorEntry("lm_head.weight", (V, D), "head", order=(1, 0)))
    for layer, spec in zip(layers(config, f"{prefix}layers."), layer_specs(config), strict=True):
        found += [layer.vector(f"{theirs}.weight", f"{ours}/scale", (D,)) for theirs, ours in norms.items()]
        found += (attention or llama_attention)(config, layer)
        found += mlp(config, layer) if not spec.moe else _experts(experts, config, layer)
    return found


def _experts(experts: Callable[[ModelConfig, Layer], TensorMap] | None, config: ModelConfig, layer: Layer) -> TensorMap:
    assert experts is not None, "a family with experts must pass a function that maps them"
    return experts(config, layer)


def llama_attention(config: ModelConfig, layer: Layer) -> TensorMap:
    """Yield q, k, v and o, their biases, query and key norms, and attention sinks."""
    a, D = config.attention, config.embed_dim
    N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
    for name, heads in (("q", N), ("k", K), ("v", K)):
        yield layer.linear(f"self_attn.{name}_proj.weight", f"attention/{name}", (heads, H), (D,))
        if a.bias != "none":
            yield layer.vector(f"self_attn.{name}_proj.bias", f"attention/{name}_bias", (heads, H))
        if a.qk_norm != "none" and name != "v":
            shape = (H,) if a.qk_norm == "head" else (heads, H)
            yield layer.vector(f"self_attn.{name}_norm.weight", f"attention/{name}_norm/scale", shape)
    yield layer.linear("self_attn.o_proj.weight", "attention/out", (D,), (N, H))
    if a.bias == "all":
        yield layer.vector("self_attn.o_proj.bias", "attention/out_bias", (D,))
    if a.sinks:
        yield layer.vector("self_attn.sinks", "attention/sinks", (N,))


def mlp(
    config: ModelConfig, layer: Layer, *, theirs: str = "mlp.", ours: str = "mlp/", hidden: int | None = None,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> TensorMap:  # fmt: skip
    """Yield the gate, up and down projections and biases of an MLP of width `hidden` (default: mlp.hidden_dim)."""
    D, F, bias = config.embed_dim, hidden or config.mlp.hidden_dim, config.mlp.bias
    *first, down = names
    for g, name in enumerate(first[-gates(config.mlp.kind) :]):
        yield layer.linear(f"{theirs}{name}.weight", f"{ours}up", (F,), (D,), at=(ALL, g))
        if bias:
            yield layer.vector(f"{theirs}{name}.bias", f"{ours}up_bias", (F,), at=(g,))
    yield layer.linear(f"{theirs}{down}.weight", f"{ours}down", (D,), (F,))
    if bias:
        yield layer.vector(f"{theirs}{down}.bias", f"{ours}down_bias", (D,))
