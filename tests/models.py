"""Tiny networks whose weights make every config field affect the output, built without compiling an initializer."""

from __future__ import annotations

import dataclasses
import zlib

import jax
import numpy as np

from model.config import AttentionConfig, MLPConfig, ModelConfig
from model.context import ForwardContext
from model.dispatch import DOWN, DOWN_BIAS, UP, UP_BIAS, ExpertWeights
from model.transformer import Transformer
from model.weights import Weight, named_weights
from sharding.rules import ShardingRules

TINY_ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, window=5, blocks=(4, 1, 2))


def tiny_config(**changes) -> ModelConfig:
    """Return a config of two layers, width 32, vocabulary 64 and float32, with `changes` to the fields of
    ModelConfig."""
    tiny = ModelConfig(
        vocab_size=64,
        num_layers=2,
        embed_dim=32,
        max_length=64,
        attention=TINY_ATTENTION,
        mlp=MLPConfig(hidden_dim=48),
        dtype="float32",
    )
    return dataclasses.replace(tiny, **changes)


def weight_names(model: Transformer) -> list[tuple[str, jax.Array | jax.ShapeDtypeStruct]]:
    """Return (dotted path, stored value) of every weight, in the order of `jax.tree.leaves`."""
    return [(path, weight.value) for path, weight in named_weights(model)]


def put(module, name: str, value) -> None:
    """Replace the value of a weight of `module`."""
    setattr(module, name, dataclasses.replace(getattr(module, name), value=value))


def context(ids_BT, positions_BT, valid_BT) -> ForwardContext:
    """Return the context of a call with whole rows, without a cache."""
    return ForwardContext(ids_BT, positions_BT, valid_BT, positions_BT)


def expert_weights(up, down, rules: ShardingRules, biases=None) -> ExpertWeights:
    """Return arrays as the weights of a layer's experts. `biases`: (hidden bias, output bias) or None."""
    made = lambda value, axes: None if value is None else Weight(value, axes=axes, inputs=1, rules=rules)
    up_bias, down_bias = biases or (None, None)
    return ExpertWeights(made(up, UP), made(down, DOWN), made(up_bias, UP_BIAS), made(down_bias, DOWN_BIAS))


def random_weight(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> np.ndarray:
    """Return a float32 weight made from standard normal numbers n: matrices N(0, 1 / inputs), with q and k doubled to
    make attention peaked, so that errors show; norm scales 1 + 0.1 n (0.1 n with a unit offset); biases and sinks 0.1
    n."""
    n = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    last = name.rsplit(".", 1)[-1]
    if last == "scale":
        return 0.1 * n if config.norm.unit_offset else 1 + 0.1 * n
    if last in ("sinks", "bias") or last.endswith("_bias"):
        return 0.1 * n
    if last in ("embedding", "positions"):
        return n
    shape = shape[1:] if name.startswith("stacks") else shape
    if last == "up":  # [(E,) D, G, F]
        inputs = shape[-3]
    elif last == "down":  # [(E,) F, D]
        inputs = shape[-2]
    else:  # out [N, H, D]; q, k, v, router and head [D, ...]
        inputs = shape[0] * shape[1] if last == "out" else shape[0]
    return n * (2.0 if last in ("q", "k") else 1.0) * inputs**-0.5


def random_model(config: ModelConfig, seed: int = 0, rules: ShardingRules | None = None) -> Transformer:
    """Return the Transformer of `config` with weights of `random_weight`, without a mesh and without compiling."""
    rules = ShardingRules() if rules is None else rules
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config, rules))
    weights = [jax.device_put(random_weight(name, x.shape, config, seed)) for name, x in weight_names(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), weights)
