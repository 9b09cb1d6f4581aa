"""Chunked cross-entropy matches float64, whole vocabularies and one device, and uses less memory than plain code."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from model.transformer import logits
from sharding.mesh import MeshConfig, make_mesh, put_batch, use_mesh
from tests.models import random_model, tiny_config
from tests.sharding.test_equivalence import on_mesh
from tests.train.batches import packed_batch
from train.config import TrainConfig
from train.cross_entropy import CHUNK_IDS, cross_entropy
from train.objectives import make_objective, token_losses


def problem(seed: int, rows: tuple[int, ...], D: int, V: int, vocab_axis: int = 1):
    """Return (hidden, head, targets, cotangents of nll and log total), float32; logits have standard deviation 2."""
    draw = np.random.default_rng(seed)
    hidden = draw.standard_normal((*rows, D)).astype(np.float32)
    head = (2 * D**-0.5 * draw.standard_normal((D, V))).astype(np.float32)
    dnll, dlog_total = draw.standard_normal((2, *rows)).astype(np.float32)
    return hidden, head if vocab_axis else head.T.copy(), draw.integers(0, V, rows).astype(np.int32), dnll, dlog_total


def in_float64(hidden, head, targets, dnll, dlog_total, vocab_axis: int = 1, softcap: float | None = None):
    """Return (nll, log total, gradient of hidden, gradient of head) by the formulas, with all logits at once."""
    x, w = hidden.astype(np.float64).reshape(-1, hidden.shape[-1]), head.astype(np.float64)
    w = w if vocab_axis else w.T
    t, a, b = (
        y.reshape(-1).astype(y.dtype if y.dtype == np.int32 else np.float64) for y in (targets, dnll, dlog_total)
    )
    raw = x @ w
    logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = logits.max(1, keepdims=True)
    log_total = top[:, 0] + np.log(np.exp(logits - top).sum(1))
    hit = np.eye(w.shape[1])[t]
    slope = np.exp(logits - log_total[:, None]) * (a + b)[:, None] - hit * a[:, None]
    if softcap is not None:
        slope *= 1 - np.tanh(raw / softcap) ** 2
    dhead = x.T @ slope
    nll = log_total - (logits * hit).sum(1)
    shape = targets.shape
    return (
        nll.reshape(shape),
        log_total.reshape(shape),
        (slope @ w.T).reshape(hidden.shape),
        dhead if vocab_axis else dhead.T,
    )


def run(hidden, head, targets, dnll, dlog_total, **options):
    """Return the same four values from a jitted `cross_entropy`."""

    @jax.jit
    def both(hidden, head, targets, dnll, dlog_total):
        out, pull = jax.vjp(lambda h, w: cross_entropy(h, w, targets, **options), hidden, head)
        return *out, *pull((dnll, dlog_total))

    return both(hidden, head, targets, dnll, dlog_total)


def near(found, expected, tolerance: float):
    """Compare within `tolerance` of the largest entry, or of 1 (the size of the cotangents) if all are small."""
    for name, a, b in zip(("nll", "log_total", "dhidden", "dhead"), found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float64), b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1), err_msg=name
        )


# ------------------------------------------------------------------------------------------------------- one device


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.integers(0, 99),
    st.sampled_from([(1,), (5,), (2, 3)]),
    st.integers(1, 9),
    st.integers(1, 23),
    st.integers(1, 25),
    st.sampled_from([None, 1.5]),
    st.sampled_from([0, 1]),
)  # no shrinking: each smaller shape would need a compilation
def test_chunks_of_any_size_give_the_losses_and_gradients_of_float64(seed, rows, D, V, chunk, softcap, vocab_axis):
    values = problem(seed, rows, D, V, vocab_axis)
    expected = in_float64(*values, vocab_axis=vocab_axis, softcap=softcap)
    found = run(*values, vocab_axis=vocab_axis, softcap=softcap, chunk=chunk)
    assert found[0].dtype == found[1].dtype == jnp.float32
    near(found, expected, 3e-6)


@pytest.mark.parametrize("chunk", [None, 64, 1000])
def test_large_logits_neither_overflow_nor_vanish(chunk):
    """Logits of several hundred: the largest is in the last chunk of the first row and the first chunk of others."""
    hidden, head, *rest = problem(0, (6,), 16, 1000)
    head[:, 999], head[:, 3] = 100 * hidden[0] / 16, 100 * hidden[1] / 16
    near(run(hidden, head, *rest, chunk=chunk), in_float64(hidden, head, *rest), 3e-6)


@pytest.mark.parametrize("chunk", [None, 100])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.bfloat16, 8e-3), (jnp.float16, 1e-3)])
def test_half_precision_keeps_float32_sums(dtype, tolerance, chunk):
    """The tolerance is two roundings of the gradients to the dtype; losses come from products summed in float32."""
    hidden, head, *rest = problem(1, (32,), 64, 300)
    low = [jnp.asarray(x, dtype) for x in (hidden, head)]
    exact = in_float64(*(np.asarray(x, np.float32) for x in low), *rest)
    found = run(*low, *rest, chunk=chunk)
    assert [x.dtype for x in found] == [jnp.float32, jnp.float32, dtype, dtype]
    near(found, exact, tolerance)
    np.testing.assert_allclose(found[0], exact[0], rtol=0, atol=1e-5)


def test_a_nan_reaches_the_loss():
    hidden, head, *rest = problem(0, (3,), 8, 50)
    hidden[1, 2] = np.nan
    nll = run(hidden, head, *rest, chunk=16)[0]
    np.testing.assert_array_equal(np.isnan(nll), [False, True, False])


@pytest.mark.unchecked
def test_mismatched_arguments_are_refused():
    hidden, head, targets, *_ = problem(0, (3,), 8, 50)
    with pytest.raises(ValueError, match=r"chunk = 0: must be at least one"):
        cross_entropy(hidden, head, targets, chunk=0)
    with pytest.raises(ValueError, match="vocab_axis = 0"):
        cross_entropy(hidden, head, targets, vocab_axis=0)
    with pytest.raises(ValueError, match="targets"):
        cross_entropy(hidden, head, targets[:2])
    with pytest.raises(ValueError, match=r"train.loss_chunk = 0: must be at least 1"):
        TrainConfig(loss_chunk=0).validate()


# ------------------------------------------------------------------------------------------------------- memory


def temporaries(vocabulary: int, vocab_axis: int, plain: bool = False) -> float:
    """Return the megabytes of temporaries of a compiled loss with z-loss and gradients, for 2048 x 512 in float32."""

    def loss(hidden_ND, head, targets_N):
        if plain:
            logits_NV = hidden_ND @ (head if vocab_axis else head.T)
            log_total_N = jax.nn.logsumexp(logits_NV, axis=-1)
            nll_N = log_total_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
        else:
            nll_N, log_total_N = cross_entropy(hidden_ND, head, targets_N, vocab_axis=vocab_axis)
        return nll_N.sum() + 1e-4 * jnp.square(log_total_N).sum()

    head = (512, vocabulary) if vocab_axis else (vocabulary, 512)
    shapes = [jax.ShapeDtypeStruct(*x) for x in (((2048, 512), jnp.float32), (head, jnp.float32), ((2048,), jnp.int32))]
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


@pytest.mark.parametrize("vocab_axis", [0, 1])
def test_all_logits_of_a_large_vocabulary_are_never_stored_at_once(vocab_axis):
    """Plain code stores the logits twice: 2,148 MB at 131,072 ids and 4,295 MB at 262,144.

    Chunks take 88 MB for both: the logits of a chunk, and the gradient of the hidden states with a buffer for its sum.
    The head (268 MB) is not copied in either layout.
    """
    small, large = (temporaries(vocabulary, vocab_axis) for vocabulary in (131072, 262144))
    assert large < temporaries(262144, vocab_axis, plain=True) / 30
    assert small == large < 1.4 * 2048 * CHUNK_IDS * 4 / 1e6


# ------------------------------------------------------------------------------------------------------- meshes


@pytest.mark.parametrize("chunk, vocab_axis", [(None, 1), (5, 1), (5, 0)])
@pytest.mark.parametrize(
    "axes",
    [{"data": 2, "tensor": 4, "fsdp": 1}, {"fsdp": 2, "sequence": 2, "tensor": 2}, {"data": 2, "fsdp": 4}],
    ids=lambda axes: "".join(f"{k}{v}" for k, v in axes.items()),
)
def test_a_mesh_matches_one_device(axes, chunk, vocab_axis):
    """The vocabulary is sharded over `tensor`, tokens over the rest; gradients are sharded like the stored arrays."""
    values = problem(2, (8, 4), 16, 48, vocab_axis)
    expected = in_float64(*values, vocab_axis=vocab_axis, softcap=3.0)
    rows, stored, used = P(("data", "fsdp", "expert"), "sequence"), P("fsdp", "tensor"), P(None, "tensor")
    if vocab_axis == 0:
        stored, used = P("tensor", "fsdp"), P("tensor", None)
    mesh = make_mesh(MeshConfig(**axes))

    def loss(hidden, head, targets):
        return cross_entropy(
            hidden, jax.sharding.reshard(head, used), targets, softcap=3.0, chunk=chunk, vocab_axis=vocab_axis
        )

    @jax.jit
    def both(hidden, head, targets, dnll, dlog_total):
        out, pull = jax.vjp(lambda h, w: loss(h, w, targets), hidden, head)
        return *out, *pull((dnll, dlog_total))

    with use_mesh(mesh):
        specs = P(*rows, None), stored, rows, rows, rows
        spread = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in zip(values, specs, strict=True)]
        found = both(*spread)
    near(found, expected, 3e-6)
    for x, like in zip(found, (spread[2], spread[2], spread[0], spread[1]), strict=True):
        assert x.sharding == like.sharding


def test_tokens_and_vocabulary_over_one_mesh_axis_are_refused():
    hidden, head, targets, *_ = problem(2, (8, 4), 16, 48, 1)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with use_mesh(mesh):
        lay = lambda x, *spec: jax.device_put(x, jax.NamedSharding(mesh, P(*spec)))
        with pytest.raises(ValueError, match="mesh axis 'data' shards both"):
            cross_entropy(lay(hidden, "data", None, None), lay(head, None, "data"), lay(targets, "data", None))


# ------------------------------------------------------------------------------------------------------- training


def gradients(config, chunk: int | None, z_loss: float = 0.01):
    """Return a jitted (model, batch) -> (loss, gradients) of the configured objective."""
    objective = make_objective(TrainConfig(z_loss=z_loss, loss_chunk=chunk), config.vocab_size)
    return jax.jit(jax.value_and_grad(lambda model, batch: objective(model, None, batch, None).total))


def same(a, b, tolerance: float):
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.abs(y).max(), err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("tied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_training_is_the_same_in_chunks_on_one_device_and_on_a_mesh(tied):
    config = tiny_config(num_layers=1, tied_embeddings=tied, final_softcap=4.0, mup_base_dim=16)
    batch = packed_batch(0, 8, 9, config.vocab_size)
    model = random_model(config)
    whole = gradients(config, None)(model, batch)
    same(gradients(config, 24)(model, batch), whole, 3e-6)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with use_mesh(mesh):
        spread = put_batch(batch, mesh, model.rules.spec("activations", ("batch", None)))
        laid = on_mesh(config, mesh)
        value, grads = gradients(config, 24)(laid, spread)
    same((value, grads), whole, 1e-5)
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(laid), strict=True):
        assert g.sharding == w.sharding


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("tied", [True, False])
def test_token_losses_match_the_networks_logits(tied, chunk):
    model = random_model(tiny_config(num_layers=1, tied_embeddings=tied, final_softcap=4.0, mup_base_dim=16))
    draw = np.random.default_rng(0)
    hidden, targets = 3 * draw.standard_normal((2, 5, 32)).astype(np.float32), draw.integers(0, 64, (2, 5))
    nll, log_total = jax.jit(partial(token_losses, chunk=chunk))(model, hidden, targets)
    scores = np.asarray(logits(model, jnp.asarray(hidden)), np.float64)
    expected = np.log(np.exp(scores).sum(-1))
    np.testing.assert_allclose(log_total, expected, rtol=1e-6)
    np.testing.assert_allclose(nll, expected - np.take_along_axis(scores, targets[..., None], -1)[..., 0], rtol=1e-5)


def test_only_chunks_multiply_with_the_head_again():
    """Three matmuls for a whole vocabulary with stored logits; four each for the loop's chunk and for the last one."""
    hidden, head, targets = map(jnp.asarray, problem(0, (3,), 8, 50)[:3])
    for chunk, matmuls in ((None, 3), (16, 8)):
        loss = lambda hidden, head, chunk=chunk: cross_entropy(hidden, head, targets, chunk=chunk)[0].sum()
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, head)
        assert lowered.as_text().count("stablehlo.dot_general") == matmuls


def test_the_config_reaches_every_objective():
    """The program computes the logits of a chunk, but not those of the whole vocabulary."""
    config = tiny_config(vocab_size=104)
    model, batch = random_model(config), packed_batch(0, 2, 16, 104)
    for objective in ("next_token", "fill_in_middle", "prefix", "masked"):
        mask = {"prefix": "prefix", "masked": "bidirectional"}.get(objective, "causal")
        model.config = replace(config, attention=replace(config.attention, mask=mask))
        loss = make_objective(TrainConfig(objective=objective, loss_chunk=40), 104)
        text = str(jax.make_jaxpr(lambda model, loss=loss: loss(model, None, batch, jax.random.key(0)).total)(model))
        assert "f32[30,40]" in text and "f32[30,104]" not in text and "f32[2,15,104]" not in text, objective
    whole = str(jax.make_jaxpr(partial(token_losses, model))(jnp.zeros((2, 15, 32)), jnp.zeros((2, 15), jnp.int32)))
    assert "f32[30,104]" in whole
