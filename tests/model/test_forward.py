"""Properties of `forward` for any architecture: visibility, packing, dropout, and independence of layers' storage."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from model.config import MLPConfig, MoEConfig, NormConfig, PositionConfig, layer_specs, scan_groups
from model.transformer import compute_dtype, dropout, forward, logits, unstack
from tests.closeness import assert_close
from tests.model.reference import sees
from tests.model.test_reference import packed, prefixed, tokens
from tests.models import TINY_ATTENTION, random_model, tiny_config


@jax.jit
def predict(model, batch):
    out = forward(model, **batch)
    return logits(model, out.hidden_BTD), out.router


# --- visibility

VISIBILITY = {
    "causal, moe": (dict(moe=MoEConfig(4, 2, 24)), tokens),
    "sliding, block-sparse, sinks": (
        dict(
            attention=replace(
                TINY_ATTENTION, layers=("sliding", "block_sparse"), window=3, blocks=(3, 1, 2), sinks=True
            )
        ),
        tokens,
    ),
    "bidirectional, sliding": (
        dict(attention=replace(TINY_ATTENTION, mask="bidirectional", layers=("sliding",), window=3)),
        tokens,
    ),
    "prefix": (dict(attention=replace(TINY_ATTENTION, mask="prefix")), prefixed),
    "packed": (dict(), packed),
}


@pytest.mark.parametrize("name", VISIBILITY)
def test_gradients_flow_only_from_visible_tokens(name):
    changes, inputs = VISIBILITY[name]
    config = tiny_config(**changes)
    model, batch = random_model(config), inputs()
    T = batch["tokens_BT"].shape[1]
    batch = {k: x[:1] for k, x in batch.items()} | {"tokens_BT": np.arange(T, dtype=np.int32)[None]}

    @jax.jit
    def dependence(model):
        """Return [query, token]: the influence of each token's embedding on each prediction. All tokens differ."""

        def outputs(embedding):
            node = jax.tree.unflatten(structure, [embedding, *leaves[1:]])
            return jnp.sin(logits(node, forward(node, **batch).hidden_BTD)).sum((0, 2))

        leaves, structure = jax.tree.flatten(model)
        return jnp.abs(jax.jacrev(outputs)(leaves[0]))[:, :T].max(-1)

    reach = np.eye(T, dtype=bool)
    for i in range(config.num_layers):
        kind = config.attention.layers[i % len(config.attention.layers)]
        ids, prefix = (batch.get(k, [None])[0] for k in ("segment_ids_BT", "prefix_BT"))
        visible = np.array([[sees(config.attention, kind, q, k, ids, prefix) for k in range(T)] for q in range(T)])
        reach = reach | (visible @ reach)
    moved = np.asarray(dependence(model)) > 0
    np.testing.assert_array_equal(moved, reach)


def test_later_tokens_do_not_change_a_prediction():
    model, batch = random_model(tiny_config(moe=MoEConfig(4, 2, 24))), tokens()
    before, _ = predict(model, batch)
    changed = batch["tokens_BT"].copy()  # a copy, because the asynchronous first call may still read the original
    changed[:, 11:] = (changed[:, 11:] + 7) % 64
    after, _ = predict(model, batch | {"tokens_BT": changed})
    np.testing.assert_allclose(after[:, :11], before[:, :11], atol=1e-6)
    assert np.abs(after - before)[:, 11:].min(-1).max() > 1e-3


# --- packing


@pytest.mark.parametrize("position", ["rope", pytest.param("learned", marks=pytest.mark.slow), "alibi"])
def test_packed_rows_match_separate_rows(position):
    config = tiny_config(
        num_layers=3,
        position=PositionConfig(position),
        attention=replace(TINY_ATTENTION, layers=("global", "sliding", "block_sparse"), sinks=True, blocks=(2, 1, 2)),
        moe=MoEConfig(4, 2, 24, layers=("dense", "moe")),
    )
    model, together = random_model(config), packed()
    ids, T = together["segment_ids_BT"], together["tokens_BT"].shape[1]
    separate = {k: [] for k in together}
    segments_of_rows = []
    for b in range(2):
        for s in range(1, ids[b].max() + 1):
            where = np.flatnonzero(ids[b] == s)
            segments_of_rows.append((b, where))
            for k, x in together.items():
                separate[k].append(np.pad(x[b, where], (0, T - len(where))))  # padding has segment 0
    separate = {k: np.stack(x) for k, x in separate.items()}
    empty = len(segments_of_rows) - 2  # rows of padding only, so that both batches run the same program
    together = {k: np.pad(x, ((0, empty), (0, 0))) for k, x in together.items()}
    ids = together["segment_ids_BT"]
    ours, stats = predict(model, together)
    theirs, stats_separate = predict(model, separate)
    for row, (b, where) in enumerate(segments_of_rows):
        assert_close(ours[b, where], theirs[row, : len(where)], 1e-5)
    for row, (b, where) in enumerate(segments_of_rows):
        np.testing.assert_array_equal(stats.choices_BTC[:, b, where], stats_separate.choices_BTC[:, row, : len(where)])
    found, expected = (s._replace(choices_BTC=None) for s in (stats, stats_separate))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, expected)

    padding = ids == 0
    together["tokens_BT"] = np.where(padding, (together["tokens_BT"] + 5) % 64, together["tokens_BT"])
    again, stats_again = predict(model, together)
    np.testing.assert_array_equal(again[~padding], ours[~padding])
    jax.tree.map(np.testing.assert_array_equal, stats, stats_again)


# --- dropout


def test_dropout_needs_a_key_and_is_independent_for_each_branch_and_layer():
    config = tiny_config(
        dropout=0.5,
        embedding_scale=0.0,
        norm=NormConfig(epsilon=1e6),  # the final norm only divides by 1000
        attention=replace(TINY_ATTENTION, bias="all"),
        mlp=MLPConfig("gelu", 48, bias=True),
    )
    # Only the output biases of the four branches are nonzero, each 1, so every entry counts the branches that were
    # kept.
    model = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full_like(x, float(any(n in str(path) for n in ("out_bias", "down_bias", "scale")))),
        random_model(config),
    )

    @jax.jit
    def kept(model, batch, key):
        return forward(model, **batch, dropout_key=key).hidden_BTD * 1000

    batch = tokens()
    np.testing.assert_allclose(kept(model, batch, None), 4.0, rtol=1e-4)
    drawn = np.asarray(kept(model, batch, jax.random.key(0))) / 2
    counts = [np.mean(np.abs(drawn - n) < 1e-3) for n in range(5)]
    np.testing.assert_allclose(counts, np.array([1, 4, 6, 4, 1]) / 16, atol=0.06)
    np.testing.assert_array_equal(kept(model, batch, jax.random.key(0)) / 2, drawn)
    assert not np.array_equal(kept(model, batch, jax.random.key(1)) / 2, drawn)
    assert not np.array_equal(drawn[0], drawn[1])


def test_dropout_keeps_the_expectation():
    x = jnp.full((200, 100), 3.0)
    y = np.asarray(dropout(x, 0.2, jax.random.key(0)))
    np.testing.assert_allclose(np.unique(y), [0.0, 3.75])
    np.testing.assert_allclose([(y == 0).mean(), y.mean()], [0.2, 3.0], atol=0.04)
    assert dropout(x, 0.2, None) is x


# --- layers as scan groups


@given(
    pattern=st.lists(st.sampled_from(["global", "sliding", "block_sparse"]), min_size=1, max_size=4),
    layers=st.integers(1, 14),
    experts=st.none() | st.lists(st.sampled_from(["dense", "moe"]), min_size=1, max_size=5),
)
@hypothesis_settings(deadline=None, max_examples=150)
def test_segments_give_the_layers_with_the_fewest_loop_bodies(pattern, layers, experts):
    config = tiny_config(
        num_layers=layers,
        attention=replace(TINY_ATTENTION, layers=tuple(pattern)),
        moe=None if experts is None else MoEConfig(layers=tuple(experts)),
    )
    specs = layer_specs(config)
    assert [s.attention for s in specs] == [pattern[i % len(pattern)] for i in range(layers)]
    assert [s.moe for s in specs] == [experts is not None and experts[i % len(experts)] == "moe" for i in range(layers)]
    plan = scan_groups(config)
    assert [spec for s in plan for _ in range(s.repeats) for spec in s.pattern] == specs
    fewest = min(
        layers - period * (repeats - 1)
        for start in range(layers)
        for period in range(1, layers - start + 1)
        for repeats in range(1, (layers - start) // period + 1)
        if specs[start : start + period] * repeats == specs[start : start + period * repeats]
    )
    assert sum(len(s.pattern) for s in plan) == fewest


# --- stacking and rematerialization

DEEP = tiny_config(num_layers=4, moe=MoEConfig(4, 2, 24, layers=("moe", "dense")))


def with_config(model, config):
    """Return `model` with the same weights and another config, which every block refers to."""
    fresh = jax.eval_shape(lambda: type(model)(jax.random.key(0), config, model.rules))
    return jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(model))


def loss(model, batch):
    out = forward(model, **batch)
    squares = jnp.square(logits(model, out.hidden_BTD)).mean()
    return squares + 0.1 * out.router.load_balance.sum() + 0.01 * out.router.z.sum()


slow = pytest.mark.slow
LAYOUTS = [
    dict(scan_unroll=0, remat="offload"),
    *(
        pytest.param(changes, marks=slow)
        for changes in (
            dict(scan_unroll=2, remat="dots"),
            dict(remat="names", remat_names=("qkv", "mlp_hidden")),
            dict(scan_unroll=0),
            dict(remat="full"),
            dict(remat="offload"),
        )
    ),
]
value_and_gradient = jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("changes", LAYOUTS, ids=lambda c: " ".join(map(str, c.values())))
def test_unrolling_and_rematerialization_change_neither_value_nor_gradient(changes):
    model, batch = random_model(DEEP), tokens()
    value, gradient = value_and_gradient(model, batch)
    value_2, gradient_2 = value_and_gradient(with_config(model, replace(DEEP, **changes)), batch)
    np.testing.assert_allclose(value_2, value, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_2), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


def count(jaxpr, primitive: str) -> int:
    """Return how often `primitive` occurs in a jaxpr, including nested ones."""
    inner = [
        p for e in jaxpr.eqns for p in jax.tree.leaves(list(e.params.values()), is_leaf=lambda p: hasattr(p, "eqns"))
    ]
    inner = [getattr(p, "jaxpr", p) for p in inner]
    return sum(e.primitive.name == primitive for e in jaxpr.eqns) + sum(
        count(p, primitive) for p in inner if hasattr(p, "eqns")
    )


def test_rematerialization_recomputes_according_to_its_policy():
    config = tiny_config()
    model, batch = random_model(config), tokens()

    def matmuls(**changes):
        other = with_config(model, replace(config, **changes))
        gradient = jax.make_jaxpr(jax.grad(lambda m: jnp.square(forward(m, **batch).hidden_BTD).sum()))(other)
        return count(gradient.jaxpr, "dot_general")

    none, dots, full = matmuls(), matmuls(remat="dots"), matmuls(remat="full")
    some = matmuls(remat="names", remat_names=("qkv", "mlp_hidden"))
    assert none <= dots < some < full  # dots may recompute products of two activations, as in attention
    assert none < matmuls(remat="names") <= full


def test_unstacked_layers_match_stacked_ones():
    model, batch = random_model(DEEP), tokens()
    unstacked = unstack(model)
    assert len(unstacked.stacks) == DEEP.num_layers > len(model.stacks)
    for a, b in zip(jax.tree.leaves(predict(model, batch)), jax.tree.leaves(predict(unstacked, batch)), strict=True):
        assert_close(b, a, 1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 0.06), ("float16", 0.01)])
def test_half_precision_is_close_and_keeps_float32_weights_and_logits(dtype, tolerance):
    config = tiny_config(attention=replace(TINY_ATTENTION, qk_norm="head", softcap=20.0))
    model, batch = random_model(config), tokens()
    half = with_config(model, replace(config, dtype=dtype))
    out = jax.eval_shape(lambda m: forward(m, **batch), half)
    assert out.hidden_BTD.dtype == compute_dtype(half.config) == jnp.dtype(dtype)
    full, close = np.asarray(predict(model, batch)[0]), np.asarray(predict(half, batch)[0])
    assert close.dtype == np.float32
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    error = np.linalg.norm(close - full) / np.linalg.norm(full)
    assert 0 < error < tolerance
