"""Load balance: both conventions of the loss, its scopes, router statistics, and the bias that balances without a
loss."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from model.balance import co_activation, load_balance, max_violation, saturation, update_bias, update_biases, z_loss
from model.balance import router_stats as stats_of
from model.moe_config import MoEConfig
from model.routers import Routing, route
from model.transformer import forward
from model.weights import named_weights
from tests.model.reference import router_stats, softmax
from tests.models import random_model, tiny_config, weight_names
from train.config import OptimizerConfig
from train.optimizers import make_optimizer


@partial(jax.jit, static_argnames=("config", "slices"))  # one program, not dozens of single operations
def stats(logits_BTE, valid_BT, config, slices=1):
    routing = route(logits_BTE, valid_BT, config)
    return stats_of(routing, routing.indices_BTC, valid_BT, config, slices)


@given(
    shape=st.sampled_from([(2, 5, 4), (3, 3, 6)]),
    k=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
    scope=st.sampled_from(["batch", "sequence"]),
)
@settings(max_examples=15, deadline=None)
def test_losses_and_statistics_equal_the_reference(shape, k, seed, scope):
    rng = np.random.default_rng(seed)
    x_BTE = 3 * rng.standard_normal(shape).astype(np.float32)
    valid_BT = rng.random(shape[:2]) < 0.7
    valid_BT[:, 0] = True
    config = MoEConfig(num_experts=shape[-1], top_k=k, balance_scope=scope)
    ours = stats(x_BTE, valid_BT, config)
    chosen = np.zeros(shape)
    np.put_along_axis(chosen, np.argsort(-x_BTE, -1)[..., :k], 1, -1)
    expected = router_stats(x_BTE.astype(np.float64), chosen, valid_BT, config)
    np.testing.assert_allclose(ours.load_E.sum(), 1, rtol=1e-6)
    for name, value in vars(expected).items():
        np.testing.assert_allclose(getattr(ours, name), value, rtol=1e-5, atol=1e-6, err_msg=name)
    padding = np.where(valid_BT[..., None], x_BTE, np.nan)  # padding may have any value
    again = stats(padding, valid_BT, config)
    for name in expected.__dict__:
        np.testing.assert_array_equal(getattr(again, name), getattr(ours, name), err_msg=name)


@pytest.mark.parametrize("scope", ["batch", "device", "sequence"])
def test_balance_is_one_when_even_and_e_over_k_when_collapsed(scope):
    config = MoEConfig(num_experts=6, top_k=2, balance_scope=scope)
    valid = jnp.ones((2, 3), bool)
    # Token t prefers experts 2t and 2t + 1: each sequence of three uses every expert once.
    even = 5.0 * jnp.repeat(jnp.eye(3), 2, axis=1)[None].repeat(2, 0)
    np.testing.assert_allclose(stats(even, valid, config, 2).load_balance, 1, rtol=1e-5)
    collapsed = jnp.zeros((2, 3, 6)).at[..., :2].set(50.0)
    np.testing.assert_allclose(stats(collapsed, valid, config, 2).load_balance, 6 / 2, rtol=1e-5)
    # Switch (Fedus et al. 2021, eq. 4): the loss is alpha at uniform routing for any choices.
    np.testing.assert_allclose(stats(jnp.zeros((2, 3, 6)), valid, config, 2).load_balance, 1, rtol=1e-6)


def test_the_loss_of_transformers_is_k_at_balance():
    """load_balancing_loss_func by hand: layers pooled, E * sum over k and e of mean mask * mean probability."""
    L, N, E, k = 2, 7, 4, 3
    rng = np.random.default_rng(0)
    p = softmax(rng.standard_normal((L, N, E)))
    top = np.argsort(-p, -1)[..., :k]
    mask = (top[..., None] == np.arange(E)).reshape(L * N, k, E)
    theirs = E * (mask.mean(0) * p.reshape(L * N, E).mean(0)).sum()
    counts, sums, total = (jnp.asarray(x, jnp.float32) for x in (mask.sum((0, 1)), p.sum((0, 1)), L * N))
    ours = load_balance(counts, sums, total, per="token")
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_allclose(load_balance(counts, sums, total), theirs / k, rtol=1e-6)
    even, tokens = jnp.full(E, 5.0), jnp.float32(4 * 5 / k)
    np.testing.assert_allclose(load_balance(even, even / k, tokens, per="token"), k, rtol=1e-6)
    np.testing.assert_allclose(load_balance(even, even / k, tokens), 1, rtol=1e-6)


def test_each_scope_balances_its_own_tokens():
    """Each row uses only two experts: unbalanced per row, but balanced over pairs of rows and over the batch."""
    config = MoEConfig(4, 2, balance_scope="sequence")
    x = np.full((4, 5, 4), -9.0, np.float32)
    x[[0, 2], :, :2] = x[[1, 3], :, 2:] = 9.0
    valid = np.ones((4, 5), bool)
    by_scope = {
        (scope, slices): float(stats(x, valid, MoEConfig(4, 2, balance_scope=scope), slices).load_balance)
        for scope, slices in (("sequence", 1), ("device", 4), ("device", 2), ("device", 1), ("batch", 4))
    }
    assert by_scope == pytest.approx(
        {("sequence", 1): 2, ("device", 4): 2, ("device", 2): 1, ("device", 1): 1, ("batch", 4): 1}, rel=1e-4
    )
    with pytest.raises(ValueError, match="4 rows do not divide into the 3 devices"):
        stats(x, valid, MoEConfig(4, 2, balance_scope="device"), 3)
    # A row of padding has no weight.
    valid[3] = False
    np.testing.assert_allclose(stats(x, valid, config).load_balance, 2, rtol=1e-4)


def test_the_sequence_loss_matches_equations_17_to_20_of_deepseek_v3():
    E, k, T = 6, 2, 9
    config = MoEConfig(E, k, weights="sigmoid_renormalized", balance_scope="sequence")
    x = np.random.default_rng(0).standard_normal((1, T, E)).astype(np.float32)
    s = 1 / (1 + np.exp(-x[0].astype(np.float64)))
    chosen = np.stack([np.isin(np.arange(E), np.argsort(-row)[:k]) for row in s])
    f, P = E / (k * T) * chosen.sum(0), (s / s.sum(1, keepdims=True)).mean(0)
    np.testing.assert_allclose(stats(x, np.ones((1, T), bool), config).load_balance, (f * P).sum(), rtol=1e-5)


def test_router_losses_carry_gradients_and_the_load_does_not():
    x = jax.random.normal(jax.random.key(0), (2, 4, 5))
    valid = jnp.ones((2, 4), bool)

    @partial(jax.jit, static_argnums=0)
    def gradient(name):
        return jnp.abs(jax.grad(lambda x: getattr(stats(x, valid, MoEConfig(5, 2)), name).sum())(x)).max()

    assert gradient("load_balance") > 1e-3 and gradient("z") > 1e-3
    assert gradient("load_E") == gradient("entropy") == gradient("confidence") == 0


def test_the_gradient_of_the_balance_flows_through_the_probabilities_alone():
    counts, tokens = jnp.array([3.0, 1.0, 2.0]), jnp.array(3.0)
    of_counts, of_probs = jax.jit(jax.grad(load_balance, argnums=(0, 1)))(counts, jnp.array([0.5, 1.5, 1.0]), tokens)
    np.testing.assert_array_equal(of_counts, 0)
    np.testing.assert_allclose(of_probs, 3 * counts / 6 / 3, rtol=1e-6)


def test_z_loss_and_its_gradient_match_the_formula():
    valid = jnp.ones((1, 1), bool)

    @jax.jit
    def loss(x):
        return z_loss(jax.nn.logsumexp(x, axis=-1), valid)

    np.testing.assert_allclose(loss(jnp.zeros((1, 1, 8))), 4.3241, rtol=1e-4)
    x = jnp.array([[[1.0, -2.0, 0.5]]])
    lse = np.log(np.exp(np.asarray(x, np.float64)).sum())
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), 2 * lse * softmax(np.asarray(x, np.float64)), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- statistics


def test_max_violation_is_0_at_balance_and_e_over_k_minus_1_at_collapse():
    load = jnp.array([[0.25] * 4, [0.5, 0.5, 0, 0], [1, 0, 0, 0], [0.4, 0.3, 0.2, 0.1]])
    np.testing.assert_allclose(max_violation(load), [0, 1, 3, 0.6], atol=1e-6)


def test_saturation_and_co_activation_match_hand_counts():
    early = jnp.array([[0, 1], [2, 3], [0, 2], [1, 3]])
    late = jnp.array([[1, 0], [2, 0], [4, 1], [1, 3]])  # 4: dropped
    assert saturation(late, late, 4) == 1 and saturation(early, late, 4) == pytest.approx(5 / 7)
    assert saturation(early, late, 4, jnp.array([True, True, False, False])) == pytest.approx(3 / 4)
    expected = np.array([[1, 1 / 2, 1 / 2, 0], [1 / 3, 1, 0, 1 / 3], [1, 0, 1, 0], [0, 1, 0, 1]])
    np.testing.assert_allclose(co_activation(late, 4), expected, rtol=1e-6)
    np.testing.assert_allclose(co_activation(late, 4, jnp.array([True, False, False, False]))[2:], 0)


# ---------------------------------------------------------------------------------------------------- the bias

BIASED = tiny_config(
    num_layers=5,
    moe=MoEConfig(
        4,
        2,
        24,
        layers=("dense", "moe", "moe", "moe", "moe"),
        weights="sigmoid_renormalized",
        bias_rate=0.25,
        shared_experts=1,
    ),
    attention=tiny_config().attention.__class__(
        num_heads=2, num_kv_heads=1, head_dim=8, layers=("global", "sliding", "global", "sliding", "global")
    ),
)


def biases(model) -> dict[str, np.ndarray]:
    return {name: np.asarray(x) for name, x in weight_names(model) if name.endswith("router_bias")}


def test_biases_move_by_the_sign_of_the_load_layer_by_layer():
    """Stacked layers keep their order, and only the biases change."""
    model = random_model(BIASED)
    assert len(biases(model)) > 1 and any(x.shape[0] > 1 for x in biases(model).values()), "stacks of several layers"
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    run = jax.jit(lambda m: forward(m, tokens).router.load_E)
    moved = update_biases(model, run(model), BIASED.moe)
    for name, before in biases(model).items():
        change = np.abs(biases(moved)[name] - before)
        assert np.all(np.isclose(change, 0.25) | (change == 0)) and change.max() > 0
    for (name, a), (_, b) in zip(weight_names(model), weight_names(moved), strict=True):
        assert name.endswith("router_bias") or a is b or (np.asarray(a) == np.asarray(b)).all()
    # Overload expert l of MoE layer l by hand: the same layer in `forward` must stop using it.
    load = np.full((4, 4), 0.2, np.float32)
    load[np.arange(4), np.arange(4)] = 0.4
    far = model
    for _ in range(12):
        far = update_biases(far, jnp.asarray(load), BIASED.moe)
    after = np.asarray(run(far))
    assert (after[np.arange(4), np.arange(4)] == 0).all() and (after[~np.eye(4, dtype=bool)] > 0).all()


def test_a_rate_of_0_returns_the_same_model():
    model = random_model(tiny_config(moe=MoEConfig(4, 2, 24, bias_rate=0.0)))
    assert update_biases(model, jnp.zeros((2, 4)), model.config.moe) is model


def test_the_bias_balances_a_skewed_router():
    """A toy version of Wang et al. 2024: fixed tokens, skewed preferences, and updates of the bias only."""
    config = MoEConfig(8, 2, weights="sigmoid", bias_rate=0.01)
    x = jax.random.normal(jax.random.key(0), (4, 100, 8)) + jnp.linspace(-1.5, 1.5, 8)
    valid = jnp.ones((4, 100), bool)

    @jax.jit
    def loads(x):
        def step(bias_E, _):
            routing: Routing = route(x, valid, config, bias_E=bias_E)
            load_E = stats_of(routing, routing.indices_BTC, valid, config).load_E
            return update_bias(bias_E, load_E, config.bias_rate), load_E

        return jax.lax.scan(step, jnp.zeros(8), length=150)[1]

    violation = np.asarray(max_violation(loads(x)))
    assert violation[0] > 1 and violation[-20:].max() < 0.15


def test_the_bias_has_no_gradient():
    config = MoEConfig(8, 3, weights="sigmoid_renormalized", groups=(4, 2), bias_rate=0.1)
    x, valid = jax.random.normal(jax.random.key(0), (2, 5, 8)), jnp.ones((2, 5), bool)

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(x, bias_E):
        routing = route(x, valid, config, bias_E=bias_E)
        out = stats_of(routing, routing.indices_BTC, valid, config)
        return (routing.weights_BTC * jnp.arange(3)).sum() + out.load_balance + out.z

    of_x, of_bias = gradients(x, 0.1 * jnp.arange(8.0))
    assert (of_bias == 0).all() and (of_x != 0).any()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_no_optimizer_changes_the_bias(name):
    """Neither weight decay nor a gradient changes the bias; all other weights change."""
    config = tiny_config(num_layers=1, moe=MoEConfig(4, 2, 24, weights="sigmoid", bias_rate=0.1, shared_experts=1))
    model = random_model(config)
    optimizer = make_optimizer(OptimizerConfig(name=name, decay="all", warmup_steps=0, weight_decay=0.5), config, 10)
    updates = jax.jit(lambda g, m: optimizer.update(g, optimizer.init(m), m)[0])(random_model(config, seed=1), model)
    for weight, x in weight_names(updates):
        assert (np.asarray(x) == 0).all() == weight.endswith("router_bias"), weight


def test_shared_experts_are_matrices_and_the_noise_is_a_router():
    model = random_model(tiny_config(moe=MoEConfig(4, 2, 24, router="noisy_top_k", shared_experts=2)))
    roles = {weight.name: weight.role for _, weight in named_weights(model)}
    assert roles["shared.up"] == roles["shared.down"] == "matrix" and roles["mlp.router_noise"] == "router"
