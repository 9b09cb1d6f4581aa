"""Users' attention variants, and users' `run_layers`."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import MoEConfig
from model.context import ForwardContext
from model.cost import forward_flops_per_token
from model.layers import run_pattern
from model.transformer import Transformer, forward, init_cache, logits
from model.weights import repeats
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.models import TINY_ATTENTION, tiny_config

VARIANT = "tests.model.differential:DifferentialAttention"
CONFIG = tiny_config(attention=replace(TINY_ATTENTION, layers=(VARIANT, "sliding")), num_layers=4)
TOKENS = np.random.default_rng(0).integers(0, 64, (4, 11)).astype(np.int32)


def network(config=CONFIG):
    return jax.jit(lambda: Transformer(jax.random.key(3), config, ShardingRules()))()


def softmax_attention(q_TH, k_TH, v_TH):
    """Return causal softmax attention in float64."""
    scores = q_TH @ k_TH.T * q_TH.shape[1] ** -0.5
    scores = np.where(np.tril(np.ones_like(scores, bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ v_TH


def test_a_user_variant_matches_the_paper_and_works_cached_and_on_a_mesh():
    CONFIG.validate()
    model = network()
    expected = jax.jit(lambda m: logits(m, forward(m, TOKENS).hidden_BTD))(model)

    # One layer against the formula in float64.
    layer = jax.tree.map(lambda w: w[0], model.stacks[0][0].attention)
    norm = jax.tree.map(lambda w: w[0], model.stacks[0][0].attention_norm)
    x = np.asarray(model.embedding.value)[TOKENS]
    x = np.asarray(norm(jnp.asarray(x)))
    flat = replace(CONFIG, position=replace(CONFIG.position, kind="none"))
    layer.config = flat

    zeros, rows = jnp.zeros(TOKENS.shape, jnp.int32), jnp.full(len(TOKENS), TOKENS.shape[1], jnp.int32)
    ctx = ForwardContext(jnp.asarray(TOKENS), zeros, zeros == 0, zeros, None, None, rows)
    got = np.asarray(layer(jnp.asarray(x), ctx, None)[0], np.float64)
    q, k, v, out = (np.asarray(getattr(layer, n).value, np.float64) for n in ("q", "k", "v", "out"))
    want = np.zeros_like(got)
    for b in range(len(x)):
        for n in range(4):
            kv = n // 2
            first, second = (
                softmax_attention(x[b] @ q[:, n + 4 * i], x[b] @ k[:, kv + 2 * i], x[b] @ v[:, kv]) for i in range(2)
            )
            want[b] += (first - 0.3 * second) @ out[n]
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())

    # With a cache, on a mesh, and in the FLOP count.
    step = jax.jit(lambda m, cache, new: forward(m, new, cache=cache))
    found, cache = [], init_cache(model, 4, 16)
    for low, high in ((0, 6), (6, 7), (7, 11)):
        output = step(model, cache, TOKENS[:, low:high])
        found.append(logits(model, output.hidden_BTD))
        cache = output.cache
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=1e-5 * scale)
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        sharded = jax.jit(lambda: Transformer(jax.random.key(3), CONFIG, ShardingRules()))()
        got = jax.jit(lambda m: logits(m, forward(m, TOKENS).hidden_BTD))(sharded)
    np.testing.assert_allclose(got, expected, atol=1e-5 * scale)
    plain = replace(CONFIG, attention=replace(CONFIG.attention, layers=("global", "sliding")))
    more = 2 * (2 * 32 * 8 * (3 * 4 + 3 * 2 - 2 * 4 - 2 * 2) + 4 * 4 * 8 * 32 / 2)
    assert forward_flops_per_token(CONFIG, 32) - forward_flops_per_token(plain, 32) == more


@pytest.mark.parametrize("kind", ["diferential", "tests.model.differential:Missing", "no.such.module:X"])
def test_an_unknown_variant_is_refused_by_name(kind):
    wrong = tiny_config(attention=replace(TINY_ATTENTION, layers=(kind,)))
    with pytest.raises(ValueError, match=r"model\.attention\.layers = "):
        wrong.validate()
        jax.eval_shape(lambda: Transformer(jax.random.key(0), wrong, ShardingRules()))


def test_a_custom_run_layers_matches_the_scan():
    """A Python loop over the repetitions gives the same hidden states, caches, statistics and gradients as the scan."""

    def one_by_one(config, stacks, x_BTD, ctx, caches, keys):
        new_caches, stats, layer = [], [], 0
        for s, unit in enumerate(stacks):
            rows = []
            for r in range(repeats(unit)):
                here, cache = jax.tree.map(lambda w, r=r: w[r], (list(unit), None if caches is None else caches[s]))
                own = None if keys is None else keys[layer : layer + len(unit)]
                layer += len(unit)
                x_BTD, cache, router = run_pattern(here, x_BTD, ctx, cache, own)
                rows.append(cache)
                stats += [] if router is None else [router]
            new_caches.append(jax.tree.map(lambda *parts: jnp.stack(parts), *rows))
        router = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None
        return x_BTD, None if caches is None else tuple(new_caches), router

    config = tiny_config(num_layers=5, dropout=0.1, moe=MoEConfig(4, 2, 16, layers=("dense", "moe")))
    model, key = network(config), jax.random.key(1)

    def run(model, run_layers=None):
        chosen = {} if run_layers is None else {"run_layers": run_layers}
        out = forward(model, TOKENS, dropout_key=key, **chosen)
        return jnp.square(out.hidden_BTD).sum() + out.router.load_balance.sum(), out.router

    plain = jax.jit(jax.value_and_grad(run, has_aux=True))(model)
    other = jax.jit(jax.value_and_grad(lambda m: run(m, one_by_one), has_aux=True))(model)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(plain), strict=True):
        scale = max(float(np.abs(np.asarray(b, np.float64)).max()), 1e-30)
        np.testing.assert_allclose(a, b, atol=2e-5 * scale)
    cached = jax.jit(lambda m: forward(m, TOKENS, cache=init_cache(m, 4, 16), run_layers=one_by_one).cache)(model)
    expected = jax.jit(lambda m: forward(m, TOKENS, cache=init_cache(m, 4, 16)).cache)(model)
    assert jax.tree.structure(cached) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(cached), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(np.asarray(b)).max())))
