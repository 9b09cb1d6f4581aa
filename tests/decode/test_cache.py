"""Logits with a cache equal logits without it, for every kind of positions and mask."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import ModelConfig, MoEConfig, NormConfig, PositionConfig, RopeScalingConfig
from model.transformer import forward, init_cache, logits, unstack
from tests.closeness import assert_close
from tests.models import TINY_ATTENTION, random_model, tiny_config


def config(kind: str = "rope", scaling: dict | None = None, attention: dict | None = None, **changes) -> ModelConfig:
    position = PositionConfig(kind, scaling=None if scaling is None else RopeScalingConfig(**scaling))
    return tiny_config(position=position, attention=dataclasses.replace(TINY_ATTENTION, **(attention or {})), **changes)


STRETCHED = {"factor": 4.0, "original_length": 6}
CONFIGS = {
    "rope, sliding and global layers": config(attention={"layers": ("sliding", "global")}),
    "linear": config(scaling=STRETCHED),
    "ntk": config(scaling={"kind": "ntk", **STRETCHED}),
    "yarn, experts": config(
        scaling={"kind": "yarn", **STRETCHED}, moe=MoEConfig(num_experts=4, hidden_dim=16, layers=("moe", "dense"))
    ),
    "llama3": config(scaling={"kind": "llama3", **STRETCHED}),
    # Keys of later layers come from hidden states of a shorter context, so only one layer equals a recomputation.
    "dynamic_ntk": config(scaling={"kind": "dynamic_ntk", **STRETCHED}, num_layers=1),
    "alibi, block sparse, softcap": config("alibi", attention={"layers": ("block_sparse",), "softcap": 5.0}),
    "learned, one key head, sandwich norms, hashed experts": config(
        "learned",
        attention={"num_kv_heads": 1},
        norm=NormConfig("layernorm", bias=True, placement="sandwich"),
        moe=MoEConfig(num_experts=4, hidden_dim=16, layers=("moe", "dense"), router="hash"),
    ),
    "sinusoidal, q/k norm, sinks, random and shared experts": config(
        "sinusoidal",
        attention={"qk_norm": "head", "sinks": True},
        moe=MoEConfig(num_experts=4, hidden_dim=16, layers=("moe", "dense"), router="random", shared_experts=1),
    ),
    "prefix, sliding": config("none", attention={"mask": "prefix", "layers": ("sliding",)}),
}
LENGTHS, WIDTH, TOTAL, CAPACITY = np.asarray([1, 4, 9]), 10, 16, 18


# These differ from YaRN only in a table, which tests/model compares with the formulas.
SLOW = ("linear", "ntk", "llama3")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CONFIGS])
def test_cached_logits_equal_uncached(name):
    """Right-padded prompts of different lengths, then single tokens, then three at once."""
    c = CONFIGS[name]
    c.validate()
    model = unstack(random_model(c))
    tokens = np.random.default_rng(3).integers(0, c.vocab_size, (3, TOTAL))
    slots = np.arange(TOTAL)
    prefix = slots < LENGTHS[:, None] if c.attention.mask == "prefix" else None

    @jax.jit
    def uncached(model, valid_BT):
        return logits(model, forward(model, tokens, valid_BT=valid_BT, prefix_BT=prefix).hidden_BTD)

    @jax.jit
    def cached(model, cache, new_BT, valid_BT, prefix_BT):
        out = forward(model, new_BT, cache=cache, valid_BT=valid_BT, prefix_BT=prefix_BT)
        return logits(model, out.hidden_BTD), out.cache

    rows = np.arange(3)
    wide_prefix = None if prefix is None else np.pad(prefix, ((0, 0), (0, CAPACITY - TOTAL)))
    padded = np.where(slots[:WIDTH] < LENGTHS[:, None], tokens[:, :WIDTH], 63)
    real, prefix_BP = slots[:WIDTH] < LENGTHS[:, None], None if prefix is None else prefix[:, :WIDTH]
    got, cache = cached(model, init_cache(model, 3, CAPACITY), padded, real, prefix_BP)
    expected = uncached(model, slots < LENGTHS[:, None])
    assert_close(got[rows, LENGTHS - 1], expected[rows, LENGTHS - 1], 1e-5)

    lengths = LENGTHS
    cache = cache.at_length(jnp.asarray(lengths, jnp.int32))
    for steps in (1, 1, 1, 3):
        positions = lengths[:, None] + np.arange(steps)
        got, cache = cached(model, cache, tokens[rows[:, None], positions], None, wide_prefix)
        lengths = lengths + steps
        expected = uncached(model, slots < lengths[:, None])
        assert_close(got, expected[rows[:, None], positions], 1e-5)
        assert (np.asarray(cache.length_B) == lengths).all()
    assert np.abs(expected).max() > 0.5


def test_expert_capacity_does_not_make_logits_depend_on_the_bucket():
    """Padding makes sequences longer, and capacity grows with them; with a cache, no token is dropped."""
    moe = MoEConfig(num_experts=4, hidden_dim=16, capacity_factor=1.0)
    model = unstack(random_model(tiny_config(num_layers=1, moe=moe)))
    prompt = np.random.default_rng(0).integers(0, 64, (1, 8))

    @jax.jit
    def prefill(model, tokens_BT, valid_BT):
        out = forward(model, tokens_BT, cache=init_cache(model, 1, 40), valid_BT=valid_BT)
        return logits(model, out.hidden_BTD), out.router.dropped

    found = []
    for width in (8, 32):
        padded = np.pad(prompt, ((0, 0), (0, width - 8)))
        got, dropped = prefill(model, padded, np.arange(width)[None] < 8)
        assert float(dropped.max()) == 0
        found.append(np.asarray(got)[:, :8])
    assert_close(found[0], found[1], 1e-5)
    dropped = jax.jit(lambda model, tokens_BT: forward(model, tokens_BT).router.dropped)(model, prompt)
    assert float(dropped.max()) > 0.1, "scoring the same sequence without a cache drops tokens"
