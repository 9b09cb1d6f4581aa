"""The sampler against NumPy: filters, penalties, distribution and log-probabilities."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decode.sampling import (
    SamplingParams,
    choose,
    min_p_filter,
    penalize,
    sampler_arrays,
    top_k_filter,
    top_p_filter,
)
from sharding.rules import ShardingRules

RULES = ShardingRules()
B, V, S = 4, 23, 12
choose_jit = jax.jit(choose, static_argnums=5)
filters = {name: jax.jit(f) for name, f in (("k", top_k_filter), ("p", top_p_filter), ("min", min_p_filter))}
rows = st.integers(0, 2**32 - 1).map(np.random.default_rng)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(y) -> list[set[int]]:
    return [set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(y)]


@settings(max_examples=60, deadline=None)
@given(rng=rows, scale=st.sampled_from([0.0, 0.1, 3.0, 300.0]), ties=st.booleans())
def test_top_k_keeps_the_k_largest_and_their_ties(rng, scale, ties):
    x = (rng.standard_normal((B, V)) * scale).astype(np.float32)
    if ties:
        x = np.round(x)
    k = rng.integers(0, V + 5, B).astype(np.int32)
    expected = [
        set(np.flatnonzero(row >= np.sort(row)[-n]).tolist()) if 0 < n < V else set(range(V))
        for row, n in zip(x, k, strict=True)
    ]
    assert kept(filters["k"](x, k)) == expected


@settings(max_examples=60, deadline=None)
@given(rng=rows, scale=st.sampled_from([0.1, 1.0, 5.0, 300.0]))
def test_top_p_keeps_the_smallest_set_that_reaches_p(rng, scale):
    x = (rng.standard_normal((B, V)) * scale).astype(np.float32)
    p = rng.uniform(0.01, 0.999, B).astype(np.float32)
    p[0] = 1.0
    got = kept(filters["p"](x, p))
    assert got[0] == set(range(V))
    for b in range(1, B):
        order = np.argsort(-x[b], kind="stable")
        total = np.cumsum(softmax(x[b])[order])
        n = len(got[b])
        assert got[b] == set(order[:n].tolist()), "the likeliest tokens"
        assert total[n - 1] >= p[b] - 1e-5, "which reach p"
        assert n == 1 or total[n - 2] < p[b] + 1e-5, "and would not without the last"


@settings(max_examples=60, deadline=None)
@given(rng=rows, scale=st.sampled_from([0.1, 1.0, 5.0]))
def test_min_p_keeps_tokens_likely_enough(rng, scale):
    x = (rng.standard_normal((B, V)) * scale).astype(np.float32)
    m = rng.uniform(0.01, 1.0, B).astype(np.float32)
    m[0], m[1] = 0.0, 1.0
    got, probs = kept(filters["min"](x, m)), softmax(x)
    assert got[0] == set(range(V)) and got[1] == {int(x[1].argmax())}
    for b in range(2, B):
        ratio = probs[b] / probs[b].max()
        sure = set(np.flatnonzero(ratio > m[b] * 1.0001).tolist())
        assert sure <= got[b] <= set(np.flatnonzero(ratio > m[b] * 0.9999).tolist())


@settings(max_examples=40, deadline=None)
@given(rng=rows)
def test_penalties_match_numpy(rng):
    x = rng.standard_normal((B, V)).astype(np.float32) * 3
    tokens = rng.integers(0, V, (B, S)).astype(np.int32)
    prompt = rng.integers(1, S, B).astype(np.int32)
    length = np.minimum(prompt + rng.integers(0, 6, B), S).astype(np.int32)
    params = [
        SamplingParams(repetition_penalty=r, frequency_penalty=f, presence_penalty=p)
        for r, f, p in ((1.0, 0.0, 0.0), (1.7, 0.0, 0.0), (1.0, 0.5, -0.25), (0.8, -0.3, 1.5))
    ]
    expected = x.copy()
    for b, p in enumerate(params):
        made = tokens[b, prompt[b] : length[b]].tolist()
        for t in range(V):
            if t in tokens[b, : length[b]]:
                r = p.repetition_penalty
                expected[b, t] = x[b, t] / r if x[b, t] > 0 else x[b, t] * r
            expected[b, t] -= p.frequency_penalty * made.count(t) + p.presence_penalty * (t in made)
    got = jax.jit(penalize)(x, sampler_arrays(params), tokens, prompt, length)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def draws(x_V: np.ndarray, params: SamplingParams, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens drawn with `count` seeds, and their log-probabilities."""
    sampler = sampler_arrays([dataclasses.replace(params, seed=s) for s in range(count)])
    ones, tokens = np.ones(count, np.int32), np.zeros((count, 1), np.int32)
    token, logprob = choose_jit(np.tile(x_V, (count, 1)), sampler, tokens, ones, ones, RULES)
    return np.asarray(token), np.asarray(logprob)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=2.0, top_k=5),
        SamplingParams(temperature=1.5, top_p=0.7),
        SamplingParams(min_p=0.2),
        SamplingParams(temperature=1.5, top_k=9, top_p=0.8, min_p=0.15),
    ],
    ids=str,
)
def test_draws_follow_the_filtered_distribution(params):
    """Test chi-square against the distribution computed by sorting, the exact support, and log-probabilities of the
    unfiltered model."""
    x = np.random.default_rng(7).standard_normal(V).astype(np.float32) * 2
    y = x.astype(np.float64) / params.temperature
    order = np.argsort(-y)
    if params.top_k:
        y[order[params.top_k :]] = -np.inf
    if params.top_p < 1:
        n = int(np.searchsorted(np.cumsum(softmax(y)[order]), params.top_p)) + 1
        y[order[n:]] = -np.inf
    y[softmax(y) < params.min_p * softmax(y).max()] = -np.inf
    probs, count = softmax(y), 4096
    token, logprob = draws(x, params, count)
    seen = np.bincount(token, minlength=V)
    assert (seen[probs == 0] == 0).all()
    expected = probs[probs > 0] * count
    chi = ((seen[probs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom) + 10
    np.testing.assert_allclose(logprob, np.log(softmax(x))[token], atol=1e-5)


def test_noise_depends_only_on_seed_and_index():
    x = np.random.default_rng(1).standard_normal((3, V)).astype(np.float32)
    x[2] = x[0]
    sampler = sampler_arrays([SamplingParams(seed=5), SamplingParams(seed=6), SamplingParams(seed=5)])
    tokens = np.zeros((3, S), np.int32)
    texts = []
    for made in range(8):
        prompt = np.asarray([1, 2, 4], np.int32)
        token, _ = choose_jit(x, sampler, tokens, prompt, prompt + made, RULES)
        texts.append(np.asarray(token))
    texts = np.stack(texts, 1)
    assert (texts[0] == texts[2]).all() and len(set(texts[0].tolist())) > 1


def test_greedy_rows_stay_greedy_in_a_batch_with_sampling_rows():
    x = np.random.default_rng(2).standard_normal((2, V)).astype(np.float32)
    ones, tokens = np.ones(2, np.int32), np.zeros((2, 1), np.int32)
    for seed in range(20):
        greedy, drawn = SamplingParams(temperature=0.0, seed=seed, top_k=3), SamplingParams(temperature=9.0, seed=seed)
        sampler = sampler_arrays([greedy, drawn])
        token, _ = choose_jit(x, sampler, tokens, ones, ones, RULES)
        assert int(token[0]) == x[0].argmax()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": -1.0}, "sampling.temperature = -1.0"),
        ({"temperature": float("nan")}, "sampling.temperature = nan"),
        ({"top_k": -2}, "sampling.top_k = -2"),
        ({"top_p": 0.0}, "sampling.top_p = 0.0"),
        ({"top_p": 1.5}, "sampling.top_p = 1.5"),
        ({"min_p": 2.0}, "sampling.min_p = 2.0"),
        ({"repetition_penalty": 0.0}, "sampling.repetition_penalty = 0.0"),
        ({"frequency_penalty": float("inf")}, "sampling.frequency_penalty = inf"),
        ({"max_new_tokens": 0}, "sampling.max_new_tokens = 0"),
        ({"seed": -1}, "sampling.seed = -1"),
        ({"seed": 2**32}, "sampling.seed = 4294967296"),
    ],
)
def test_invalid_parameters_are_refused(changes, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        SamplingParams(**changes).validate()
