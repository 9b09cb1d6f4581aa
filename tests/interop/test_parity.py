"""The MoE layer matches transformers' Mixtral, Qwen3-MoE, OLMoE and DeepSeek-V3 (tests/parity): outputs, choices,
losses and every gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.balance import load_balance, router_stats
from model.config import MLPConfig, ModelConfig
from model.moe import MoE
from model.moe_config import MoEConfig
from model.routers import route
from sharding.rules import ShardingRules
from tests.closeness import assert_close
from tests.models import context, weight_names
from tests.parity.cases import CASES, B, Case, D, T, draw, load

# Relative to the largest entry. Both sides are float32 and differ, with AVX2, AVX-512 and SSE4.2, by up to 3 units in
# the last place, or 7 in gradients of the balance loss.
CLOSE = 16 * 2.0**-23
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
TOKENS = context(jnp.zeros((B, T), jnp.int32), jnp.tile(jnp.arange(T), (B, 1)), jnp.ones((B, T), bool))


def ours(drawn: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Convert weights (or gradients) from transformers' layout to the names and layout of this project."""

    def fused(gate_FD, up_FD):
        return np.stack([gate_FD, up_FD]).transpose(2, 0, 1)  # [D, G, F]

    halves = np.split(drawn["gate_up"], 2, axis=1)
    weights = {
        "router": drawn["router"].T,
        "up": np.stack([fused(gate, up) for gate, up in zip(*halves, strict=True)]),
        "down": drawn["down"].transpose(0, 2, 1),
    }
    if "shared_up" in drawn:
        weights |= {"shared.up": fused(drawn["shared_gate"], drawn["shared_up"]), "shared.down": drawn["shared_down"].T}
    return weights


def layer(moe: MoEConfig, drawn: dict[str, np.ndarray]) -> MoE:
    """Return the layer of `moe` with the drawn weights, without compiling."""
    config = ModelConfig(embed_dim=D, mlp=MLPConfig("swiglu"), moe=moe, dtype="float32")
    abstract = jax.eval_shape(lambda: MoE(jax.random.key(0), config, ShardingRules()))
    weights = ours(drawn) | ({"router_bias": drawn["bias"]} if "bias" in drawn else {})
    leaves = [jnp.asarray(weights[name]) for name, _ in weight_names(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


@jax.jit
def apply(layer: MoE, x_BTD: jax.Array) -> jax.Array:
    return layer(x_BTD, TOKENS)[0]


@jax.jit
def apply_and_pull(layer: MoE, x_BTD: jax.Array, functional_BTD: jax.Array):
    y_BTD, pull = jax.vjp(lambda layer, x: layer(x, TOKENS)[0], layer, x_BTD)
    return y_BTD, *pull(functional_BTD)


@by_name
def test_outputs_and_gradients_match_transformers(case: Case):
    drawn, want = draw(case), load(case)
    # Dense dispatch compiles faster, and the dispatch tests compare the other paths with it.
    moe = case.moe if case.name in ("mixtral", "deepseek_v3") else replace(case.moe, dispatch="dense")
    y, d_layer, d_x = apply_and_pull(layer(moe, drawn), drawn["x"], drawn["functional"])
    assert_close(y, want["y"], CLOSE)
    assert_close(d_x, want["d_x"], CLOSE)
    wanted = ours({name.removeprefix("d_"): value for name, value in want.items() if name.startswith("d_")})
    found = dict(weight_names(d_layer))
    if "bias" in drawn:
        assert not np.any(found.pop("router_bias"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.abs(value).max() > 1e-2, f"{name}: the reference's gradient is too small to compare"
        assert_close(found[name], value, CLOSE, what=name)


@partial(jax.jit, static_argnums=3)  # one program, not dozens of single operations
def routed(logits_NE: jax.Array, valid_BT: jax.Array, bias_E: jax.Array | None, moe: MoEConfig):
    """Return the routing, and for each loss its value and its gradient with respect to the logits."""
    logits_BTE = logits_NE.reshape(B, T, -1)

    def losses(logits_BTE):
        routing = route(logits_BTE, valid_BT, moe, bias_E=bias_E)
        stats = router_stats(routing, routing.indices_BTC, valid_BT, moe)
        return (moe.top_k * stats.load_balance, stats.z), routing

    values, pull, routing = jax.vjp(losses, logits_BTE, has_aux=True)
    gradients = [pull(one)[0].reshape(logits_NE.shape) for one in ((1.0, 0.0), (0.0, 1.0))]
    return routing, dict(zip(("load_balance", "z"), zip(values, gradients, strict=True), strict=True))


@by_name
def test_choices_and_weights_match_transformers(case: Case):
    drawn, want = draw(case), load(case)
    routing, _ = routed(want["logits"], TOKENS.valid_BT, drawn.get("bias"), case.moe)
    order = np.argsort(routing.indices_BTC, axis=-1)
    indices, weights = (np.take_along_axis(np.asarray(y), order, -1).reshape(B * T, -1) for y in routing[:2])
    np.testing.assert_array_equal(indices, want["indices"])
    assert_close(weights, want["weights"], CLOSE)


@pytest.mark.parametrize(
    "case, wrong", [(c, w) for c in CASES for w in c.wrong], ids=lambda x: x.name if isinstance(x, Case) else str(x)
)
def test_a_wrong_option_changes_the_outputs(case: Case, wrong: dict):
    drawn = draw(case)
    if "bias_rate" in wrong:
        drawn.pop("bias")
    y_BTD = apply(layer(replace(case.moe, **wrong, dispatch="dense"), drawn), drawn["x"])  # compiles faster
    assert np.abs(y_BTD - load(case)["y"]).max() > 1e-3


@pytest.mark.parametrize(
    "case", [c for c in CASES if not c.moe.weights.startswith("sigmoid")], ids=lambda case: case.name
)
def test_balance_and_z_losses_match_transformers_up_to_a_factor(case: Case):
    """transformers sums over a token's choices, so its balance loss at perfect balance is top_k instead of 1."""
    drawn, want = draw(case), load(case)
    _, all_tokens = routed(want["logits"], TOKENS.valid_BT, None, case.moe)
    _, without_padding = routed(want["logits"], drawn["mask"], None, case.moe)
    found = all_tokens | {"load_balance_masked": without_padding["load_balance"]}
    for name, (value, gradient) in found.items():
        assert_close(value, want[name], CLOSE, what=name)
        assert np.abs(want[f"d_logits_{name}"]).max() > 1e-3
        assert_close(gradient, want[f"d_logits_{name}"], 2 * CLOSE, what=name)


@pytest.mark.parametrize("case", [c for c in CASES if c.name == "mixtral"], ids=lambda case: case.name)
def test_transformers_pools_layers_before_the_balance_product(case: Case):
    """transformers multiplies statistics summed over layers, while this project adds the layers' products."""
    want = load(case)
    layers = [want["logits"], want["logits_second"]]
    probs = [np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in layers]
    chosen = [np.eye(case.moe.num_experts)[np.argsort(-x, axis=-1)[:, : case.moe.top_k]].sum(1) for x in layers]
    count_LE, probs_LE = (jnp.asarray(np.stack([x.sum(0) for x in y]), jnp.float32) for y in (chosen, probs))
    tokens_L = jnp.full(2, B * T, jnp.float32)
    pooled = load_balance(count_LE.sum(0), probs_LE.sum(0), tokens_L.sum(), per="token")
    assert_close(pooled, want["load_balance_layers"], CLOSE)
    assert abs(load_balance(count_LE, probs_LE, tokens_L, per="token").mean() - pooled) > 1e-3
