"""Caches: overflow is an error, a ring keeps its window, and no argument is ignored silently."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.cache import ContiguousCache, RingCache
from model.transformer import forward, init_cache, logits, unstack
from tests.models import TINY_ATTENTION, random_model, tiny_config

SLIDING = tiny_config(attention=replace(TINY_ATTENTION, layers=("sliding", "global")))
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)


def test_tokens_beyond_the_capacity_are_refused_or_give_nan():
    model = unstack(random_model(SLIDING))
    cache = init_cache(model, 2, 8)
    with pytest.raises(ValueError, match=r"9 tokens for a cache of capacity 8 whose longest row holds 0"):
        forward(model, TOKENS[:, :9], cache=cache)
    step = jax.jit(lambda m, cache, new: forward(m, new, cache=cache))
    full = step(model, cache.at_length(jnp.asarray([3, 6], jnp.int32)), TOKENS[:, :3])
    assert np.isfinite(full.hidden_BTD[0]).all(), "a row within the capacity is unaffected"
    assert np.isnan(full.hidden_BTD[1]).all(), "inside jit a row that overflows is NaN"
    with pytest.raises(ValueError, match=r"whose longest row holds 9"):
        forward(model, TOKENS[:, :1], cache=full.cache)


@pytest.mark.parametrize("name", ["positions_BT", "segment_ids_BT"])
def test_arguments_that_a_cache_cannot_honor_are_refused(name):
    model = random_model(SLIDING)
    with pytest.raises(ValueError, match=f"{name} with a cache"):
        forward(model, TOKENS, cache=init_cache(model, 2, 24), **{name: np.ones_like(TOKENS)})


def test_a_sliding_layer_caches_its_window_and_a_global_layer_every_token():
    cache = init_cache(unstack(random_model(SLIDING)), 2, 24)
    ring, contiguous = cache.stacks[0][0], cache.stacks[1][0]
    assert isinstance(ring, RingCache) and ring.k_BKWH.shape == (1, 2, 2, TINY_ATTENTION.window, 8)
    assert isinstance(contiguous, ContiguousCache) and contiguous.k_BKSH.shape == (1, 2, 2, 24, 8)


def test_a_ring_cache_matches_whole_rows_for_any_chunks():
    """Chunks shorter and longer than the window, single tokens, and padding after rows of uneven length."""
    model = unstack(random_model(SLIDING))
    whole = np.asarray(jax.jit(lambda m: logits(m, forward(m, TOKENS).hidden_BTD))(model))
    step = jax.jit(lambda m, cache, new, valid: forward(m, new, cache=cache, valid_BT=valid))
    bound = 1e-5 * np.abs(whole).max()
    for cuts in ((7, 1, 9, 1, 6), (1, 1, 1, 3, 12, 6)):
        cache, first, found = init_cache(model, 2, 24), 0, []
        for size in cuts:
            out = step(model, cache, TOKENS[:, first : first + size], np.ones((2, size), bool))
            found.append(logits(model, out.hidden_BTD))
            cache, first = out.cache, first + size
        np.testing.assert_allclose(np.concatenate(found, 1), whole, atol=bound)
    # Rows of 9 and 3 tokens, padded to 12: the padding must not push tokens out of the ring.
    lengths = np.array([9, 3])
    valid = np.arange(12) < lengths[:, None]
    padded = np.where(valid, TOKENS[:, :12], 0)
    cache = step(model, init_cache(model, 2, 24), padded, valid).cache.at_length(jnp.asarray(lengths, jnp.int32))
    for _ in range(4):
        out = step(model, cache, TOKENS[np.arange(2), lengths][:, None], np.ones((2, 1), bool))
        got = np.asarray(logits(model, out.hidden_BTD))[:, 0]
        np.testing.assert_allclose(got, whole[np.arange(2), lengths], atol=bound)
        cache, lengths = out.cache, lengths + 1


@pytest.mark.parametrize("chosen", ["off", "reference"])
def test_the_decode_kernel_can_be_switched_off(chosen):
    """The result stays the same: with 'off' the kernel for whole rows attends to the cache."""
    config = replace(SLIDING, attention=replace(SLIDING.attention, decode_implementation=chosen))
    step = jax.jit(lambda m, cache, new: forward(m, new, cache=cache))
    found = []
    for c in (SLIDING, config):
        model = unstack(random_model(c))
        out = step(model, init_cache(model, 2, 24), TOKENS[:, :7])
        found.append(np.asarray(step(model, out.cache, TOKENS[:, 7:8]).hidden_BTD))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5 * np.abs(found[0]).max())
    with pytest.raises(ValueError, match="decode_implementation"):
        replace(SLIDING, attention=replace(SLIDING.attention, decode_implementation="hoper")).validate()
