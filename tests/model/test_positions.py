"""Position encodings against numbers recorded from `ROPE_INIT_FUNCTIONS` of transformers 5.23.0 and from the ALiBi
paper."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args, get_type_hints

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from model.config import PositionConfig, RopeScalingConfig
from model.positions import alibi_slopes, inverse_frequencies, rope_tables, rotate
from tests.model.reference import rope_frequencies, slopes
from tests.models import TINY_ATTENTION, tiny_config

LINEAR = RopeScalingConfig("linear", 4.0)
DYNAMIC = RopeScalingConfig("dynamic_ntk", 4.0, 64)
YARN = RopeScalingConfig("yarn", 4.0, 64)
# The original length is below 2 pi beta_slow, so the ramp's upper end is below its lower end, before and after
# rounding.
YARN_SHORT = RopeScalingConfig("yarn", 4.0, 4, truncate=False)
YARN_SHORTEST = RopeScalingConfig("yarn", 4.0, 1)
YARN_FACTOR = RopeScalingConfig("yarn", 8.0, 4096, beta_fast=16.0, beta_slow=2.0, attention_factor=0.7)
LLAMA3 = RopeScalingConfig("llama3", 8.0, 128)
LLAMA3_2 = RopeScalingConfig("llama3", 32.0, 8192)  # Llama 3.2 1B

# scaling, dimensions, theta, length of context, stretch of cos and sin, {pair: radians per position}
RECORDED = {
    "linear": (LINEAR, 16, 1e4, 64, 1.0, {0: 0.25, 1: 0.07905694, 4: 0.0025, 7: 7.905695e-05}),
    "dynamic": (DYNAMIC, 16, 1e4, 150, 1.0, {0: 1.0, 1: 0.2427025, 3: 0.01429627, 7: 4.960436e-05}),
    "dynamic-short": (DYNAMIC, 16, 1e4, 50, 1.0, {0: 1.0, 1: 0.3162278, 7: 0.0003162278}),
    "yarn": (YARN, 16, 1e4, 256, 1.138629436, {0: 1.0, 1: 0.2371708, 2: 0.05, 3: 0.007905695, 7: 7.905695e-05}),
    "yarn-short": (YARN_SHORT, 16, 1e4, 16, 1.138629436, {0: 1.0, 1: 0.3162278, 4: 0.01, 7: 0.0003162278}),
    "yarn-shortest": (YARN_SHORTEST, 16, 100.0, 4, 1.138629436, {0: 1.0, 1: 0.5623413, 4: 0.1, 7: 0.01778279}),
    "yarn-factor": (
        YARN_FACTOR,
        32,
        1e6,
        256,
        0.7,
        {4: 0.03162278, 5: 0.009445777, 6: 0.002343089, 7: 0.0002964217, 8: 0.000125, 15: 2.964217e-07},
    ),
    "llama3": (LLAMA3, 16, 1e4, 256, 1.0, {1: 0.3162278, 2: 0.04275118, 3: 0.003952847, 7: 3.952847e-05}),
    "llama3.2": (
        LLAMA3_2,
        64,
        5e5,
        256,
        1.0,
        {14: 0.003211446, 15: 0.001290548, 16: 0.0004295567, 17: 9.708286e-05, 18: 1.946164e-05},
    ),
}


@pytest.mark.parametrize("name", RECORDED)
def test_rope_scaling_matches_transformers(name):
    scaling, dim, theta, length, stretch, recorded = RECORDED[name]
    pairs, radians = list(recorded), np.array(list(recorded.values()))
    np.testing.assert_allclose(rope_frequencies(dim, theta, scaling, length)[pairs], radians, rtol=3e-6)
    if scaling.kind != "dynamic_ntk":
        np.testing.assert_allclose(inverse_frequencies(dim, theta, scaling)[pairs], radians, rtol=3e-6)
    config = tiny_config(
        attention=replace(TINY_ATTENTION, head_dim=dim), position=PositionConfig(theta=theta, scaling=scaling)
    )
    # At position 1 the tables hold the stretched cosine and sine of the frequency.
    cos, sin = rope_tables(config, jnp.ones((1, 1), jnp.int32), jnp.array([length]))
    np.testing.assert_allclose(np.arctan2(sin, cos)[0, 0, pairs], radians, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(np.hypot(cos, sin), stretch, rtol=1e-6)


def test_ntk_keeps_the_first_frequency_and_matches_the_last_one_of_linear():
    ntk, linear = (inverse_frequencies(32, 1e4, RopeScalingConfig(kind, 4.0)) for kind in ("ntk", "linear"))
    assert ntk[0] == 1.0
    assert math.isclose(ntk[-1], linear[-1], rel_tol=1e-9)  # bloc97 chose the exponent dim / (dim - 2) for this


@pytest.mark.parametrize("factor, base", [(2.0, 20_221.26), (8.0, 82_684.62)])
def test_ntk_has_the_published_base(factor, base):
    """bloc97 2023: base * factor^(d / (d - 2)) with d = 128. The digits were computed in another program."""
    frequencies = inverse_frequencies(128, 1e4, RopeScalingConfig("ntk", factor))
    np.testing.assert_allclose(frequencies[1:] ** (-128 / np.arange(2, 128, 2)), base, rtol=1e-6)


@pytest.mark.parametrize("factor, stretch", [(1, 1), (4, 1.1386), (8, 1.2079), (16, 1.2773), (32, 1.3466)])
def test_yarn_stretches_queries_and_keys_by_its_temperature(factor, stretch):
    """Peng et al. 2023, sec. 3.4: sqrt(1 / t) = 0.1 ln(s) + 1, which multiplies both queries and keys."""
    config = tiny_config(position=PositionConfig(scaling=RopeScalingConfig("yarn", float(factor), 64)))
    cos, sin = rope_tables(config, jnp.arange(70)[None], jnp.array([70]))
    np.testing.assert_allclose(np.hypot(cos, sin), 0.1 * math.log(factor) + 1, rtol=1e-6)
    np.testing.assert_allclose(np.hypot(cos, sin), stretch, atol=5.1e-5)  # four digits


@pytest.mark.parametrize("kind", get_args(get_type_hints(RopeScalingConfig)["kind"]))
def test_a_factor_of_1_changes_nothing(kind):
    """dynamic_ntk scales by the current over the original length, so a factor of 1 is the identity only up to that
    length, as in transformers."""
    scaled = tiny_config(
        attention=replace(TINY_ATTENTION, head_dim=64),
        position=PositionConfig(scaling=RopeScalingConfig(kind, 1.0, 256)),
    )
    plain = replace(scaled, position=PositionConfig())
    tables = [np.asarray(rope_tables(c, jnp.arange(256)[None], jnp.array([256]))) for c in (plain, scaled)]
    # An angle of up to 255 has an error of 255 * 2^-24.
    np.testing.assert_allclose(tables[1], tables[0], atol=4 * 255 * 2.0**-24)
    if kind != "dynamic_ntk":
        frequencies = inverse_frequencies(64, 1e4, scaled.position.scaling)
        np.testing.assert_allclose(frequencies, inverse_frequencies(64, 1e4, None), rtol=1e-12)


@given(shift=st.integers(0, 500), interleaved=st.booleans(), fraction=st.sampled_from([0.25, 0.5, 1.0]))
@settings(deadline=None, max_examples=20)
def test_rope_products_depend_only_on_distance(shift, interleaved, fraction):
    config = tiny_config(
        attention=replace(TINY_ATTENTION, head_dim=16), position=PositionConfig(rotary_fraction=fraction)
    )
    x = jnp.asarray(np.random.default_rng(shift).standard_normal((1, 2, 1, 16)), jnp.float32)

    def product(positions):
        """Return (the product, its error bound): an angle has a relative error of 2^-24, and so has a pair's term."""
        y = np.asarray(rotate(x, *rope_tables(config, jnp.array([positions])), interleaved))
        np.testing.assert_array_equal(y[..., int(16 * fraction) :], x[..., int(16 * fraction) :])
        sizes = np.linalg.norm(y[0, 0, 0]) * np.linalg.norm(y[0, 1, 0])
        return (y[0, 0, 0] * y[0, 1, 0]).sum(), sizes * (sum(positions) / 2 + 16) * 2.0**-23

    (here, error_here), (there, error_there) = product([3, 8]), product([3 + shift, 8 + shift])
    assert abs(here - there) <= error_here + error_there


def test_alibi_slopes_match_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    for heads in range(1, 40):
        np.testing.assert_allclose(alibi_slopes(heads), slopes(heads), rtol=1e-6)
    # The code of the paper (get_slopes), for 12 heads: those of 8 heads, then every other one of 16 heads.
    np.testing.assert_allclose(alibi_slopes(12)[8:], [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5], rtol=1e-6)
    np.testing.assert_array_equal(alibi_slopes(12)[:8], alibi_slopes(8))
