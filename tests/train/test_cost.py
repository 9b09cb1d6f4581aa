"""Parameters and FLOPs match counts by hand, and visible keys match the masks."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.attend import keys_seen
from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig, PositionConfig
from model.cost import count_parameters, forward_flops_per_token, train_flops_per_token

MIXTRAL = ModelConfig(
    vocab_size=32000, num_layers=32, embed_dim=4096, max_length=32768,
    attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
    mlp=MLPConfig(kind="swiglu"), moe=MoEConfig(num_experts=8, top_k=2, hidden_dim=14336),
)  # fmt: skip


def test_mixtral_8x7b():
    """Jiang et al. 2024: 47 B parameters, 13 B active per token."""
    counts = count_parameters(MIXTRAL)
    assert (counts.total, counts.active) == (46_702_792_704, 12_879_925_248)
    assert counts.embedding == 2 * 32000 * 4096


def test_gpt2_small():
    """Radford et al. 2019: 124 M with tied embeddings, learned positions, biases and LayerNorm."""
    config = ModelConfig(
        vocab_size=50257, num_layers=12, embed_dim=768, max_length=1024, tied_embeddings=True,
        attention=AttentionConfig(num_heads=12, num_kv_heads=12, head_dim=64, bias="all"),
        position=PositionConfig(kind="learned"), norm=NormConfig(kind="layernorm", bias=True),
        mlp=MLPConfig(kind="gelu", hidden_dim=3072, bias=True),
    )  # fmt: skip
    counts = count_parameters(config)
    assert counts.total == counts.active == 124_439_808
    assert counts.embedding == (50257 + 1024) * 768


def test_parameters_of_a_dense_network_match_a_count_by_hand():
    D, N, K, H, F, V, L = 24, 6, 2, 4, 40, 100, 3
    config = ModelConfig(
        vocab_size=V, num_layers=L, embed_dim=D, mlp=MLPConfig(kind="relu", hidden_dim=F),
        attention=AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, qk_norm="head", sinks=True),
        norm=NormConfig(placement="sandwich"),
    )  # fmt: skip
    layer = 2 * D * N * H + 2 * D * K * H + 2 * D * F + 4 * D + 2 * H + N
    assert count_parameters(config).total == 2 * V * D + L * layer + D


@given(st.integers(1, 4), st.lists(st.sampled_from(["dense", "moe"]), min_size=1, max_size=3), st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_experts_that_are_not_chosen_are_not_active(top_k, kinds, layers):
    moe = MoEConfig(num_experts=4, top_k=top_k, hidden_dim=20, layers=tuple(kinds))
    config = ModelConfig(vocab_size=50, num_layers=layers, embed_dim=16, mlp=MLPConfig(hidden_dim=12), moe=moe)
    counts = count_parameters(config)
    moe_layers = sum(kinds[i % len(kinds)] == "moe" for i in range(layers))
    assert counts.total - counts.active == moe_layers * (4 - top_k) * 3 * 16 * 20
    # With one expert of the MLP's size and without the router, the network is the dense one.
    dense = count_parameters(dataclasses.replace(config, moe=None))
    assert counts.active - dense.total == moe_layers * (top_k * 3 * 16 * 20 + 16 * 4 - 3 * 16 * 12)


def test_flops_are_six_per_parameter_plus_attention():
    """Kaplan et al. 2020, sec. 2.1, with half of the attention: 6 N for the matrices, and 3 * 2 * 2 * T / 2 * width for
    each layer."""
    config = ModelConfig(
        vocab_size=512, num_layers=3, embed_dim=64, mlp=MLPConfig(hidden_dim=96),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    )  # fmt: skip
    counts = count_parameters(config)
    matrices = counts.total - counts.embedding - (2 * 3 + 1) * 64 + 512 * 64  # no norms; the head, but no embedding
    T = 128
    assert train_flops_per_token(config, T) == 6 * matrices + 3 * 3 * 4 * (T / 2) * (4 * 16)
    tied = dataclasses.replace(config, tied_embeddings=True)
    assert train_flops_per_token(tied, T) == train_flops_per_token(config, T)


def test_only_chosen_experts_count_as_flops():
    moe = dataclasses.replace(MIXTRAL, num_layers=2)
    dense = dataclasses.replace(moe, moe=None, mlp=MLPConfig(kind="swiglu", hidden_dim=2 * 14336))
    router = 2 * 2 * 4096 * 8
    assert forward_flops_per_token(moe, 512) == forward_flops_per_token(dense, 512) + router


def visible_by_brute_force(config: ModelConfig, layer: str, length: int) -> float:
    """Return the mean number of visible keys per query. In a causal mask, a query's own key counts half."""
    a, total = config.attention, 0.0
    for q in range(length):
        for k in range(length):
            seen = a.mask == "bidirectional" or k <= q
            if layer == "sliding":
                seen &= abs(q - k) < a.window
            if layer == "block_sparse":
                size, local, stride = a.blocks
                seen &= abs(q // size - k // size) < local or k // size % stride == stride - 1
            total += seen * (0.5 if q == k and a.mask != "bidirectional" else 1.0)
    return total / length


@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(
        [
            ("causal", "global"),
            ("bidirectional", "global"),
            ("bidirectional", "sliding"),
            ("causal", "sliding"),
            ("causal", "block_sparse"),
            ("bidirectional", "block_sparse"),
        ]
    ),
)
@settings(max_examples=200, deadline=None)
def test_visible_keys_match_the_mask(length, window, block, local, stride, kind):
    mask, layer = kind
    if layer == "block_sparse":
        length = block * -(-length // block)  # whole blocks
    attention = AttentionConfig(mask=mask, window=window, blocks=(block, local, stride))
    config = ModelConfig(attention=attention)
    # The formulas are areas under the mask's edge, so the steps of the edge cause an error of less than one key.
    assert abs(keys_seen(config, layer, length) - visible_by_brute_force(config, layer, length)) < 0.5 + 1e-9


@pytest.mark.parametrize("length", [1, 2, 77])
def test_a_causal_mask_counts_half_of_the_keys(length):
    assert (
        keys_seen(ModelConfig(), "global", length)
        == length / 2
        == visible_by_brute_force(ModelConfig(), "global", length)
    )
