"""Sorted experts against every expert on every token: equal values and gradients."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from model import experts
from model.experts import expert_mlp
from model.moe_config import MoEConfig
from model.transformer import forward, logits
from pallas_kernels.grouped_matmul import xla
from tests.model.reference import feed_forward
from tests.models import put, random_model, tiny_config

D, F = 8, 6


@partial(jax.jit, static_argnames=("kind", "implementation"))
def value_and_gradients(x, indices, weights, up, down, dy, kind, implementation):
    def f(x, weights, up, down):
        return expert_mlp(x, indices, weights, up, down, kind, implementation)

    y, pull = jax.vjp(f, x, weights, up, down)
    return y, pull(dy)


def choose(style: str, rng, N: int, C: int, E: int) -> np.ndarray:
    """Return indices [N, C]; 'foreign' ones are in [-E, 2E), where only [0, E) are local experts."""
    if style == "one":
        return np.full((N, C), rng.integers(E))
    if style == "few":  # most experts stay empty
        return rng.choice(rng.integers(0, E, 2), (N, C))
    if style == "foreign":
        return rng.integers(-E, 2 * E, (N, C))
    if style == "none":
        return np.full((N, C), E)
    return np.stack([rng.permutation(E)[:C] for _ in range(N)])


# Few shapes, because each one compiles. With blocks of 4 and 2 rows, runs cross, meet and stay within block borders.
@pytest.mark.parametrize("N, C, E, kind", [(13, 2, 3, "swiglu"), (8, 1, 4, "relu2"), (1, 3, 5, "geglu")])
def test_sorted_and_dense_experts_match_the_formula(N, C, E, kind, monkeypatch):
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
        # As in a network, results are of order one, and the weights of choices do not cancel: the tolerance is relative
        # to the results, while rounding errors are relative to the terms of the sums.
        weights, up, down = np.abs(weights), up * np.float32(D**-0.5), down * np.float32(F**-0.5)
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


def test_many_tokens_and_many_choices_match_the_oracle():
    """Covers blocks of real size, and more choices than the unrolled sum handles."""
    rng = np.random.default_rng(0)
    for N, C, E in ((300, 2, 3), (40, experts.UNROLLED + 1, 12)):
        shapes = [(N, D), (N, C), (E, D, 2, F), (E, F, D), (N, D)]
        x, weights, up, down, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        for indices in (np.full((N, C), 1, np.int32), rng.integers(-1, E + 1, (N, C)).astype(np.int32)):
            dense, ours = (
                value_and_gradients(x, indices, weights, up, down, dy, "reglu", how) for how in ("dense", None)
            )
            for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(ours), strict=True):
                np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def test_layout_is_a_stable_sort_by_expert():
    rng = np.random.default_rng(1)
    for E in (5, 2**29):  # 2**29 experts and the pair's index do not fit into one int32
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
def test_bfloat16_results_are_summed_in_float32(tokens, experts_read):
    rng = np.random.default_rng(2)
    shapes = [(tokens, 64), (tokens, 2), (8, 64, 2, 32), (8, 32, 64)]
    x, weights, up, down = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in shapes)
    indices = jnp.arange(experts_read, dtype=jnp.int32).reshape(tokens, 2)
    exact = expert_mlp(
        *(y.astype(jnp.float32) for y in (x,)),
        indices,
        *(y.astype(jnp.float32) for y in (weights, up, down)),
        "swiglu",
        "dense",
    )
    ours = expert_mlp(x, indices, weights, up, down, "swiglu")
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(jnp.float32), exact, atol=8e-3 * np.abs(exact).max())


def test_a_nan_in_the_router_reaches_the_logits():
    model = random_model(tiny_config(moe=MoEConfig(4, 2, 24, layers=("dense", "moe"))))
    router = model.stacks[1][0].mlp.router
    put(model.stacks[1][0].mlp, "router", router.value.at[0, 3, 1].set(jnp.nan))
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    out = jax.jit(lambda m, t: logits(m, forward(m, t).hidden_BTD))(model, tokens)
    assert not np.isfinite(out).any()
