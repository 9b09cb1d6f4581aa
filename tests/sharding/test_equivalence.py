"""Every sharding of a network over eight devices gives the loss and the gradients of one device."""

from __future__ import annotations

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import MLPConfig, ModelConfig, MoEConfig, NormConfig, PositionConfig
from model.transformer import Transformer, forward, logits
from sharding.mesh import MeshConfig, concrete_shardings, make_mesh, put_batch, use_mesh
from sharding.rules import ShardingRules
from tests.models import TINY_ATTENTION, random_model, tiny_config

RULES = ShardingRules()


def around(config: ModelConfig, context: str) -> ModelConfig:
    """Return `config` with another method for attention over sharded rows."""
    return replace(config, attention=replace(config.attention, context_parallel=context))


# Together, these two have every kind of weight.
DENSE = tiny_config(
    norm=NormConfig("layernorm", bias=True, placement="sandwich"),
    attention=replace(TINY_ATTENTION, bias="all", qk_norm="full", sinks=True),
    position=PositionConfig("learned"),
    mlp=MLPConfig("geglu", 48, bias=True),
)
SPARSE = tiny_config(
    attention=replace(TINY_ATTENTION, qk_norm="head", layers=("global", "sliding")),
    moe=MoEConfig(4, 2, 24, layers=("dense", "moe"), load_balance=0.1),
    tied_embeddings=True,
)
# Buffers so small that pairs need several rounds, and rematerialization.
ROUNDS = replace(SPARSE, remat="full", moe=replace(SPARSE.moe, all_to_all_buffer_factor=0.5))
GATHERED = replace(SPARSE, moe=replace(SPARSE.moe, all_to_all_buffer_factor=None))


def packed_batch() -> dict[str, np.ndarray]:
    """Return eight rows of 16 tokens, each with two segments and padding at the end."""
    rng = np.random.default_rng(0)
    ids, positions = np.zeros((2, 8, 16), np.int32)
    for b, cut in enumerate(rng.integers(3, 12, 8)):
        ids[b, :cut], ids[b, cut:14] = 1, 2
        positions[b] = np.concatenate([np.arange(cut), np.arange(16 - cut)])
    tokens = rng.integers(0, 64, (8, 16)).astype(np.int32)
    return {"tokens_BT": tokens, "segment_ids_BT": ids, "positions_BT": positions}


def loss(model: Transformer, batch: dict) -> jax.Array:
    out = forward(model, **batch)
    scores = logits(model, out.hidden_BTD)
    target = jax.nn.one_hot(batch["tokens_BT"], scores.shape[-1])
    nats = jax.nn.logsumexp(scores, axis=-1) - (scores * target).sum(-1)
    total = (nats * (batch["segment_ids_BT"] > 0)).sum() / (8 * 14)
    if out.router is not None:
        total += 0.1 * out.router.load_balance.sum() + 0.01 * out.router.z.sum()
    return total


@functools.cache
def alone(config: ModelConfig):
    """Return the loss and gradients of one device."""
    return jax.jit(jax.value_and_grad(loss))(random_model(config), packed_batch())


def without_a_mesh(config: ModelConfig) -> ModelConfig:
    """Return `config` with defaults for the fields that only affect a mesh or the memory of the backward pass."""
    moe = (
        config.moe
        if config.moe is None
        else replace(config.moe, all_to_all_buffer_factor=MoEConfig().all_to_all_buffer_factor)
    )
    return replace(around(config, "gather"), remat="none", moe=moe)


def on_mesh(config: ModelConfig, mesh) -> Transformer:
    """Return the network of `random_model` sharded on `mesh`, which must be the current mesh."""
    abstract = jax.eval_shape(lambda: Transformer(jax.random.key(0), config, RULES))
    shardings = [x.sharding for x in jax.tree.leaves(concrete_shardings(abstract, mesh))]
    weights = map(jax.device_put, map(np.asarray, jax.tree.leaves(random_model(config))), shardings)
    return jax.tree.unflatten(jax.tree.structure(abstract), weights)


slow = pytest.mark.slow
WAYS = [
    (DENSE, {"data": 2, "fsdp": 2, "tensor": 2}),
    (SPARSE, {"fsdp": 2, "expert": 2, "tensor": 2}),
    (ROUNDS, {"data": 2, "sequence": 2, "expert": 2, "fsdp": 1}),
    (around(DENSE, "ring"), {"fsdp": 2, "sequence": 4}),
    (around(SPARSE, "ulysses"), {"fsdp": 2, "sequence": 2, "tensor": 2}),
    *(
        pytest.param(config, axes, marks=slow)
        for config, axes in [
            (DENSE, {"data": 8, "fsdp": 1}),
            (DENSE, {"fsdp": 8}),
            (DENSE, {"fsdp": 4, "tensor": 2}),
            (DENSE, {"fsdp": 2, "sequence": 2, "tensor": 2}),
            (SPARSE, {"fsdp": 8}),
            (SPARSE, {"data": 2, "fsdp": 1, "expert": 4}),
            (ROUNDS, {"fsdp": 2, "expert": 4}),
            (GATHERED, {"fsdp": 2, "expert": 2, "tensor": 2}),
            (SPARSE, {"data": 2, "fsdp": 2, "tensor": 2}),
            (SPARSE, {"fsdp": 2, "sequence": 2, "tensor": 2}),
            (around(SPARSE, "ring"), {"fsdp": 1, "sequence": 4, "expert": 2}),
            (around(DENSE, "ulysses"), {"fsdp": 2, "sequence": 4}),
        ]
    ),
]


@pytest.mark.parametrize(
    "config, axes",
    WAYS,
    ids=lambda x: "".join(f"{k}{v}" for k, v in x.items()) if isinstance(x, dict) else x.attention.context_parallel,
)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(config, axes):
    batch = packed_batch()
    value, gradient = alone(without_a_mesh(config))
    mesh = make_mesh(MeshConfig(**axes))
    with use_mesh(mesh):
        model = on_mesh(config, mesh)
        spread = put_batch(batch, mesh, RULES.spec("activations", ("batch", None)))
        value_2, gradient_2 = jax.jit(jax.value_and_grad(loss))(model, spread)
    np.testing.assert_allclose(value_2, value, rtol=1e-5)
    named, _ = jax.tree_util.tree_flatten_with_path(gradient_2)
    split = 0
    for (path, g), w, one in zip(named, jax.tree.leaves(model), jax.tree.leaves(gradient), strict=True):
        name = jax.tree_util.keystr(path)
        assert g.sharding == w.sharding, name
        split += not w.sharding.is_fully_replicated
        assert np.abs(one).max() > 1e-6, f"{name} has no gradient: the comparison proves nothing"
        np.testing.assert_allclose(g, one, atol=1e-5 * np.abs(one).max(), rtol=0, err_msg=name)
    assert split > 0 or axes.get("data") == 8


def test_initial_values_do_not_depend_on_the_mesh():
    config = tiny_config(moe=MoEConfig(2, 1, 8))

    def init(key):
        return Transformer(key, config, RULES)

    alone = jax.jit(init)(jax.random.key(3))
    with use_mesh(make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))):
        spread = jax.jit(init)(jax.random.key(3))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_array_equal(a, b)
    first, second = alone.stacks[0][0].attention.q.value
    assert jnp.abs(first - second).max() > 0.1  # each layer has a separate draw
    attention = alone.stacks[0][0].attention
    expected = {  # 1 / sqrt(inputs), and another 1 / sqrt(2 layers) into the residual stream
        "q": (attention.q, 32**-0.5),
        "out": (attention.out, (32 * 4) ** -0.5),
        "head": (alone.head, 32**-0.5),
        "embedding": (alone.embedding, 0.02),
    }
    for name, (weight, std) in expected.items():
        np.testing.assert_allclose(jnp.std(weight.value), std, rtol=0.1, err_msg=name)


def test_rows_over_two_mesh_axes_are_refused_by_the_ring():
    config = around(DENSE, "ring")
    rules = replace(RULES, activations=replace(RULES.activations, batch=("data",), sequence=("sequence", "expert")))
    with use_mesh(make_mesh(MeshConfig(data=2, fsdp=1, sequence=2, expert=2))):
        model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config, rules))
        with pytest.raises(ValueError, match=r"context_parallel = 'ring'.*Name one axis"):
            jax.eval_shape(lambda model: forward(model, jnp.zeros((8, 16), jnp.int32)), model)
