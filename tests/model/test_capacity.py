"""Capacity of experts: earlier tokens come first, so no choice depends on later tokens."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from model.balance import router_stats
from model.capacity import positions_in_experts
from model.moe_config import MoEConfig
from model.routers import route

B, T, C, E = 2, 7, 2, 4
compiled = jax.jit(positions_in_experts, static_argnums=(1, 2))


def choices(seed: int) -> np.ndarray:
    """Return distinct experts of each token; some choices have no expert."""
    rng = np.random.default_rng(seed)
    indices = rng.permuted(np.broadcast_to(np.arange(E), (B, T, E)), axis=-1)[..., :C].astype(np.int32)
    return np.where(rng.random(indices.shape) < 0.2, E, indices)


@given(seed=st.integers(0, 1000), capacity=st.sampled_from([1, 2, 7]))
@settings(max_examples=40, deadline=None)
def test_each_expert_takes_the_first_tokens(seed, capacity):
    indices = choices(seed)
    kept, position = compiled(indices, E, capacity)
    for b in range(B):
        taken = [0] * E
        for t, c in np.ndindex(T, C):
            e = indices[b, t, c]
            if e == E:
                assert kept[b, t, c] == E  # no expert, and no position taken
                continue
            assert position[b, t, c] == taken[e]
            assert kept[b, t, c] == (e if taken[e] < capacity else E)
            taken[e] += 1
        assert np.bincount(np.ravel(kept[b]), minlength=E)[:E].max() <= capacity


@given(seed=st.integers(0, 1000), cut=st.integers(1, T - 1))
@settings(max_examples=20, deadline=None)
def test_later_tokens_and_other_rows_do_not_displace_earlier_tokens(seed, cut):
    indices, other = choices(seed), choices(seed + 1)
    mixed = np.where(np.arange(T)[:, None] < cut, indices, other)
    mixed[1] = other[1]
    before, after = (compiled(y, E, 2) for y in (indices, mixed))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a[0, :cut], b[0, :cut])


def test_a_larger_factor_never_drops_more_and_padding_uses_no_capacity():
    x = jax.random.normal(jax.random.key(0), (2, 32, 8)) + jnp.linspace(0, 2, 8)
    config = MoEConfig(8, 2)

    @jax.jit
    def dropped(x, valid, capacity):
        routing = route(x, valid, config)
        kept, _ = positions_in_experts(routing.indices_BTC, 8, capacity)
        return router_stats(routing, kept, valid, config).dropped, kept

    valid = np.ones((2, 32), bool)
    factors = (0.25, 0.5, 1.0, 1.25, 2.0, 4.0, 8.0)
    capacities = [replace(config, capacity_factor=factor).capacity(32) for factor in factors]
    fractions = [float(dropped(x, valid, capacity)[0]) for capacity in capacities]
    assert all(a >= b for a, b in itertools.pairwise(fractions)) and fractions[0] > 0.5 and fractions[-1] == 0
    # Padding at the front uses no capacity: the tokens after it are served as if they came first.
    padded = np.where(np.arange(32) < 16, False, valid)
    _, after_padding = dropped(x, padded, 8)
    _, first = dropped(jnp.roll(x, -16, axis=1), ~padded, 8)
    assert (after_padding[:, :16] == 8).all() and (after_padding[:, 16:] == 8).any()
    np.testing.assert_array_equal(after_padding[:, 16:], first[:, :16])


@given(
    factor=st.sampled_from([0.1, 0.3, 1.0, 1.1, 1.25, 2.0]),
    k=st.integers(1, 8),
    tokens=st.integers(1, 4096),
    experts=st.integers(1, 256),
)
@settings(max_examples=100, deadline=None)
def test_capacity_is_the_exact_ceiling(factor, k, tokens, experts):
    exact = Fraction(str(factor)) * k * tokens / experts
    capacity = MoEConfig(experts, k, capacity_factor=factor).capacity(tokens)
    assert 1 <= capacity <= tokens
    assert capacity in (1, tokens) or capacity - 1 < exact <= capacity
    config = MoEConfig(experts, k, capacity_factor=factor)
    if exact >= 1:
        config.validate_length(tokens)
    else:
        with pytest.raises(ValueError, match=r"model\.moe\.capacity_factor = .* less than one") as refusal:
            config.validate_length(tokens)
        suggested = float(str(refusal.value).split(". Use ")[1].split()[0])
        MoEConfig(experts, k, capacity_factor=suggested).validate_length(tokens)
    if k * tokens < experts:
        with pytest.raises(ValueError, match="less than one"):
            MoEConfig(experts, k, router="expert_choice").validate_length(tokens)


def test_capacity_uses_the_decimal_value_of_the_factor():
    assert 1.1 * 100 / 10 > 11  # in float64
    assert MoEConfig(10, 1, capacity_factor=1.1).capacity(100) == 11


def test_positions_need_less_memory_than_choices_times_experts():
    """For 8 of 64 experts, the compiled program's temporaries are far below one [B, T, C, E] array of int32."""
    shape = jax.ShapeDtypeStruct((4, 512, 8), jnp.int32)
    memory = jax.jit(positions_in_experts, static_argnums=(1, 2)).lower(shape, 64, 100).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.5 * 4 * 4 * 512 * 8 * 64
