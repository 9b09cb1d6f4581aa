"""Every router against its paper's formula in float64 NumPy, one token at a time; causality; effects of a NaN.

Shapes: B batch, T time, D width, E experts, C choices of a token.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from model.balance import router_stats
from model.capacity import positions_in_experts
from model.moe import MoE
from model.moe_config import MoEConfig
from model.routers import SINKHORN_ITERATIONS, draw, noisy_input, route
from model.soft import soft_moe
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.closeness import assert_close
from tests.model.reference import feed_forward, softmax
from tests.models import context, expert_weights, random_weight, tiny_config, weight_names

B, T, E = 2, 6, 6
KEY = jax.random.key(7)


@partial(jax.jit, static_argnames="config")  # one program per config instead of dozens of operations
def routed(config, logits_BTE, valid_BT, bias_E=None, noise_BTE=None, ids_BT=None, positions_BT=None, key=None):
    return route(
        logits_BTE,
        valid_BT,
        config,
        bias_E=bias_E,
        noise_BTE=noise_BTE,
        ids_BT=ids_BT,
        positions_BT=positions_BT,
        key=key,
    )


def some(seed: int, shape=(B, T, E)) -> tuple[np.ndarray, np.ndarray]:
    """Return (logits, a mask of valid tokens, which always include the first of each row)."""
    rng = np.random.default_rng(seed)
    valid = rng.random(shape[:2]) < 0.7
    valid[:, 0] = True
    return 3 * rng.standard_normal(shape).astype(np.float32), valid


def where(shape=(B, T)) -> dict[str, np.ndarray]:
    """Return the ids and positions of tokens."""
    ids = np.random.default_rng(0).integers(0, 1000, shape).astype(np.int32)
    return {"ids_BT": ids, "positions_BT": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)}


def as_weights(routing) -> np.ndarray:
    """Return [B, T, E]: the weight of each expert, 0 if it was not chosen. Assert that no expert is chosen twice."""
    out = np.zeros((*routing.indices_BTC.shape[:2], E + 1))
    for b, t, c in np.ndindex(routing.indices_BTC.shape):
        e = int(routing.indices_BTC[b, t, c])
        assert e == E or out[b, t, e] == 0, "an expert twice"
        out[b, t, e] = routing.weights_BTC[b, t, c]
    return out[..., :E]


def best(x: np.ndarray, k: int) -> list[int]:
    return list(np.argsort(-x, kind="stable")[:k])


# ---------------------------------------------------------------------------------------------- one token at a time


def choose_top_k(x, bias, m: MoEConfig) -> dict[int, float]:
    """Return {expert: weight} for one token's float64 logits."""
    sigmoid = m.weights.startswith("sigmoid")
    value = 1 / (1 + np.exp(-x)) if sigmoid else softmax(x)
    ranked = (x if m.weights == "softmax_top_k" else value) + bias
    groups, used = m.groups
    parts = ranked.reshape(groups, -1)
    group_scores = np.array([sum(sorted(part)[-2:]) if sigmoid else max(part) for part in parts])
    for g in set(range(groups)) - set(best(group_scores, used)):
        ranked[g * parts.shape[1] : (g + 1) * parts.shape[1]] = -np.inf
    chosen = best(ranked, m.top_k)
    if m.weights == "softmax_top_k":
        weight = softmax(x[chosen])
    else:
        weight = value[chosen]
        if m.weights.endswith("renormalized"):
            weight = weight / weight.sum()
    return dict(zip(chosen, m.scale * weight, strict=True))


@pytest.mark.parametrize(
    ("weights", "k", "fields"),
    [
        ("softmax", 1, {}),
        ("softmax", 3, {"groups": (3, 2)}),
        ("renormalized", 3, {"scale": 2.0}),
        ("softmax_top_k", 3, {}),
        ("sigmoid", 2, {}),
        ("sigmoid_renormalized", 3, {"scale": 2.5, "groups": (2, 1)}),
        ("sigmoid_renormalized", 2, {"groups": (3, 2)}),
    ],
)
def test_top_k_matches_the_formula(weights, k, fields):
    config = MoEConfig(E, k, weights=weights, bias_rate=0.1, **fields)
    config.validate(causal=True)

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=15, deadline=None)
    def check(seed):
        x, valid = some(seed)
        bias = np.random.default_rng(seed + 1).standard_normal(E).astype(np.float32)
        routing = routed(config, x, valid, bias)
        expected = np.zeros((B, T, E))
        for b, t in zip(*np.nonzero(valid), strict=True):
            for e, weight in choose_top_k(x[b, t].astype(np.float64), bias.astype(np.float64), config).items():
                expected[b, t, e] = weight
        np.testing.assert_allclose(as_weights(routing), expected, rtol=2e-5, atol=1e-7)
        assert (np.asarray(routing.indices_BTC)[~valid] == E).all()
        score = 1 / (1 + np.exp(-x.astype(np.float64)))
        probs = score / score.sum(-1, keepdims=True) if "sigmoid" in weights else softmax(x.astype(np.float64))
        np.testing.assert_allclose(routing.probs_BTE, probs, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(routing.log_total_BT, np.log(np.exp(x).sum(-1)), rtol=1e-5, atol=1e-5)

    check()


def test_groups_and_bias_match_deepseek_v3():
    """A group's score is the sum of its two best biased scores. The bias affects the choice but not the weights."""
    config = MoEConfig(E, 2, weights="sigmoid_renormalized", groups=(3, 1), bias_rate=0.1)
    x = np.full((1, 1, E), -9.0, np.float32)
    x[0, 0] = [1.2, -9.0, 1.0, 1.0, 0.0, 0.0]  # group 0 has the best expert, group 1 the best pair
    valid = np.ones((1, 1), bool)
    assert set(np.ravel(routed(config, x, valid, np.zeros(E, np.float32)).indices_BTC)) == {2, 3}
    of_softmax = dataclasses.replace(config, weights="softmax")  # DeepSeek-V2: only the best one counts
    assert set(np.ravel(routed(of_softmax, x, valid, np.zeros(E, np.float32)).indices_BTC)) == {0, 1}
    bias = np.array([0, 0, 0, 0, 0.5, 0.75], np.float32)
    routing = routed(config, x, valid, bias)
    assert np.ravel(routing.indices_BTC).tolist() == [5, 4]
    np.testing.assert_array_equal(np.ravel(routing.weights_BTC), [0.5, 0.5])
    # A bias that makes all scores negative does not admit experts of other groups.
    routing = routed(config, x, valid, np.full(E, -5, np.float32))
    assert set(np.ravel(routing.indices_BTC)) == {2, 3}


def test_softmax_over_the_chosen_equals_the_renormalized_softmax():
    x, valid = some(0)
    a, b = (routed(MoEConfig(E, 3, weights=form), x, valid) for form in ("renormalized", "softmax_top_k"))
    np.testing.assert_array_equal(a.indices_BTC, b.indices_BTC)
    np.testing.assert_allclose(a.weights_BTC, b.weights_BTC, rtol=2e-6)


def test_a_bias_may_choose_experts_of_zero_probability():
    x = np.zeros((1, 1, E), np.float32)
    x[..., 0] = 500.0
    bias = np.array([-9, 0, 0, 0, 0, 0], np.float32)
    assert np.isfinite(routed(MoEConfig(E, 2, bias_rate=0.1), x, np.ones((1, 1), bool), bias).weights_BTC).all()


def test_switch_dense_and_gshard_match_their_formulas_without_a_key():
    x, valid = some(1)
    p = softmax(x.astype(np.float64))
    for router, k in (("switch", 1), ("dense", E), ("gshard", 2)):
        expected = np.zeros((B, T, E))
        for b, t in zip(*np.nonzero(valid), strict=True):
            top = best(p[b, t], k)
            expected[b, t, top] = p[b, t, top] / (p[b, t, top].sum() if router == "gshard" else 1)
        config = MoEConfig(E, k, router=router)
        config.validate(causal=True)
        np.testing.assert_allclose(as_weights(routed(config, x, valid)), expected, rtol=1e-5, atol=1e-8, err_msg=router)


def test_gshard_keeps_the_second_expert_with_twice_its_weight_as_probability():
    tokens = 4000
    for gap in (0.5, 2.0):
        x = np.full((1, tokens, 4), -20.0, np.float32)
        x[..., 2], x[..., 1] = gap, 0.0
        routing = routed(MoEConfig(4, 2, router="gshard"), x, np.ones((1, tokens), bool), key=KEY)
        g2 = 1 / (1 + np.exp(gap))
        chance = min(1, 2 * g2)
        kept = np.asarray(routing.indices_BTC)[..., 1] == 1
        assert abs(kept.mean() - chance) < 4 * (chance * (1 - chance) / tokens) ** 0.5
        assert (np.asarray(routing.indices_BTC)[..., 1][~kept] == 4).all()
        np.testing.assert_allclose(np.asarray(routing.weights_BTC)[..., 0], 1 - g2, rtol=1e-5)  # not raised to 1
        np.testing.assert_allclose(np.asarray(routing.weights_BTC)[..., 1], np.where(kept, g2, 0), rtol=1e-5)


def test_noisy_top_k_matches_equations_3_to_5():
    config = MoEConfig(E, 2, router="noisy_top_k")
    x, valid = some(2)
    scale = np.random.default_rng(3).standard_normal((B, T, E)).astype(np.float32)
    n = np.asarray(jax.random.normal(KEY, (B, T, E)), np.float64)
    for key, noisy in ((KEY, x + n * np.log1p(np.exp(scale))), (None, x)):
        expected = np.zeros((B, T, E))
        for b, t in zip(*np.nonzero(valid), strict=True):
            top = best(noisy[b, t], 2)
            expected[b, t, top] = softmax(noisy[b, t, top].astype(np.float64))
        routing = routed(config, x, valid, noise_BTE=scale, key=key)
        np.testing.assert_allclose(as_weights(routing), expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(routing.probs_BTE, softmax(x.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("factor", [None, 2.0])
def test_expert_choice_takes_the_best_tokens_of_each_expert(factor):
    config = MoEConfig(E, 2, router="expert_choice", capacity_factor=factor)
    config.validate(causal=False)
    x, valid = some(4)
    p, capacity = softmax(x.astype(np.float64)), 2 if factor is None else 4
    assert config.capacity(T) == capacity
    expected = np.zeros((B, T, E))
    for b, e in np.ndindex(B, E):
        tokens = [t for t in best(p[b, :, e], T) if valid[b, t]][:capacity]
        expected[b, tokens, e] = p[b, tokens, e]
    np.testing.assert_allclose(as_weights(routed(config, x, valid)), expected, rtol=1e-5, atol=1e-8)
    # Without padding, every expert takes exactly its capacity, even with ties, and the capacity limit drops nothing.
    routing = routed(config, np.round(x / 3) if factor else np.zeros_like(x), np.ones((B, T), bool))
    load = (np.asarray(routing.indices_BTC)[..., None] == np.arange(E)).sum((1, 2))
    assert (load == capacity).all()
    kept, _ = positions_in_experts(routing.indices_BTC, E, capacity)
    np.testing.assert_array_equal(kept, routing.indices_BTC)


def test_sinkhorn_chooses_by_a_balanced_plan_in_training_and_by_logits_in_scoring():
    config = MoEConfig(E, 1, router="sinkhorn", weights="sigmoid")
    config.validate(causal=True)
    x, valid = some(5, (4, 24, E))
    x = (x + np.linspace(0, 4, E)).astype(np.float32)  # the last experts are better for most
    plan = np.exp(x[valid].astype(np.float64))
    for _ in range(SINKHORN_ITERATIONS):
        plan = plan / plan.sum(1, keepdims=True)
        plan = plan / plan.sum(0) * len(plan) / E
    balanced, greedy = (routed(config, x, valid, key=key) for key in (KEY, None))
    np.testing.assert_array_equal(np.asarray(balanced.indices_BTC)[valid][:, 0], plan.argmax(1))
    np.testing.assert_array_equal(np.asarray(greedy.indices_BTC)[valid][:, 0], x[valid].argmax(1))
    worst_balanced, worst_greedy = (
        np.bincount(np.ravel(r.indices_BTC), minlength=E)[:E].max() for r in (balanced, greedy)
    )
    assert worst_balanced < 0.6 * worst_greedy and worst_balanced < 1.7 * valid.sum() / E
    chosen = np.take_along_axis(x, np.minimum(balanced.indices_BTC, E - 1), -1)[valid]
    np.testing.assert_allclose(np.asarray(balanced.weights_BTC)[valid], 1 / (1 + np.exp(-chosen)), rtol=1e-5)
    # Padding and tokens with non-finite logits are left out of the plan.
    other = np.where(valid[..., None], x, np.nan)
    again = routed(config, other, valid, key=KEY)
    np.testing.assert_array_equal(again.indices_BTC, balanced.indices_BTC)
    np.testing.assert_array_equal(np.asarray(again.weights_BTC)[valid], np.asarray(balanced.weights_BTC)[valid])


def test_hash_depends_only_on_the_id_and_balances_the_experts():
    config = MoEConfig(E, 2, router="hash", scale=3.0)
    config.validate(causal=True)
    ids = np.arange(6000, dtype=np.int32).reshape(2, 3000)
    valid = np.ones(ids.shape, bool)
    indices = np.asarray(routed(config, None, valid, ids_BT=ids).indices_BTC)
    order = np.random.default_rng(0).permutation(ids.size)
    moved = np.asarray(
        routed(config, None, valid, ids_BT=order.reshape(ids.shape).astype(np.int32), key=KEY).indices_BTC
    )
    np.testing.assert_array_equal(moved.reshape(-1, 2), indices.reshape(-1, 2)[order])
    assert (indices[..., 0] != indices[..., 1]).all()
    pairs = np.bincount(np.ravel(indices[..., 0] * E + indices[..., 1]), minlength=E * E)
    # Hashes are independent, so each of the 30 ordered pairs is equally frequent.
    share = np.delete(pairs, np.arange(E) * (E + 1)) / ids.size
    assert np.abs(share - 1 / 30).max() < 5 * (1 / 30 / ids.size) ** 0.5
    routing = routed(config, None, valid, ids_BT=ids)
    assert (np.asarray(routing.weights_BTC) == 1.5).all() and (np.asarray(routing.log_total_BT) == 0).all()
    np.testing.assert_allclose(np.asarray(routing.probs_BTE).sum(-1), 1)


def test_random_routing_is_drawn_in_training_and_repeatable_in_scoring():
    config = MoEConfig(E, 2, router="random")
    ids, valid = np.zeros((2, 3000), np.int32), np.ones((2, 3000), bool)
    at = {"ids_BT": ids, "positions_BT": np.broadcast_to(np.arange(3000, dtype=np.int32), ids.shape)}

    def indices(key=None, **changes):
        return np.asarray(routed(config, None, valid, **(at | changes), key=key).indices_BTC)

    scored = indices()
    np.testing.assert_array_equal(scored[0], scored[1])  # the same id at the same position
    assert (scored != indices(ids_BT=ids + 1)).any() and (scored[0, :-1] != scored[0, 1:]).any()
    drawn = indices(KEY)
    assert (drawn[0] != drawn[1]).any() and (drawn != indices(jax.random.key(8))).any()
    for chosen in (scored, drawn):
        assert (chosen[..., 0] != chosen[..., 1]).all()
        load = np.bincount(chosen[0].ravel(), minlength=E) / 6000
        assert np.abs(load - 1 / E).max() < 5 * (1 / E / 6000) ** 0.5


def test_soft_moe_matches_the_formula_of_the_paper():
    D, F, S = 8, 5, 2
    config = tiny_config(embed_dim=D, moe=MoEConfig(3, S, F, router="soft", scale=2.0))
    rng = np.random.default_rng(0)
    x, logits, up, down = (
        rng.standard_normal(s).astype(np.float32) for s in [(2, 5, D), (2, 5, 3 * S), (3, D, 2, F), (3, F, D)]
    )
    valid = np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], bool)
    rules = ShardingRules()
    f = jax.jit(
        lambda x, logits, valid, up, down: soft_moe(x, logits, valid, expert_weights(up, down, rules), config, rules)
    )
    out, routing = f(x, logits, valid, up, down)
    for b in range(2):
        real = valid[b]
        dispatch, combine = softmax(logits[b, real].T.astype(np.float64)).T, softmax(logits[b, real].astype(np.float64))
        slots = dispatch.T @ x[b, real]
        y = np.concatenate([feed_forward(slots[e * S : e * S + S], up[e], down[e], "swiglu") for e in range(3)])
        np.testing.assert_allclose(out[b, real], 2 * combine @ y, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(out[b, ~real], 0)
        np.testing.assert_allclose(routing.probs_BTE[b, real], combine.reshape(-1, 3, S).sum(-1), rtol=1e-5)
    bad = np.where((np.arange(5) == 1)[None, :, None], np.nan, logits)
    assert not np.isfinite(f(x, bad, valid, up, down)[0])[valid].any()


# ---------------------------------------------------------------------------------------------------- the layer

CAUSAL = {
    "top_k": {}, "switch": {"top_k": 1}, "gshard": {}, "noisy_top_k": {}, "sinkhorn": {}, "hash": {}, "random": {},
    "dense": {"top_k": 4, "capacity_factor": None},
}  # fmt: skip


def layer(config: MoEConfig):
    """Return (f, x [2, 6, D], ids). f(x, ids) gives (output, statistics) of a layer with random weights, compiled."""
    full_config = tiny_config(embed_dim=8, moe=config)
    abstract = jax.eval_shape(lambda: MoE(jax.random.key(0), full_config, ShardingRules()))
    names = [(f"stacks.{name}", leaf.shape) for name, leaf in weight_names(abstract)]
    weights = [random_weight(name, (1, *shape), full_config, 0)[0] for name, shape in names]
    moe = jax.tree.unflatten(jax.tree.structure(abstract), [jnp.asarray(w) for w in weights])
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))

    @jax.jit
    def run(moe, x, ids):
        return moe(x, context(ids, positions, jnp.ones((B, T), bool)), None)

    rng = np.random.default_rng(0)
    x, ids = rng.standard_normal((B, T, 8)).astype(np.float32), rng.integers(0, 99, (B, T)).astype(np.int32)
    return partial(run, moe), x, ids


@pytest.mark.parametrize("router", CAUSAL)
def test_later_tokens_change_nothing_and_a_nan_affects_only_its_token(router):
    f, x, ids = layer(
        MoEConfig(**{"num_experts": 4, "hidden_dim": 5, "router": router, "capacity_factor": 1.0, **CAUSAL[router]})
    )
    out, stats = f(x, ids)
    assert router == "dense" or stats.dropped > 0  # the capacity drops choices
    later = np.arange(T)[:, None] > 2
    other, _ = f(np.where(later, 3 - x, x), np.where(later[:, 0], ids + 1, ids))
    np.testing.assert_array_equal(out[:, :3], other[:, :3])
    assert (np.asarray(out)[:, 3:] != np.asarray(other)[:, 3:]).any(-1).any()

    bad = x.copy()
    bad[0, 1, 3] = np.nan
    out, stats = f(bad, ids)
    assert router in ("hash", "random") or not np.isfinite(stats.z + stats.load_balance)
    if (np.asarray(stats.choices_BTC)[0, 1] < 4).any() and router not in ("hash", "random"):
        assert not np.isfinite(out[0, 1]).any()
    assert np.isfinite(out[1]).all() and np.isfinite(out[0, 2:]).all() and np.isfinite(out[0, 0]).all()


def test_expert_choice_leaks_later_tokens_and_shows_a_nan():
    f, x, ids = layer(MoEConfig(4, 2, 5, router="expert_choice"))
    out, _ = f(x, ids)
    later = np.arange(T)[:, None] > 2
    other, _ = f(np.where(later, 3 - x, x), ids)
    assert (np.asarray(out)[:, :3] != np.asarray(other)[:, :3]).any(), (
        "no leak, so decoders would not need to refuse it"
    )
    bad = x.copy()
    bad[0, 1, 3] = np.nan
    out, stats = f(bad, ids)
    assert not np.isfinite(out[0, 1]).any() and not np.isfinite(stats.z)
    assert np.isfinite(np.asarray(out)[0, [0, 2, 3, 4, 5]]).all() and np.isfinite(out[1]).all()


def test_sinkhorn_leaks_in_training_only():
    config = MoEConfig(E, 1, router="sinkhorn", weights="softmax")
    x, valid = some(6)[0], np.ones((B, T), bool)
    other = np.where(np.arange(T)[:, None] > 2, np.linspace(9, 0, E), x).astype(np.float32)
    before = [np.asarray(routed(config, y, valid, key=KEY).indices_BTC)[:, :3] for y in (x, other)]
    assert (before[0] != before[1]).any()
    before = [np.asarray(routed(config, y, valid).indices_BTC)[:, :3] for y in (x, other)]
    np.testing.assert_array_equal(*before)


@pytest.mark.parametrize("router", sorted({*CAUSAL, "expert_choice"} - {"hash", "random"}))  # these have no logits
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_non_finite_logit_marks_only_its_token(router, poison):
    config = MoEConfig(
        E, {"switch": 1, "dense": E}.get(router, 2), router=router, bias_rate=0.1 if router == "top_k" else None
    )
    x, valid = some(7)[0], np.ones((B, T), bool)
    x[0, 1, 2] = poison
    noise = np.zeros_like(x)
    routing = routed(config, x, valid, noise_BTE=noise, key=KEY)
    assert not np.isfinite(routing.weights_BTC[0, 1]).any() and (np.asarray(routing.indices_BTC)[0, 1] < E).any()
    rest = np.ones((B, T), bool)
    rest[0, 1] = False
    assert np.isfinite(np.asarray(routing.weights_BTC)[rest]).all()
    if router == "noisy_top_k":
        noise[1, 2, 0] = poison
        assert not np.isfinite(routed(config, x, valid, noise_BTE=noise, key=KEY).weights_BTC[1, 2]).any()


# -------------------------------------------------------------------------------------------- precision and noise


def test_a_bfloat16_router_changes_choices_and_a_float32_one_does_not():
    rng = np.random.default_rng(0)
    x = (2 * rng.standard_normal((2, 400, 32))).astype(np.float32)
    valid = np.ones(x.shape[:2], bool)
    exact = x.astype(np.float64).argmax(-1)
    flips = {}
    for dtype in ("float32", "bfloat16"):
        routing = routed(MoEConfig(32, 1, router="switch", router_dtype=dtype), x, valid)
        flips[dtype] = (np.asarray(routing.indices_BTC)[..., 0] != exact).mean()
        as_bfloat16 = routing.probs_BTE.astype(jnp.bfloat16).astype(jnp.float32)
        assert (as_bfloat16 == routing.probs_BTE).all() == (dtype == "bfloat16")
        wide = x.astype(np.float64)
        probs, log_total = softmax(wide), np.log(np.exp(wide).sum(-1))
        if dtype == "float32":
            assert_close(routing.probs_BTE, probs, 1e-5, scale=probs)
            assert_close(routing.log_total_BT, log_total, 1e-6, scale=log_total)
        else:
            # Each step has a relative error of half a unit of 8 bits: the logit, the maximum, their difference, exp,
            # sum and quotient.
            top = np.abs(wide.max(-1, keepdims=True))
            distance = np.abs(wide - wide.max(-1, keepdims=True))
            assert_close(routing.probs_BTE, probs, 2**-8, scale=probs * (np.abs(wide) + top + distance + 4))
            assert_close(routing.log_total_BT, log_total, 2**-8, scale=2 * top[..., 0] + 4)
    assert flips["float32"] == 0 and 0.001 < flips["bfloat16"] < 0.1


def test_jitter_and_dropout_change_the_router_input_in_training():
    x = jnp.ones((4, 50, 16))
    assert noisy_input(x, MoEConfig(jitter=0.1, router_dropout=0.2), None) is x
    jittered = np.asarray(noisy_input(x, MoEConfig(jitter=0.1), KEY))
    assert 0.9 <= jittered.min() < 0.91 and 1.09 < jittered.max() <= 1.1 and abs(jittered.mean() - 1) < 0.005
    dropped = np.asarray(noisy_input(x, MoEConfig(router_dropout=0.2), KEY))
    assert set(np.unique(dropped)) == {0, np.float32(1.25)} and abs(dropped.mean() - 1) < 0.04


# ---------------------------------------------------------------------------------------------------- on a mesh


MORE = ("switch", "gshard", "noisy_top_k", "hash", "random", "dense")


@pytest.mark.parametrize(
    "router", ["top_k", "sinkhorn", "expert_choice", *(pytest.param(r, marks=pytest.mark.slow) for r in MORE)]
)
def test_a_mesh_routes_as_one_device_does(router):
    """A router in training, with its positions and statistics; batch and sequence are sharded."""
    shape = (4, 8, E)
    x, valid = some(8, shape)
    ids = where(shape[:2])
    k = {"switch": 1, "dense": E}.get(router, 2)
    config = MoEConfig(E, k, router=router, groups=(3, 2) if router == "top_k" else (1, 1), balance_scope="device")

    @jax.jit
    def run(x, noise, valid, ids):
        routing = route(x, valid, config, noise_BTE=noise, **ids, key=KEY)
        kept, position = positions_in_experts(routing.indices_BTC, E, 1)
        return routing, kept, jnp.where(kept < E, position, -1), router_stats(routing, kept, valid, config, 4)

    alone = run(x, 0.5 * x, valid, ids)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, sequence=2))
    with use_mesh(mesh):

        def spread(y):
            return jax.device_put(y, jax.NamedSharding(mesh, P(("data", "fsdp"), "sequence", *(None,) * (y.ndim - 2))))

        on_mesh = run(spread(x), spread(0.5 * x), spread(valid), jax.tree.map(spread, ids))
    assert on_mesh[0].indices_BTC.sharding.spec[:2] == (("data", "fsdp"), "sequence")
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(on_mesh), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_soft_moe_on_a_mesh_matches_one_device():
    """Values and gradients, with experts and sequence sharded."""
    D, F, S, rules = 8, 5, 2, ShardingRules()
    config = tiny_config(embed_dim=D, moe=MoEConfig(4, S, F, router="soft"))
    rng = np.random.default_rng(0)
    shapes = [(4, 6, D), (4, 6, 4 * S), (4, D, 2, F), (4, F, D)]
    given = [rng.standard_normal(s).astype(np.float32) for s in shapes]
    valid = np.arange(6) < np.array([6, 5, 3, 1])[:, None]

    @jax.jit
    def run(arrays, valid):
        return jax.value_and_grad(
            lambda a: jnp.square(soft_moe(*a[:2], valid, expert_weights(*a[2:], rules), config, rules)[0]).sum()
        )(arrays)

    alone = run(given, valid)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, sequence=2, expert=2))
    rows = rules.spec("activations", ("batch", "sequence", None))
    weights = [
        rules.spec("weights", ("expert", "embed", None, "mlp")),
        rules.spec("weights", ("expert", "mlp", "embed")),
    ]
    with use_mesh(mesh):
        sharded = [
            jax.device_put(x, jax.NamedSharding(mesh, spec))
            for x, spec in zip(given, [rows, rows, *weights], strict=True)
        ]
        spread = run(sharded, jax.device_put(valid, jax.NamedSharding(mesh, P(*rows[:2]))))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=1e-5)


def test_draws_do_not_depend_on_the_mesh():
    like = jnp.zeros((4, 8))
    alone = draw(jax.random.uniform, KEY, like)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, sequence=4))
    with use_mesh(mesh):
        spread = jax.device_put(like, jax.NamedSharding(mesh, P("data", "sequence")))
        np.testing.assert_array_equal(jax.jit(partial(draw, jax.random.uniform, KEY))(spread), alone)
