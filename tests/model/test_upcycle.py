"""Upcycling: a network with experts gives the logits of its dense network, and configs that prevent this are
refused."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig, NormConfig
from model.routers import route
from model.transformer import Transformer, forward, logits
from model.upcycle import upcycle
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.closeness import assert_close
from tests.models import TINY_ATTENTION, random_model, tiny_config, weight_names

RULES = ShardingRules()
DENSE = tiny_config(mlp=MLPConfig(hidden_dim=48))
BIASED = replace(DENSE, mlp=MLPConfig(hidden_dim=48, bias=True))
DEEP = tiny_config(
    num_layers=5,
    tied_embeddings=True,
    norm=NormConfig("layernorm", bias=True, placement="sandwich"),
    attention=replace(TINY_ATTENTION, qk_norm="head", sinks=True, layers=("global", "sliding")),
    mlp=MLPConfig("relu2", 48),
)
FINE = MoEConfig(num_experts=8, top_k=4, hidden_dim=24)
tokens_BT = np.random.default_rng(0).integers(0, 64, (2, 17)).astype(np.int32)


@jax.jit
def predict(model: Transformer) -> jax.Array:
    return logits(model, forward(model, tokens_BT).hidden_BTD)


def with_experts(dense: ModelConfig, moe: MoEConfig, seed: int = 1) -> Transformer:
    config = replace(dense, moe=moe)
    return jax.jit(lambda model: upcycle(model, config, jax.random.key(seed), RULES))(random_model(dense))


@pytest.mark.parametrize(
    "dense, moe",
    [
        (DENSE, MoEConfig(num_experts=4, top_k=2, hidden_dim=48)),
        (DENSE, MoEConfig(num_experts=4, top_k=2, hidden_dim=48, router="hash", dispatch="dense", scale=0.5)),
        # Dense and MoE layers in a scanned unit and after it; shards of an MLP without gates.
        (DEEP, MoEConfig(num_experts=12, top_k=6, hidden_dim=16, layers=("dense", "moe"), dispatch="dense")),
        (
            BIASED,
            replace(FINE, weights="sigmoid_renormalized", scale=2.5, groups=(2, 1), bias_rate=0.01, dispatch="dense"),
        ),
        (DENSE, replace(FINE, router="dense", top_k=8, dispatch="dense")),
    ],
    ids=["copies", "hash", "mixed_layers", "deepseek", "dense_router"],
)
def test_logits_match_the_dense_network(dense, moe):
    want = predict(random_model(dense))
    assert np.abs(want).max() > 0.5
    # The measured error was 5 units in the last place of the largest logit (23): the sum over an MLP's hidden width is
    # regrouped into one sum per expert.
    assert_close(predict(with_experts(dense, moe)), want, 16 * 2.0**-23)


def test_a_fine_grained_router_chooses_complete_copies_of_the_mlp():
    layer = with_experts(DENSE, FINE).stacks[0][0].mlp
    router_DE = layer.router.value[1]  # router of the second layer of the stack
    x_BTD = np.random.default_rng(2).standard_normal((2, 50, 32)).astype(np.float32)
    x_BTD[0, :7] = 0  # all the logits tie
    indices_BTC = np.asarray(route(x_BTD @ router_DE, jnp.ones((2, 50), bool), layer.config.moe).indices_BTC)
    assert len(np.unique(indices_BTC)) == 8, "every expert is in use"
    copies = np.sort(indices_BTC, -1).reshape(2, 50, 2, 2)
    assert np.all(copies[..., 0] % 2 == 0) and np.all(copies[..., 1] == copies[..., 0] + 1)


def test_routers_are_drawn_and_other_weights_are_copied():
    model, other = dict(weight_names(with_experts(DENSE, FINE))), dict(weight_names(with_experts(DENSE, FINE, seed=2)))
    router_RDE = model["stacks.0.0.mlp.router"]
    assert len(np.unique(router_RDE)) == router_RDE.size / 2, "only the two shards of a copy share a column"
    assert 0.8 < np.std(router_RDE) * 32**0.5 < 1.2
    changed = [name for name in model if not np.array_equal(model[name], other[name])]
    assert changed == ["stacks.0.0.mlp.router"]
    dense = dict(weight_names(random_model(DENSE)))
    for name in dense.keys() - {"stacks.0.0.mlp.up", "stacks.0.0.mlp.down"}:
        np.testing.assert_array_equal(model[name], dense[name], err_msg=name)


def test_upcycling_on_a_mesh_gives_the_same_weights_and_the_usual_sharding():
    config, want = replace(DENSE, moe=FINE), with_experts(DENSE, FINE)
    with use_mesh(make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))):
        usual = jax.eval_shape(lambda: Transformer(jax.random.key(0), config, RULES))
        layout = jax.eval_shape(lambda: Transformer(jax.random.key(0), DENSE, RULES))
        dense = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding.spec), random_model(DENSE), layout)
        model = jax.jit(lambda dense: upcycle(dense, config, jax.random.key(1), RULES))(dense)
    for (name, weight), (_, like), (_, value) in zip(*map(weight_names, (model, usual, want)), strict=True):
        assert weight.sharding.spec == like.sharding.spec, name
        np.testing.assert_array_equal(weight, value, err_msg=name)


@pytest.mark.parametrize(
    "change, names",
    [
        ({"moe": None}, ["model.moe = none"]),
        ({"moe": replace(FINE, shared_experts=1)}, ["model.moe.shared_experts = 1", "Set it to 0"]),
        ({"moe": replace(FINE, capacity_factor=1.5)}, ["model.moe.capacity_factor = 1.5", "none"]),
        ({"moe": replace(FINE, weights="softmax")}, ["model.moe.weights = 'softmax'", "renormalized"]),
        (
            {"moe": MoEConfig(hidden_dim=48, top_k=1, weights="softmax")},
            ["model.moe.weights = 'softmax'", "model.moe.top_k = 2"],
        ),
        ({"moe": replace(FINE, router="switch", top_k=1)}, ["model.moe.router = 'switch'", "top_k"]),
        ({"moe": replace(FINE, router="hash")}, ["model.moe.router = 'hash'", "of width 48"]),
        ({"moe": replace(FINE, hidden_dim=20)}, ["model.moe.hidden_dim = 20", "48, 24, 16, 12"]),
        ({"moe": replace(FINE, num_experts=7)}, ["model.moe.num_experts = 7", "like 8"]),
        ({"moe": replace(FINE, top_k=3)}, ["model.moe.top_k = 3", "like 4"]),
        ({"moe": replace(FINE, groups=(8, 4))}, ["model.moe.groups = (8, 4)", "(1, 1)"]),
        (
            {"moe": FINE, "mlp": MLPConfig(hidden_dim=48, bias=True)},
            ["model.mlp = ", "upcycling changes model.moe alone"],
        ),
        ({"moe": FINE, "attention": AttentionConfig()}, ["model.attention = "]),
    ],
)
def test_configs_that_change_the_logits_are_refused_by_name(change, names):
    with pytest.raises(ValueError) as refused:
        upcycle(random_model(DENSE), replace(DENSE, **change), jax.random.key(0), RULES)
    assert all(name in str(refused.value) for name in names), refused.value


def test_only_dense_networks_can_be_upcycled():
    sparse = replace(DENSE, moe=FINE)
    with pytest.raises(ValueError, match=r"has experts already"):
        upcycle(random_model(sparse), sparse, jax.random.key(0), RULES)
