"""The network against a float64 reference written from the papers.

Each case sets many fields at once. To show that the comparison would detect an error, a reference with one field
changed must give different logits for the same weights. (With a plain initialization, a wrong softcap changes them by
only 2e-4.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import MLPConfig, ModelConfig, MoEConfig, NormConfig, PositionConfig, RopeScalingConfig
from model.transformer import forward, logits
from tests.closeness import assert_close
from tests.model.reference import flat_weights, transformer
from tests.models import TINY_ATTENTION, random_model, tiny_config

T = 19
SCALING = RopeScalingConfig(factor=4.0, original_length=8)


def changed(config, path: str, value):
    """Return `config` with the field, or the entry of a tuple, at the dotted `path` replaced by `value`."""
    head, _, rest = path.partition(".")
    if isinstance(config, tuple):
        return tuple(value if i == int(head) else x for i, x in enumerate(config))
    return replace(config, **{head: changed(getattr(config, head), rest, value) if rest else value})


def tokens() -> dict[str, np.ndarray]:
    return {"tokens_BT": np.random.default_rng(1).integers(0, 64, (2, T)).astype(np.int32)}


def prefixed() -> dict[str, np.ndarray]:
    return tokens() | {"prefix_BT": np.arange(T) < np.array([[7], [3]])}


def packed() -> dict[str, np.ndarray]:
    """Return rows of three and two segments; the second row ends in padding."""
    lengths = [[7, 9, 3], [11, 5]]
    positions, ids = np.zeros((2, 2, T), np.int32)
    for b, row in enumerate(lengths):
        start = 0
        for i, n in enumerate(row):
            positions[b, start : start + n], ids[b, start : start + n] = np.arange(n), i + 1
            start += n
    return tokens() | {"positions_BT": positions, "segment_ids_BT": ids}


# name: (config, inputs, {field: a value for which the reference must give different logits})
CASES: dict[str, tuple[ModelConfig, object, dict[str, object]]] = {
    "llama": (
        tiny_config(
            norm=NormConfig(epsilon=0.1),
            position=PositionConfig(scaling=replace(SCALING, kind="llama3")),
        ),
        tokens,
        {
            "norm.epsilon": 0.2,
            "norm.kind": "layernorm",
            "position.theta": 5000.0,
            "position.scaling.kind": "linear",
            "position.scaling.factor": 3.0,
            "position.scaling.original_length": 16,
            "position.scaling.beta_slow": 0.5,
            "position.scaling.beta_fast": 3.0,
            "position.interleaved": True,
            "attention.mask": "bidirectional",
            "mlp.kind": "geglu",
        },
    ),
    "gemma": (
        tiny_config(
            num_layers=4,
            norm=NormConfig(epsilon=1e-3, unit_offset=True, placement="sandwich"),
            attention=replace(
                TINY_ATTENTION, layers=("sliding", "global"), softcap=2.0, query_scale=0.5, qk_norm="head"
            ),
            position=PositionConfig(theta=1e4, local_theta=100.0),
            mlp=MLPConfig("geglu", 48),
            tied_embeddings=True,
            embedding_scale=32**0.5,
            final_softcap=3.0,
        ),
        tokens,
        {
            "norm.unit_offset": False,
            "norm.placement": "pre",
            "attention.layers": ("global", "sliding"),
            "attention.window": 6,
            "attention.softcap": 3.0,
            "attention.query_scale": None,
            "attention.qk_norm": "none",
            "position.local_theta": None,
            "mlp.kind": "swiglu",
            "embedding_scale": 3.0,
            "final_softcap": 4.0,
        },
    ),
    "gpt2": (
        tiny_config(
            norm=NormConfig("layernorm", 0.1, bias=True),
            attention=replace(TINY_ATTENTION, num_kv_heads=4, bias="all"),
            position=PositionConfig("learned"),
            mlp=MLPConfig("gelu", 48, bias=True),
            tied_embeddings=True,
        ),
        tokens,
        {
            "norm.bias": False,
            "norm.kind": "rmsnorm",
            "norm.epsilon": 0.2,
            "attention.bias": "qkv",
            "position.kind": "none",
            "mlp.kind": "relu",
            "mlp.bias": False,
        },
    ),
    "olmoe": (
        tiny_config(
            norm=NormConfig(placement="post"),
            attention=replace(TINY_ATTENTION, qk_norm="full"),
            position=PositionConfig(rotary_fraction=0.5, scaling=replace(SCALING, kind="ntk")),
            moe=MoEConfig(5, 3, 24, weights="softmax", balance_scope="sequence"),
        ),
        tokens,
        {
            "norm.placement": "pre",
            "attention.qk_norm": "head",
            "position.rotary_fraction": 1.0,
            "position.scaling.kind": "linear",
            "moe.top_k": 2,
        },
    ),
    "gpt-oss": (
        tiny_config(
            num_layers=3,
            attention=replace(TINY_ATTENTION, layers=("sliding", "global"), sinks=True, bias="all", head_dim=16),
            position=PositionConfig(
                interleaved=True,
                rotary_fraction=0.75,
                scaling=replace(SCALING, kind="yarn", original_length=32, beta_fast=4.0, beta_slow=0.5),
            ),
            moe=MoEConfig(6, 2, 24, layers=("dense", "moe")),
        ),
        tokens,
        {
            "attention.sinks": False,
            "position.interleaved": False,
            "position.scaling.beta_fast": 1.0,
            "position.scaling.beta_slow": 0.05,
            "position.scaling.attention_factor": 1.0,
            "moe.weights": "softmax",
        },
    ),
    "alibi": (
        tiny_config(
            attention=replace(
                TINY_ATTENTION, num_heads=6, num_kv_heads=1, layers=("block_sparse", "global"), blocks=(2, 1, 2)
            ),
            position=PositionConfig("alibi"),
            mlp=MLPConfig("relu2", 48),
        ),
        tokens,
        {
            "position.kind": "none",
            "attention.layers": ("global",),
            "attention.blocks.0": 3,
            "attention.blocks.1": 2,
            "attention.blocks.2": 3,
            "mlp.kind": "relu",
        },
    ),
    "encoder": (
        tiny_config(
            norm=NormConfig("layernorm"),
            attention=replace(TINY_ATTENTION, mask="bidirectional", layers=("sliding", "global")),
            position=PositionConfig("sinusoidal"),
            mlp=MLPConfig("relu", 48),
            mup_base_dim=16,
        ),
        tokens,
        {
            "attention.mask": "causal",
            "attention.window": 4,
            "position.kind": "none",
            "mup_base_dim": None,
            "mlp.kind": "relu2",
        },
    ),
    "prefix": (
        tiny_config(
            attention=replace(TINY_ATTENTION, mask="prefix", num_heads=2),
            position=PositionConfig(scaling=replace(SCALING, kind="dynamic_ntk")),
            mlp=MLPConfig("reglu", 48),
        ),
        prefixed,
        {
            "attention.mask": "causal",
            "position.scaling.factor": 3.0,
            "position.scaling.original_length": 16,
            "mlp.kind": "swiglu",
        },
    ),
    "packed": (
        tiny_config(
            num_layers=3,
            attention=replace(TINY_ATTENTION, layers=("global", "sliding", "sliding")),
            position=PositionConfig(scaling=replace(SCALING, kind="linear")),
            moe=MoEConfig(4, 1, 24, weights="softmax", layers=("moe", "dense")),
        ),
        packed,
        {"position.scaling.kind": "ntk", "attention.window": 4, "moe.weights": "renormalized", "moe.num_experts": 3},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_router_match_the_reference_and_every_field_matters(name):
    config, inputs, mutations = CASES[name]
    config.validate()
    model, batch = random_model(config), inputs()

    @jax.jit
    def run(model, batch):
        out = forward(model, **batch)
        return logits(model, out.hidden_BTD), out.router

    ours, router = jax.device_get(run(model, batch))
    w = flat_weights(model)
    theirs, stats = transformer(w, config, **batch)
    real = batch.get("segment_ids_BT", np.ones_like(batch["tokens_BT"])) > 0
    assert_close(ours[real], theirs[real], 1e-5)
    assert theirs.std() > 0.3  # peaked, not vanishing

    assert (router is None) == (config.moe is None)
    for field in dataclasses.fields(stats[0]) if stats else ():
        expected = np.stack([getattr(s, field.name) for s in stats])
        np.testing.assert_allclose(getattr(router, field.name), expected, atol=1e-5, rtol=1e-5, err_msg=field.name)

    w |= {k.replace("_post_norm", "_norm"): x for k, x in w.items() if config.norm.placement == "post"}
    for path, value in mutations.items():
        cut = path == "moe.num_experts"  # use fewer of the experts' weights
        other = {k: x[:, :value] if cut and k.endswith("router") else x for k, x in w.items()}
        wrong, _ = transformer(other, changed(config, path, value), **batch)
        assert np.abs(wrong - ours)[real].max() > 1e-3, f"{path} = {value} makes no difference"


@pytest.mark.parametrize("name", ["gemma", "gpt-oss", "packed"])
def test_the_gradient_matches_the_slope_of_the_reference(name):
    config, inputs, _ = CASES[name]
    model, direction, batch = random_model(config), random_model(config, seed=5), inputs()
    real = batch.get("segment_ids_BT", np.ones_like(batch["tokens_BT"])) > 0

    def loss(model):
        out = forward(model, **batch)
        total = jnp.where(real[..., None], jnp.sin(logits(model, out.hidden_BTD)), 0).sum()
        return total if config.moe is None else total + (out.router.load_balance + out.router.z).sum()

    def reference_loss(step: float) -> float:
        w, d = flat_weights(model), flat_weights(direction)
        out, stats = transformer({k: x + step * d[k] for k, x in w.items()}, config, **batch)
        return np.sin(out)[real].sum() + sum(s.load_balance + s.z for s in stats)

    gradient = jax.tree.leaves(jax.jit(jax.grad(loss))(model))
    products = [np.vdot(g, d) for g, d in zip(gradient, jax.tree.leaves(direction), strict=True)]
    slope = (reference_loss(1e-5) - reference_loss(-1e-5)) / 2e-5
    np.testing.assert_allclose(sum(products), slope, rtol=1e-4, atol=1e-4 * np.linalg.norm(products))
