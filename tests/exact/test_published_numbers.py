"""Parameters, FLOPs and sizes of caches and adapters equal the numbers of papers and releases. Nothing is allocated."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import jax
import pytest
from rich.console import Console

from experiments.pods import mixtral_8x7b
from experiments.show import print_experiment
from interop.families import family_of
from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig, PositionConfig
from model.cost import abstract_model, count_parameters, forward_flops_per_token, train_flops_per_token
from model.lora import add_lora
from model.transformer import Transformer, forward, init_cache, logits
from model.weights import named_weights, split
from sharding.rules import ShardingRules
from tests.interop.hf_configs import RELEASES

RULES = ShardingRules()


def heads(count: int, kv: int | None = None, dim: int = 128, **more) -> AttentionConfig:
    return AttentionConfig(num_heads=count, num_kv_heads=count if kv is None else kv, head_dim=dim, **more)


def released(name: str) -> ModelConfig:
    return family_of(RELEASES[name].values)[1]


LLAMA_2_7B = ModelConfig(
    vocab_size=32_000, num_layers=32, embed_dim=4096, max_length=4096, attention=heads(32),
    mlp=MLPConfig("swiglu", 11_008),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- parameters


def test_llama_2_7b_has_its_published_number_of_parameters():
    """The release: 6,738,415,616. GPT-2 and Mixtral are in tests/train/test_cost.py, and all families in
    tests/interop/test_hf_config.py."""
    counts = count_parameters(LLAMA_2_7B)
    assert counts.total == counts.active == 6_738_415_616
    assert counts.embedding == 2 * 32_000 * 4096


@pytest.mark.parametrize(
    "name, billions, input_embedding",
    [
        ("Mixtral-8x7B", 12.9, True),  # Jiang et al. 2024: 13 B, here with one more digit
        ("OLMoE-1B-7B", 1.3, True),  # OLMoE (Muennighoff et al. 2024): 1.3 B of 6.9 B
        ("gpt-oss-20b", 3.61, False),  # OpenAI 2025, model card, table 1; it counts the head, but not the embedding
    ],
)
def test_active_parameters_of_mixtures_of_experts_match_their_papers(name, billions, input_embedding):
    config = released(name)
    counts = count_parameters(config)
    assert counts.total == RELEASES[name].parameters
    active = counts.active - (0 if input_embedding else config.vocab_size * config.embed_dim)
    digits = len(str(billions).partition(".")[2])
    assert round(active / 1e9, digits) == billions


def test_show_prints_the_same_counts():
    out = io.StringIO()
    print_experiment(mixtral_8x7b(), 64, Console(file=out, width=200))
    assert "parameters: 46,702,792,704 total, 12,879,925,248 active per token" in out.getvalue()
    assert any(line.split()[:2] == ["total", "46,702,792,704"] for line in out.getvalue().splitlines())


def mlp_parameters(config: ModelConfig) -> int:
    weights = named_weights(abstract_model(config, RULES))
    return sum(math.prod(weight.shape) for _, weight in weights if weight.name.startswith("mlp."))


def test_a_gated_mlp_of_two_thirds_of_the_width_has_as_many_parameters():
    """Shazeer 2020, sec. 3.1: 3 * 768 * 2048 = 2 * 768 * 3072, and so have the FLOPs."""
    plain = ModelConfig(vocab_size=64, num_layers=1, embed_dim=768, attention=heads(12, dim=64))
    found = []
    for kind, hidden in (("relu", 3072), ("gelu", 3072), ("swiglu", 2048), ("geglu", 2048), ("reglu", 2048)):
        config = replace(plain, mlp=MLPConfig(kind, hidden))
        found.append((mlp_parameters(config), forward_flops_per_token(config, 512)))
    assert {size for size, _ in found} == {4_718_592} and len(set(found)) == 1


def test_a_layer_norm_with_bias_has_twice_the_parameters_of_an_rms_norm():
    """Zhang & Sennrich 2019, sec. 4: no mean and no bias."""
    rms = ModelConfig(vocab_size=64, num_layers=3, embed_dim=96, attention=heads(2))
    layer = replace(rms, norm=NormConfig("layernorm", bias=True))
    assert count_parameters(layer).total - count_parameters(rms).total == (2 * 3 + 1) * 96


@pytest.mark.parametrize("rank, count", [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_adapters_of_gpt_3_have_the_sizes_of_the_lora_paper(rank, count):
    """Hu et al. 2021, table 5 and sec. 4.2: queries and values of GPT-3 175B, 96 layers of width 12,288; 18 M
    parameters for rank 4. The digits are 2 * 2 * 96 * 12,288 * rank."""
    config = ModelConfig(
        vocab_size=50_257, num_layers=96, embed_dim=12_288, max_length=2048, attention=heads(96, bias="all"),
        position=PositionConfig(kind="learned"), norm=NormConfig("layernorm", bias=True), tied_embeddings=True,
        mlp=MLPConfig("gelu", 4 * 12_288, bias=True),
    )  # fmt: skip
    adapted = jax.eval_shape(
        lambda key: add_lora(Transformer(key, config, RULES), {"attention.q", "attention.v"}, rank, key),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    trainable, _ = split(adapted, lambda path, weight, part: part == "adapter")
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(trainable)) == count


# ---------------------------------------------------------------------------------------------------- FLOPs

# 12 d^2 parameters per layer: the network of Kaplan et al. 2020 and of DeepSeek LLM 2024.
D, LAYERS, LENGTH = 128, 3, 64
PLAIN = ModelConfig(
    vocab_size=512, num_layers=LAYERS, embed_dim=D, max_length=LENGTH, attention=heads(4, dim=32),
    mlp=MLPConfig("gelu", 4 * D), dtype="float32",
)  # fmt: skip
BOTH_WAYS = replace(PLAIN, attention=replace(PLAIN.attention, mask="bidirectional"))


def test_training_flops_match_palm_and_deepseek():
    """Chowdhery et al. 2022, app. B: 6 N + 12 L d T per token, with all scores of attention and without the input
    embedding. DeepSeek LLM 2024, eq. 2: 72 L d^2 + 12 L d T without the head. Our causal attention counts half."""
    matrices = 12 * LAYERS * D**2
    weights = named_weights(abstract_model(PLAIN, RULES))
    assert sum(math.prod(w.shape) for _, w in weights if w.role == "matrix") == matrices
    head, attention = D * PLAIN.vocab_size, 12 * LAYERS * D * LENGTH
    assert train_flops_per_token(BOTH_WAYS, LENGTH) == 6 * (matrices + head) + attention
    assert train_flops_per_token(BOTH_WAYS, LENGTH) - 6 * head == 72 * LAYERS * D**2 + attention
    assert train_flops_per_token(PLAIN, LENGTH) == 6 * (matrices + head) + attention / 2


def test_flops_of_switch_do_not_depend_on_the_number_of_experts():
    """Fedus et al. 2021, sec. 2: the FLOPs per token stay constant, except for the router's d * E products."""
    for experts in (1, 8, 128, 2048):
        moe = MoEConfig(experts, 1, 4 * D, router="switch", capacity_factor=1.25)
        router = 2 * D * experts * LAYERS
        found = forward_flops_per_token(replace(PLAIN, moe=moe), LENGTH)
        assert found == forward_flops_per_token(PLAIN, LENGTH) + router


def test_training_flops_of_deepseek_v3_match_its_authors():
    """Zhao et al. 2025 (Insights into DeepSeek-V3), table 2: 250 GFLOPs per token. They count causal attention over
    4,096 tokens as half, as we do."""
    assert train_flops_per_token(released("DeepSeek-V3"), 4096) == pytest.approx(250e9, rel=0.01)


def compiled_flops(f, *shapes) -> float:
    return jax.jit(f).lower(*shapes).compile().cost_analysis()["flops"]


def test_flops_are_within_5_percent_of_the_compiled_program():
    """XLA counts 2 per multiply-add, as we do, and also norms, softmax, RoPE and activations, which are small here. It
    counts the body of a loop once, so the layers are unrolled."""
    batch = 2
    config = replace(BOTH_WAYS, scan_unroll=0, attention=replace(BOTH_WAYS.attention, implementation="reference"))
    tokens = jax.ShapeDtypeStruct((batch, LENGTH), "int32")
    model = abstract_model(config, RULES)

    def predict(model, tokens):
        return logits(model, forward(model, tokens).hidden_BTD)

    def gradient(model, tokens):
        return jax.grad(lambda model: (predict(model, tokens) ** 2).mean())(model)

    ours = forward_flops_per_token(config, LENGTH) * batch * LENGTH
    assert compiled_flops(predict, model, tokens) == pytest.approx(ours, rel=0.05)
    # The backward pass counts twice the forward pass; XLA does not compute the scores again.
    assert train_flops_per_token(config, LENGTH) * batch * LENGTH == 3 * ours
    assert compiled_flops(gradient, model, tokens) == pytest.approx(3 * ours, rel=0.05)


# ---------------------------------------------------------------------------------------------------- caches


def cache_bytes(config: ModelConfig, capacity: int) -> int:
    """Return the bytes of one row's cache in bfloat16."""
    model = abstract_model(replace(config, dtype="bfloat16"), RULES)
    cache = jax.eval_shape(lambda model: init_cache(model, 1, capacity), model)
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache.stacks))


WIDE = ModelConfig(vocab_size=64, mlp=MLPConfig(hidden_dim=64), position=PositionConfig(theta=1e6))
LLAMA_3_405B = replace(WIDE, num_layers=126, embed_dim=16_384, attention=heads(128, 8))
QWEN_2_5_72B = replace(WIDE, num_layers=80, embed_dim=8192, attention=heads(64, 8))


@pytest.mark.parametrize(
    "config, expected",
    [
        # Zhao et al. 2025 (Insights into DeepSeek-V3), table 1, in units of 1000 bytes.
        (released("DeepSeek-V3"), 70_272),
        (QWEN_2_5_72B, 327_680),
        (LLAMA_3_405B, 516_096),
        # 2 * layers * key heads * head dimension * 2 bytes, by hand.
        (LLAMA_2_7B, 2 * 32 * 32 * 128 * 2),
        (released("Mixtral-8x7B"), 2 * 32 * 8 * 128 * 2),
    ],
    ids=["DeepSeek-V3", "Qwen2.5-72B", "Llama-3.1-405B", "Llama-2-7B", "Mixtral-8x7B"],
)
def test_cache_bytes_per_token(config, expected):
    assert cache_bytes(config, 100) == 100 * expected


def test_grouped_queries_divide_the_cache_by_the_size_of_a_group():
    """Ainslie et al. 2023, sec. 2.2: G groups cut the cache of H heads by H / G; one group is multi-query attention."""
    whole = cache_bytes(LLAMA_2_7B, 10)
    for groups in (32, 8, 4, 1):
        assert cache_bytes(replace(LLAMA_2_7B, attention=heads(32, groups)), 10) == whole * groups // 32


def test_a_rolling_cache_of_mistral_7b_saves_a_factor_of_8():
    """Jiang et al. 2023, sec. 2: for 32k tokens, a window of 4,096 reduces the cache memory by 8."""
    config = released("Mistral-7B-v0.1")
    whole = replace(config, attention=replace(config.attention, layers=("global",)))
    assert config.attention.window == 4096
    assert cache_bytes(whole, 32_768) == 8 * cache_bytes(config, 32_768)
    assert cache_bytes(config, 4096) == cache_bytes(config, 32_768) == cache_bytes(whole, 4096)
