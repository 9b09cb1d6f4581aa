"""The experts, sorted, beside every expert on every token: equal values and gradients, nothing lost. The router."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from model import experts
from model.balance import router_stats as stats_of
from model.experts import expert_mlp
from model.moe_config import MoEConfig
from model.routers import route as choose_experts
from model.transformer import forward, logits
from pallas_kernels.grouped_matmul import xla
from tests.model.reference import feed_forward, router_stats
from tests.models import random_model, tiny_config

D, F = 8, 6
WEIGHTS = {True: "renormalized", False: "softmax"}


@partial(jax.jit, static_argnums=2)  # one program, not dozens of single operations
def route(logits_BTE, valid_BT, config):
    routing = choose_experts(logits_BTE, valid_BT, config)
    return routing.indices_BTC, routing.weights_BTC, stats_of(routing, routing.indices_BTC, valid_BT, config)


@partial(jax.jit, static_argnames=("kind", "implementation"))
def value_and_gradients(x, indices, weights, up, down, dy, kind, implementation):
    def f(x, weights, up, down):
        return expert_mlp(x, indices, weights, up, down, kind, implementation)

    y, pull = jax.vjp(f, x, weights, up, down)
    return y, pull(dy)


def choose(style: str, rng, N: int, C: int, E: int) -> np.ndarray:
    """Indices [N, C]; 'foreign' ones lie in [-E, 2E), of which [0, E) are here."""
    if style == "one":
        return np.full((N, C), rng.integers(E))
    if style == "few":  # most experts stay empty
        return rng.choice(rng.integers(0, E, 2), (N, C))
    if style == "foreign":
        return rng.integers(-E, 2 * E, (N, C))
    if style == "none":
        return np.full((N, C), E)
    return np.stack([rng.permutation(E)[:C] for _ in range(N)])


# Few shapes, as each is compiled; blocks of 4 and 2 rows put runs across, at and below block borders.
@pytest.mark.parametrize("N, C, E, kind", [(13, 2, 3, "swiglu"), (8, 1, 4, "relu2"), (1, 3, 5, "geglu")])
def test_sorted_and_dense_agree_with_the_formula(N, C, E, kind, monkeypatch):
    monkeypatch.setattr(xla, "BLOCKS", (4, 2))
    G = 2 if kind.endswith("glu") else 1

    @given(style=st.sampled_from(["any", "one", "few", "foreign", "none"]), seed=st.integers(0, 1000))
    @settings(max_examples=12, deadline=None)
    def check(style, seed):
        rng = np.random.default_rng(seed)
        indices = choose(style, rng, N, C, E).astype(np.int32)
        x, weights, up, down, dy = (
            rng.standard_normal(shape).astype(np.float32) for shape in [(N, D), (N, C), (E, D, G, F), (E, F, D), (N, D)]
        )
        expected = np.zeros((N, D))
        for n, c in np.ndindex(N, C):
            if 0 <= (e := indices[n, c]) < E:
                expected[n] += weights[n, c] * feed_forward(x[n : n + 1], up[e], down[e], kind)[0]
        results = {
            how: value_and_gradients(x, indices, weights, up, down, dy, kind, how)
            for how in ("dense", "reference", "xla")
        }
        scale = max(1.0, np.abs(expected).max())
        for how, (y, gradients) in results.items():
            np.testing.assert_allclose(y, expected, atol=1e-5 * scale, err_msg=how)
            for name, ours, oracle in zip(["x", "weights", "up", "down"], gradients, results["dense"][1], strict=True):
                tolerance = 1e-5 * max(1.0, np.abs(oracle).max())
                np.testing.assert_allclose(ours, oracle, atol=tolerance, err_msg=f"{how}: gradient of {name}")

    check()


def test_many_tokens_many_choices_and_the_way_for_many_experts():
    """Blocks of real size; more choices than are written out; so many pairs and experts that one integer holds not both."""
    rng = np.random.default_rng(0)
    for N, C, E in ((300, 2, 3), (40, experts.UNROLLED + 1, 12)):
        shapes = [(N, D), (N, C), (E, D, 2, F), (E, F, D), (N, D)]
        x, weights, up, down, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        for indices in (np.full((N, C), 1, np.int32), rng.integers(-1, E + 1, (N, C)).astype(np.int32)):
            dense, ours = (value_and_gradients(x, indices, weights, up, down, dy, "reglu", how) for how in ("dense", None))
            for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(ours), strict=True):
                np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_layout_is_the_stable_sort_by_expert():
    rng = np.random.default_rng(1)
    for E in (5, 2**29):  # the second does not fit one integer with the pair's number
        few = np.array([-3, 0, 2, 4, E - 1, E, E + 7])
        indices = rng.choice(few, (9, 3)).astype(np.int32)
        sorted_by = np.where((indices >= 0) & (indices < E), indices, E).ravel()
        pairs = np.argsort(sorted_by, kind="stable")
        if E == 5:
            plan = experts.layout(jnp.asarray(indices), E)
            np.testing.assert_array_equal(plan.sizes_E, np.bincount(sorted_by, minlength=E + 1)[:E])
        else:
            plan = jax.jit(lambda i: experts.layout(i, 2**29)._replace(sizes_E=None))(indices)
        np.testing.assert_array_equal(plan.pair_S, pairs)
        np.testing.assert_array_equal(np.asarray(plan.slot_NC).ravel()[pairs], np.arange(pairs.size))


@pytest.mark.parametrize("tokens, experts_read", [(1, 2), (3, 6)])
def test_bfloat16_sums_in_float32(tokens, experts_read):
    rng = np.random.default_rng(2)
    shapes = [(tokens, 64), (tokens, 2), (8, 64, 2, 32), (8, 32, 64)]
    x, weights, up, down = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    indices = jnp.arange(experts_read, dtype=jnp.int32).reshape(tokens, 2)
    exact = expert_mlp(*(y.astype(jnp.float32) for y in (x,)), indices, *(y.astype(jnp.float32) for y in (weights, up, down)), "swiglu", "dense")
    ours = expert_mlp(x, indices, weights, up, down, "swiglu")
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=8e-3 * np.abs(exact).max())


@given(
    shape=st.sampled_from([(2, 5, 4), (3, 3, 6)]),
    k=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
    scope=st.sampled_from(["batch", "sequence"]),
    renormalize=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_route_equals_the_reference(shape, k, seed, scope, renormalize):
    rng = np.random.default_rng(seed)
    x_BTE = 3 * rng.standard_normal(shape).astype(np.float32)
    valid_BT = rng.random(shape[:2]) < 0.7
    valid_BT[:, 0] = True
    config = MoEConfig(num_experts=shape[-1], top_k=k, balance_scope=scope, weights=WEIGHTS[renormalize])
    indices, weights, stats = route(jnp.asarray(x_BTE), jnp.asarray(valid_BT), config)
    order = np.argsort(-x_BTE, -1)[..., :k]
    np.testing.assert_array_equal(np.sort(indices, -1)[valid_BT], np.sort(order, -1)[valid_BT])
    np.testing.assert_array_equal(np.asarray(indices)[~valid_BT], shape[-1])
    p = np.exp(x_BTE) / np.exp(x_BTE).sum(-1, keepdims=True)
    p = np.take_along_axis(p, np.minimum(indices, shape[-1] - 1), -1)
    expected = p / p.sum(-1, keepdims=True) if renormalize else p
    np.testing.assert_allclose(np.asarray(weights)[valid_BT], expected[valid_BT], rtol=1e-5)
    chosen = np.zeros(shape)
    np.put_along_axis(chosen, order, 1, -1)
    expected = router_stats(x_BTE.astype(np.float64), chosen, valid_BT, config)
    np.testing.assert_allclose(stats.load_E.sum(), 1, rtol=1e-6)
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(stats, name), value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_balance_is_one_when_even_and_e_over_k_when_collapsed(scope):
    config = MoEConfig(num_experts=6, top_k=2, balance_scope=scope)
    valid = jnp.ones((2, 3), bool)
    # Token t prefers experts 2t and 2t + 1: each sequence of three uses every expert once.
    even = 5.0 * jnp.repeat(jnp.eye(3), 2, axis=1)[None].repeat(2, 0)
    np.testing.assert_allclose(route(even, valid, config)[2].load_balance, 1, rtol=1e-5)
    collapsed = jnp.zeros((2, 3, 6)).at[..., :2].set(50.0)
    np.testing.assert_allclose(route(collapsed, valid, config)[2].load_balance, 6 / 2, rtol=1e-5)


def test_router_losses_carry_gradients_and_the_load_does_not():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5))
    valid = jnp.ones((2, 4), bool)

    def gradient(name):
        return np.abs(jax.grad(lambda x: getattr(route(x, valid, MoEConfig(5, 2))[2], name).sum())(x)).max()

    assert gradient("load_balance") > 1e-3 and gradient("z") > 1e-3
    assert gradient("load_E") == 0


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("renormalize", [True, False])
def test_a_router_logit_that_is_not_finite_shows(poison, renormalize):
    x = np.array(jax.random.normal(jax.random.key(0), (1, 3, 5)))
    x[0, 1, 2] = poison
    _, weights, _ = route(jnp.asarray(x), jnp.ones((1, 3), bool), MoEConfig(5, 2, weights=WEIGHTS[renormalize]))
    assert not np.isfinite(weights[0, 1]).any()
    assert np.isfinite(weights[0, [0, 2]]).all()


def test_a_nan_in_the_router_reaches_the_logits():
    model = random_model(tiny_config(moe=MoEConfig(4, 2, 24, layers=("dense", "moe"))))
    router = model.stacks[1][0].mlp.router
    router[...] = router[...].at[0, 3, 1].set(jnp.nan)
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    out = jax.jit(lambda m, t: logits(m, forward(m, t).hidden_BTD))(model, tokens)
    assert not np.isfinite(out).any()
