"""A lower bound on the parameters of a network, from its config alone.

The count needs no tracing and no list of layers, so it is immediate for a config of any size.
"""

from __future__ import annotations

from model.config import ModelConfig

PLAIN = ("gelu", "relu", "relu2")  # kinds of MLP without a gate; model.mlp would import flax


def least_parameters(config: ModelConfig) -> dict[str, tuple[int, str]]:
    """Return {part: (parameters, the fields that set their number)}. Only matrices count: norms, biases, routers and
    users' attention variants are left out."""
    a, D, L = config.attention, config.embed_dim, config.num_layers
    kinds = ("dense",) if config.moe is None else config.moe.layers
    matrices = 2 if config.mlp.kind in PLAIN else 3  # per MLP
    parts = {
        "embeddings": (
            config.vocab_size * D * (1 if config.tied_embeddings else 2)
            + (config.max_length * D if config.position.kind == "learned" else 0),
            "model.vocab_size, model.embed_dim" + (", model.max_length" if config.position.kind == "learned" else ""),
        ),
        "attention": (
            sum(_repeats(L, a.layers, kind) for kind in {*a.layers} if ":" not in kind) * _attention(config),
            "model.num_layers, model.embed_dim, model.attention.num_heads, model.attention.head_dim",
        ),
        "MLPs": (
            _repeats(L, kinds, "dense") * D * config.mlp.hidden_dim * matrices,
            "model.num_layers, model.embed_dim, model.mlp.hidden_dim",
        ),
    }
    if (moe := config.moe) is not None:
        experts = moe.num_experts + moe.shared_experts
        parts["experts"] = (
            _repeats(L, kinds, "moe") * experts * D * moe.hidden_dim * matrices,
            "model.num_layers, model.embed_dim, model.moe.num_experts, model.moe.hidden_dim",
        )
    return parts


def _repeats(layers: int, pattern: tuple[str, ...], kind: str) -> int:
    """Return the number of layers of this kind among `layers` layers that repeat `pattern`."""
    repetitions, rest = divmod(layers, len(pattern))
    return repetitions * pattern.count(kind) + pattern[:rest].count(kind)


def _attention(config: ModelConfig) -> int:
    """Return the number of parameters in the matrices of one attention layer; for latent attention, without those of
    the queries."""
    a, D = config.attention, config.embed_dim
    if (latent := a.latent) is None:
        return D * a.head_dim * (2 * a.num_heads + 2 * a.num_kv_heads)
    N, R, P, V = a.num_heads, latent.kv_rank, latent.rope_dim, latent.value_dim
    return D * (R + P) + R * N * (a.head_dim - P + V) + N * V * D
