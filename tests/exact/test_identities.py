"""Options that must give the same network: groups of queries, norms, scales and muP at its base width."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import NormConfig
from model.norms import Norm
from model.positions import rope_tables, rotate
from model.transformer import Transformer, forward, logits
from model.weights import Weight, map_named_weights
from sharding.rules import ShardingRules
from tests.closeness import assert_close
from tests.models import TINY_ATTENTION, put, random_model, tiny_config
from train.config import OptimizerConfig
from train.optimizers import make_optimizer

TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12)).astype(np.int32)


def predict(model) -> np.ndarray:
    return np.asarray(jax.jit(lambda model: logits(model, forward(model, TOKENS).hidden_BTD))(model))


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_queries_are_multi_head_attention_with_repeated_keys(groups):
    """Ainslie et al. 2023, sec. 2.2: one group is multi-query attention; as many groups as heads is multi-head."""
    config = tiny_config(attention=replace(TINY_ATTENTION, num_kv_heads=groups))
    whole = tiny_config(attention=replace(TINY_ATTENTION, num_kv_heads=4))
    model = random_model(config)

    def repeated(path: str, weight: Weight) -> Weight:
        if weight.name not in ("attention.k", "attention.v"):
            return weight
        return replace(weight, value=np.repeat(weight.value, 4 // groups, axis=2))  # [R, D, K, H]

    leaves = jax.tree.leaves(map_named_weights(repeated, model))
    multi_head = jax.tree.unflatten(jax.tree.structure(random_model(whole)), leaves)
    assert_close(predict(model), predict(multi_head), 1e-5)


# ---------------------------------------------------------------------------------------------------- norms


def norm(width: int, **changes) -> Norm:
    return Norm((width,), (None,), NormConfig(**changes), ShardingRules(), "norm")


def test_layer_norm_is_rms_norm_of_centered_inputs_and_both_ignore_the_scale():
    """Zhang & Sennrich 2019, sec. 4: equal if the mean is 0; f(c x) = f(x). A power of 2 changes no bit."""
    x = jax.random.normal(jax.random.key(0), (5, 64))
    rms, layer = norm(64, epsilon=0.0), norm(64, kind="layernorm", epsilon=0.0)
    assert_close(layer(x + 3), rms(x - x.mean(-1, keepdims=True)), 1e-5)
    assert np.abs(np.asarray(layer(x) - rms(x))).max() > 0.01
    for f in (rms, layer):
        np.testing.assert_array_equal(f(64 * x), f(x))
        assert_close(f(1e-4 * x), f(x), 1e-6)


def test_normalized_queries_and_keys_bound_the_attention_logits():
    """Norms of queries and keys (Wortsman et al. 2023, sec. 3.1.1) keep |q k| / sqrt(H) below sqrt(H) times the largest
    scales, however large the activations are. Equal directions reach the bound, and RoPE keeps lengths."""
    H = 16
    q_norm, k_norm = norm(H, epsilon=0.0), norm(H, epsilon=0.0)
    put(q_norm, "scale", jnp.full(H, 1.5))
    put(k_norm, "scale", jnp.full(H, -0.7))
    x = 1e4 * jax.random.normal(jax.random.key(0), (1, 50, 1, H))
    tables = rope_tables(tiny_config(attention=replace(TINY_ATTENTION, head_dim=H)), jnp.arange(50)[None])
    q, k = (np.asarray(rotate(f(x), *tables, False))[0, :, 0] for f in (q_norm, k_norm))
    scores = np.abs(q @ k.T) / H**0.5
    bound = 1.5 * 0.7 * H**0.5
    assert scores.max() <= bound * (1 + 1e-5)
    assert_close(np.diag(scores), np.full(50, bound), 1e-5)


# ---------------------------------------------------------------------------------------------------- muP


def test_mup_at_its_base_width_is_the_standard_parametrization():
    """Yang et al. 2022, table 8: every factor is a power of width / base width. The same bits at initialization, in the
    logits and in updates of weights of every role."""
    plain = tiny_config(num_layers=1)
    at_base, wider = (replace(plain, mup_base_dim=plain.embed_dim // factor) for factor in (1, 2))

    def initial(config) -> list:
        def head_and_queries(key):
            model = Transformer(key, config, ShardingRules())
            return model.head, model.stacks[0][0].attention.q  # XLA leaves out the other weights

        return jax.tree.leaves(jax.jit(head_and_queries)(jax.random.key(0)))

    def update(config) -> list:
        roles = ("matrix", "router", "embedding", "vector")
        weights = [Weight(jnp.ones((3, 4)), axes=("embed", "mlp"), inputs=1, role=role) for role in roles]
        optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01, warmup_steps=0), config, steps=10)
        return jax.tree.leaves(jax.jit(lambda w: optimizer.update(w, optimizer.init(w), w)[0])(weights))

    for f in (initial, lambda config: [predict(random_model(config))], update):
        expected, found, others = (f(config) for config in (plain, at_base, wider))
        for a, b in zip(expected, found, strict=True):
            np.testing.assert_array_equal(a, b)
        assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(expected, others, strict=True))
