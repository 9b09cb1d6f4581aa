"""Parameter and FLOP counts of a network, from its config.

Convention for all FLOPs: a multiply-add counts 2. Only matmuls and attention count, causal attention as half (each
query against its visible keys). The backward pass counts twice the forward pass, without rematerialization. Only the
chosen experts count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax

from model.attention import attention_variant
from model.config import ModelConfig, layer_specs
from model.mlp import gates
from model.moe_config import WITHOUT_LOGITS
from model.transformer import Transformer
from model.weights import named_weights
from sharding.rules import ShardingRules

CONVENTION = "2 per multiply-add, matmuls and attention, causal attention half, backward 2x forward, remat not counted"


class ParameterCount(NamedTuple):
    total: int
    active: int  # used by one token: counts the chosen experts only
    embedding: int  # part of the total: token and position embeddings and the head


def abstract_model(config: ModelConfig, rules: ShardingRules) -> Transformer:
    """Return the network as shapes, dtypes and, on a mesh, shardings."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda key: Transformer(key, config, rules), key)


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Return the parameter counts of the network, from the shapes of its initialization."""
    weights = [weight for _, weight in named_weights(abstract_model(config, ShardingRules()))]
    total = sum(math.prod(weight.shape) for weight in weights)
    embedding = sum(math.prod(weight.shape) for weight in weights if weight.role == "embedding")
    idle = 0
    if config.moe is not None:
        D, F, G = config.embed_dim, config.moe.hidden_dim, gates(config.mlp.kind)
        per_expert = D * F * (G + 1) + (G * F + D if config.mlp.bias else 0)
        layers = sum(spec.moe for spec in layer_specs(config))
        idle = int(layers * (config.moe.num_experts - experts_per_token(config, config.max_length)) * per_expert)
    return ParameterCount(total, total - idle, embedding)


def forward_flops_per_token(config: ModelConfig, length: int) -> float:
    """Return the FLOPs of the forward pass for one token of a full window of `length`, including the head."""
    D = config.embed_dim
    flops = 2.0 * D * config.vocab_size
    for spec in layer_specs(config):
        flops += attention_variant(config.attention, spec.attention).flops(config, spec.attention, length)
        if spec.moe and config.moe is not None:
            chosen = experts_per_token(config, length) + config.moe.shared_experts
            slots = config.moe.top_k if config.moe.router == "soft" else 1
            flops += 0 if config.moe.router in WITHOUT_LOGITS else 2 * D * config.moe.num_experts * slots
            flops += 2 * D * config.moe.hidden_dim * (gates(config.mlp.kind) + 1) * chosen
        else:
            flops += 2 * D * config.mlp.hidden_dim * (gates(config.mlp.kind) + 1)
    return flops


def experts_per_token(config: ModelConfig, length: int) -> float:
    """Return the mean number of experts per token in a window of `length`, without drops at the capacity; for the soft
    router, slots per token."""
    moe = config.moe
    assert moe is not None
    if moe.router == "soft":
        return moe.num_experts * moe.top_k / length
    if moe.router == "expert_choice":
        return moe.num_experts * moe.capacity(length) / length
    return moe.top_k


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Return the FLOPs of a training step per token: three times the forward pass."""
    return 3 * forward_flops_per_token(config, length)
