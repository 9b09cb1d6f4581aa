"""Losses and statistics of routers equal the closed forms of their papers."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.balance import load_balance, max_violation, saturation
from model.moe_config import MoEConfig
from model.routers import route

# ---------------------------------------------------------------------------------------------------- balance


@pytest.mark.parametrize("experts, k", [(64, 8), (8, 1), (8, 2)], ids=["OLMoE", "Switch", "Mixtral"])
def test_the_balance_loss_in_both_conventions(experts, k):
    """Per choice (Fedus et al. 2021, eq. 4; OLMoE, Muennighoff et al. 2024, sec. 2) the loss is 1 at balance and E / k
    if k experts take everything. Per token (load_balancing_loss_func of transformers) it is k times that: k and E. For
    the one choice of Switch, both conventions are equal. Balance is tested with a router in
    tests/model/test_balance.py."""
    tokens = jnp.float32(320)
    first = np.arange(experts) < k
    even = jnp.full(experts, tokens * k / experts), jnp.full(experts, tokens / experts)
    collapsed = jnp.asarray(first * tokens), jnp.asarray(first * tokens / k)
    for (count, probs), per_choice, per_token in ((even, 1, k), (collapsed, experts / k, experts)):
        np.testing.assert_allclose(load_balance(count, probs, tokens), per_choice, rtol=1e-6)
        np.testing.assert_allclose(load_balance(count, probs, tokens, per="token"), per_token, rtol=1e-6)
    # Wang et al. 2024, eq. 4.
    violations = [float(max_violation(count / count.sum())) for count, _ in (even, collapsed)]
    assert violations == pytest.approx([0, experts / k - 1], abs=1e-5)


# ---------------------------------------------------------------------------------------------------- choices


@pytest.mark.parametrize("experts, k, count", [(8, 1, 8), (8, 2, 28), (31, 3, 4_495), (32, 4, 35_960)])
def test_a_router_can_choose_every_combination_of_experts(experts, k, count):
    """OLMoE (Muennighoff et al. 2024), sec. 4.1.2 and 4.1.3: a token has C(8, 1) = 8 combinations of experts, C(32, 4)
    = 35,960, and C(31, 3) = 4,495 beside a shared expert. C(8, 2) is Mixtral's."""
    wanted = np.array(list(combinations(range(experts), k)))
    logits = np.zeros((1, len(wanted), experts), np.float32)
    np.put_along_axis(logits[0], wanted, 1.0, -1)
    weights = "softmax" if k == 1 else "renormalized"
    run = jax.jit(partial(route, config=MoEConfig(experts, k, weights=weights)))
    chosen = run(logits, jnp.ones(logits.shape[:2], bool)).indices_BTC
    np.testing.assert_array_equal(np.sort(chosen[0], -1), wanted)
    assert len(wanted) == count == math.comb(experts, k)


def test_combinations_of_olmoe():
    """OLMoE, sec. 4.1.2: 64 experts and 8 choices give 4,426,165,368 combinations."""
    assert math.comb(64, 8) == 4_426_165_368


@pytest.mark.parametrize("experts, k, percent", [(64, 1, 1.6), (64, 8, 12.5)])
def test_random_routers_saturate_at_k_over_e(experts, k, percent):
    """OLMoE, sec. 5.1: 1/64 = 1.6 % and 8/64 = 12.5 % for random routing. An average over all rotations of a choice is
    exact: each of its experts is in k of the E rotations."""
    early = (np.arange(experts)[:, None] + np.arange(k)) % experts
    late = np.broadcast_to(np.random.default_rng(0).permutation(experts)[:k], (experts, k))
    found = float(saturation(early, late, experts))
    assert found == pytest.approx(k / experts, rel=1e-6) and round(100 * found, 1) == percent


def test_expert_choice_leaks_50_bits_in_the_example_of_wang_et_al():
    """Wang et al. 2024, sec. 5.2: experts that choose their tokens leak K log2((1 - R) / R) bits per token and layer,
    where a token has K experts on average and an expert takes the share R of the tokens: more than 50 bits for 9 layers
    of 16 experts with K = 2."""
    layers, experts, k, tokens = 9, 16, 2, 4096
    moe = MoEConfig(experts, k, router="expert_choice")
    capacity = moe.capacity(tokens)
    share = capacity / tokens
    assert share == k / experts and moe.capacity(256) / 256 == share
    leak = layers * k * math.log2((1 - share) / share)
    assert leak == pytest.approx(50.53, abs=0.005)
    # The choices of all experts must be able to hold that much: log2 C(T, R T) bits for each expert.
    bits = math.log2(math.comb(tokens, capacity))
    assert leak < layers * experts * bits / tokens


def test_expert_choice_has_no_imbalance():
    """Zhou et al. 2022, sec. 3.2: each expert takes k = n c / e tokens, so the load has no variance."""
    n, c, e = 64, 2, 8
    moe = MoEConfig(e, c, router="expert_choice")
    assert moe.capacity(n) == n * c // e
    run = jax.jit(partial(route, config=moe))
    chosen = run(jax.random.normal(jax.random.key(0), (3, n, e)) * 4 + jnp.arange(e), jnp.ones((3, n), bool))
    load = np.bincount(np.ravel(chosen.indices_BTC), minlength=e + 1)[:e]
    assert (load == 3 * n * c // e).all() and float(max_violation(jnp.asarray(load / load.sum()))) == 0
