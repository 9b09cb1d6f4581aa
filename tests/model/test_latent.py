"""Multi-head latent attention: values, gradients, the latent cache, several devices, costs and refusals.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from decode.generate import generate
from decode.sampling import SamplingParams
from model.config import (
    AttentionConfig,
    LatentConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    PositionConfig,
    RopeScalingConfig,
)
from model.cost import abstract_model, count_parameters, forward_flops_per_token
from model.transformer import forward, init_cache, logits, unstack
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.closeness import assert_close
from tests.model.reference import flat_weights, transformer
from tests.model.test_reference import changed, packed, tokens
from tests.models import random_model, tiny_config, weight_names
from tests.sharding.test_equivalence import on_mesh
from tests.sharding.test_equivalence import test_a_mesh_gives_the_loss_and_gradients_of_one_device as compare_with_mesh

LATENT = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=12, latent=LatentConfig(None, 16, 4, 6), window=5)
PLAIN = tiny_config(attention=LATENT)
# All options at once: a latent for queries, biases, sinks, a window, scaled and interleaved positions.
FULL = tiny_config(
    norm=NormConfig(epsilon=0.1),
    attention=replace(
        LATENT, latent=LatentConfig(20, 16, 4, 6), bias="all", sinks=True, layers=("global", "sliding"), query_scale=0.5
    ),
    position=PositionConfig(interleaved=True, scaling=RopeScalingConfig("yarn", 4.0, 8, attention_factor=1.3)),
)
WRONG = {
    "attention.bias": "none",
    "attention.sinks": False,
    "attention.window": 4,
    "attention.query_scale": None,
    "position.interleaved": False,
    "position.scaling": None,
    "position.scaling.attention_factor": 1.0,
    "norm.epsilon": 1e-6,
}


def test_logits_and_gradient_match_the_reference_and_every_field_matters():
    """Rows are packed, so other documents of a row must not matter."""
    FULL.validate()
    model, direction, batch = random_model(FULL), random_model(FULL, seed=5), packed()
    real = batch["segment_ids_BT"] > 0

    @jax.jit
    def run(model):
        def total(model):
            out = logits(model, forward(model, **batch).hidden_BTD)
            return jnp.where(real[..., None], jnp.sin(out), 0).sum(), out

        return jax.grad(total, has_aux=True)(model)

    gradient, ours = jax.device_get(run(model))
    w, d = flat_weights(model), flat_weights(direction)
    theirs, _ = transformer(w, FULL, **batch)
    assert_close(ours[real], theirs[real], 1e-5)
    assert theirs.std() > 0.3
    for path, value in WRONG.items():
        wrong, _ = transformer(w, changed(FULL, path, value), **batch)
        assert np.abs(wrong - ours)[real].max() > 1e-3, f"{path} = {value} makes no difference"

    up, down = (
        np.sin(transformer({k: x + s * d[k] for k, x in w.items()}, FULL, **batch)[0])[real].sum()
        for s in (1e-5, -1e-5)
    )
    products = [np.vdot(g, x) for g, x in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)]
    np.testing.assert_allclose(sum(products), (up - down) / 2e-5, rtol=1e-4, atol=1e-4 * np.linalg.norm(products))
    for (name, _), g in zip(weight_names(model), jax.tree.leaves(gradient), strict=True):
        assert np.abs(g).max() > 1e-4, f"{name} has no gradient"


def test_without_a_query_latent_logits_match_and_no_gradient_comes_from_later_tokens():
    """The logits at token 7 have no gradient for embeddings of tokens that only occur later."""
    PLAIN.validate()
    model, batch = random_model(replace(PLAIN, tied_embeddings=False)), tokens()

    @jax.jit
    def run(model):
        def total(model):
            out = logits(model, forward(model, **batch).hidden_BTD)
            return out[0, 7].sum(), out

        return jax.grad(total, has_aux=True)(model)

    gradient, ours = jax.device_get(run(model))
    assert_close(ours, transformer(flat_weights(model), PLAIN, **batch)[0], 1e-5)
    row = batch["tokens_BT"][0]
    touched = np.abs(gradient.embedding.value).max(-1) > 0
    assert {int(t) for t in np.flatnonzero(touched)} == {int(t) for t in row[:8]}


@pytest.mark.parametrize("full", [True, False])
def test_a_latent_cache_matches_whole_rows(full: bool):
    """Covers a prompt with expanded latents (26 tokens), one with absorbed projections (9), single tokens, three tokens
    at once, and uneven rows."""
    config = FULL if full else replace(PLAIN, num_layers=1)
    model = unstack(random_model(config))
    rows = np.random.default_rng(2).integers(0, 64, (2, 32))
    want = jax.jit(lambda m: logits(m, forward(m, rows).hidden_BTD))(model)

    @jax.jit
    def extended(model, cache, new_BT):
        out = forward(model, new_BT, cache=cache)
        return logits(model, out.hidden_BTD), out.cache

    prompt = 26 if full else 9
    got, cache = extended(model, init_cache(model, 2, 40), rows[:, :prompt])
    assert_close(got, want[:, :prompt], 1e-5)
    lengths = np.array([prompt, prompt - 4])  # cut the last tokens off the second row and append them again
    for steps in (1, 1, 3):
        cache = cache.at_length(jnp.asarray(lengths, jnp.int32))
        places = lengths[:, None] + np.arange(steps)
        got, cache = extended(model, cache, np.take_along_axis(rows, places, 1))
        assert_close(got, np.take_along_axis(np.asarray(want), places[..., None], 1), 1e-5)
        lengths = lengths + steps
    size = sum(x.size for x in jax.tree.leaves(cache.stacks))
    assert size == config.num_layers * 2 * 40 * (16 + 4), "kv_rank + rope_dim numbers per token and layer"


@pytest.mark.slow
def test_generated_tokens_match_whole_rows_on_one_device_and_on_eight():
    config = replace(FULL, moe=MoEConfig(4, 2, 24, layers=("dense", "moe")))
    model, greedy = random_model(config), SamplingParams(max_new_tokens=4, temperature=0.0)
    prompts = [np.random.default_rng(i).integers(0, 64, n).tolist() for i, n in enumerate((20, 5))]
    alone = generate(model, prompts, greedy)
    run = jax.jit(lambda rows: logits(model, forward(model, rows).hidden_BTD))
    for prompt, found in zip(prompts, alone, strict=True):
        whole = run(np.resize(prompt + found.tokens, (1, 24)))[0, : len(prompt) + 4]
        assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == found.tokens
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with use_mesh(mesh):
        spread = generate(on_mesh(config, mesh), prompts, greedy)
    assert [g.tokens for g in spread] == [g.tokens for g in alone]
    np.testing.assert_allclose([g.logprobs for g in spread], [g.logprobs for g in alone], atol=1e-4)


@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "fsdp": 2, "tensor": 2}, *(pytest.param(axes, marks=pytest.mark.slow) for axes in (
        {"fsdp": 2, "sequence": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2},
    ))],
)  # fmt: skip
def test_eight_devices_match_the_loss_and_gradients_of_one(axes):
    compare_with_mesh(FULL, axes)


def test_flops_and_parameters_match_the_shapes():
    """Two FLOPs per matrix entry and token; attention FLOPs from the widths of keys and values."""
    config = replace(FULL, num_layers=1, attention=replace(FULL.attention, layers=("global",)))
    weights = weight_names(abstract_model(config, ShardingRules()))
    matrices = {
        n: math.prod(x.shape) for n, x in weights if not n.endswith(("bias", "scale", "sinks")) and n != "embedding"
    }
    assert sum("attention" in n for n in matrices) == 6
    visible = 30 / 2
    assert forward_flops_per_token(config, 30) == 2 * sum(matrices.values()) + 2 * 4 * (12 + 6) * visible
    D, N, H, Q, R, P, X = 32, 4, 12, 20, 16, 4, 6
    attention = D * Q + Q + Q + Q * N * H + D * (R + P) + (R + P) + R + R * N * (H - P + X) + N * X * D + D + N
    assert sum(math.prod(x.shape) for n, x in weights if ".attention." in n) == attention
    assert count_parameters(config).total == sum(math.prod(x.shape) for _, x in weights)


@pytest.mark.parametrize(
    "path, value",
    [
        ("attention.latent.q_rank", 0),
        ("attention.latent.kv_rank", 0),
        ("attention.latent.rope_dim", 3),
        ("attention.latent.rope_dim", 12),
        ("attention.latent.rope_dim", 0),
        ("attention.latent.value_dim", -1),
        ("attention.num_kv_heads", 2),
        ("attention.qk_norm", "head"),
        ("attention.clip_qkv", 2.0),
        ("attention.context_parallel", "ring"),
        ("attention.context_parallel", "ulysses"),
        ("position.kind", "alibi"),
        ("position.kind", "learned"),
        ("position.rotary_fraction", 0.5),
        ("position.scaling.kind", "dynamic_ntk"),
    ],
)
def test_incompatible_fields_are_refused(path: str, value: object):
    config = FULL
    if path == "position.kind":
        config = replace(FULL, position=replace(FULL.position, scaling=None))
    wrong: ModelConfig = changed(config, path, value)
    with pytest.raises(ValueError, match=f"model.{path}") as error:
        wrong.validate()
    assert repr(value) in str(error.value)
