"""The train step: microbatches, donation, loss scaling, refused updates and averages, equal on every mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from data.config import DataConfig
from model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from model.transformer import Transformer
from sharding.mesh import MeshConfig, put_batch, use_mesh
from tests.models import random_model, tiny_config, weight_names
from tests.train.batches import packed_batch, weighted, whole_rows
from train import step
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig
from train.objectives import NextToken
from train.program import Program, build
from train.step import TrainState, init_state, make_step, summed_gradients

VOCAB, ROWS, WIDTH = 64, 8, 17
RATE = optax.constant_schedule(0.01)
ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))


BATCH = whole_rows(0, ROWS, WIDTH, VOCAB)


def start(config: ModelConfig, train: TrainConfig) -> TrainState:
    return jax.jit(lambda model: init_state(jax.random.key(1), model, ADAM, train))(random_model(config))


def adam_step(train: TrainConfig) -> step.Step:
    return make_step(NextToken(), lambda hyper: ADAM, lambda hyper: RATE, train)


def bits(tree) -> list[bytes]:
    return [np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x).tobytes()
            for x in jax.tree.leaves(tree)]  # fmt: skip


def distances(a, b) -> dict[str, float]:
    """Return the relative distance |a - b| / |b| of each weight."""
    pairs = zip(weight_names(a), jax.tree.leaves(b), strict=True)
    return {name: float(np.linalg.norm(x - y) / np.linalg.norm(y)) for (name, x), y in pairs}


# ---------------------------------------------------------------------------------------------------- accumulation


@pytest.mark.parametrize(
    "moe, counts",
    [
        pytest.param(None, (2, 4), marks=pytest.mark.slow),
        (
            MoEConfig(num_experts=4, top_k=2, hidden_dim=16, load_balance=0.1, z_loss=0.1, balance_scope="sequence"),
            (4,),
        ),
    ],
    ids=["dense", "moe"],
)
def test_microbatches_match_the_large_batch(moe, counts):
    """Even if the slices hold unequal numbers of targets."""
    model = random_model(tiny_config(moe=moe))
    batch = packed_batch(3, ROWS, WIDTH, VOCAB, longest=12)
    objective = NextToken(z_loss=0.01)
    results = {}
    for microbatches in (1, *counts):
        gradients = jax.jit(
            lambda model, batch, n=microbatches: summed_gradients(
                objective, model, None, batch, jax.random.key(0), n, jnp.float32(1)
            )
        )
        results[microbatches] = gradients(model, batch)
    whole, grads = results.pop(1)
    for loss, summed in results.values():
        assert loss.count == whole.count
        np.testing.assert_allclose(loss.total, whole.total, rtol=1e-6)
        np.testing.assert_allclose(loss.metrics["loss"], whole.metrics["loss"], rtol=1e-6)
        assert max(distances(summed, grads).values()) < 3e-6, "float32 rounding of a gradient of peaked attention"


# ---------------------------------------------------------------------------------------------------- one device


@pytest.fixture(scope="module", params=["skip", "stop"])
def noisy(request):
    """(policy, compiled step, function that returns a new state), with dropout, an average and a donated state."""
    config = tiny_config(dropout=0.2)
    train = TrainConfig(ema_decay=0.9, nonfinite=request.param)
    state = start(config, train)
    function = jax.jit(adam_step(train), donate_argnums=0)
    return request.param, function.lower(state, BATCH).compile(), lambda: jax.tree.map(jnp.copy, state)


def test_the_state_is_updated_in_place(noisy):
    """No second copy of weights, moments and average."""
    _, compiled, fresh = noisy
    state = fresh()
    size = sum(x.nbytes for x in jax.tree.leaves((state.model, state.optimizer, state.ema)))
    assert compiled.memory_analysis().alias_size_in_bytes >= size
    compiled(state, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.model, state.optimizer, state.ema)) if x.size > 1)


def test_the_average_follows_its_formula(noisy):
    _, compiled, fresh = noisy
    state = fresh()
    expected = [np.asarray(x, np.float64) for x in jax.tree.leaves(state.model)]
    for _ in range(3):
        state, _ = compiled(state, BATCH)
        expected = [
            0.9 * e + 0.1 * np.asarray(x, np.float64)
            for e, x in zip(expected, jax.tree.leaves(state.model), strict=True)
        ]
    for e, x in zip(expected, jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_allclose(x, e, rtol=1e-5, atol=1e-6)


def test_dropout_differs_by_step_and_repeats_with_it(noisy):
    _, compiled, fresh = noisy
    losses = {
        at: [float(compiled(fresh()._replace(step=jnp.int32(at)), BATCH)[1]["loss"]) for _ in (0, 1)] for at in (0, 1)
    }
    assert losses[0][0] == losses[0][1] and losses[1][0] == losses[1][1]
    assert losses[0][0] != losses[1][0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(noisy, bad):
    policy, compiled, fresh = noisy
    state, _ = compiled(fresh(), BATCH)
    before = bits((state.model, state.optimizer, state.ema, state.loss_scale))
    state, metrics = compiled(state, weighted(BATCH, bad))
    assert bits((state.model, state.optimizer, state.ema, state.loss_scale)) == before
    assert (int(state.step), int(state.nonfinite), int(metrics["nonfinite"])) == (2, 1, 1)
    state, metrics = compiled(state, BATCH)
    assert np.isfinite(metrics["loss"]) and int(state.nonfinite) == 1
    changed = bits((state.model, state.optimizer, state.ema, state.loss_scale)) != before
    assert changed == (policy == "skip"), "after a refused update, 'stop' freezes the state and 'skip' continues"


def test_a_skipped_batch_leaves_no_trace(noisy):
    """With 'skip', the step after a refused update equals a step from the state before it, except for its number."""
    policy, compiled, fresh = noisy
    if policy == "stop":
        pytest.skip("its later steps change nothing")
    refused, _ = compiled(fresh(), weighted(BATCH, np.nan))
    after, _ = compiled(refused, BATCH)
    direct, _ = compiled(fresh()._replace(step=jnp.int32(1)), BATCH)
    assert bits(after._replace(nonfinite=direct.nonfinite)) == bits(direct)


# ---------------------------------------------------------------------------------------------------- precision


@pytest.fixture(scope="module")
def float16():
    """(compiled step with a growth period of 2, new state) in float16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "LOSS_SCALE_GROWTH_STEPS", 2)
        state = start(tiny_config(dtype="float16"), TrainConfig(nonfinite="stop"))
        compiled = jax.jit(adam_step(TrainConfig(nonfinite="stop"))).lower(state, BATCH).compile()
    return compiled, state


def test_a_float16_overflow_halves_the_scale_and_is_not_counted(float16):
    compiled, state = float16
    assert float(state.loss_scale) == 2.0**15
    state = state._replace(loss_scale=jnp.float32(2.0**60), finite_steps=jnp.int32(1))
    before = bits((state.model, state.optimizer))
    for halvings in (1, 2):
        state, metrics = compiled(state, BATCH)
        assert not np.isfinite(metrics["grad_norm"]) and np.isfinite(metrics["loss"])
        assert bits((state.model, state.optimizer)) == before
        assert float(state.loss_scale) == 2.0 ** (60 - halvings)
        assert int(state.nonfinite) == int(state.finite_steps) == 0
    moved, _ = compiled(state._replace(loss_scale=jnp.float32(2.0**10)), BATCH)
    assert bits(moved.model) != before and int(moved.nonfinite) == 0, "the run continues even with 'stop'"


def test_the_scale_grows_after_enough_finite_steps(float16):
    compiled, state = float16
    state = state._replace(loss_scale=jnp.float32(2.0**8))
    scales = []
    for _ in range(5):
        state, _ = compiled(state, BATCH)
        scales.append(float(state.loss_scale) / 2**8)
    assert scales == [1, 2, 2, 4, 4]


def test_float16_trains_like_float32_at_every_scale(float16):
    compiled, state = float16
    after = [compiled(state._replace(loss_scale=jnp.float32(2.0**s)), BATCH) for s in (6, 12)]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(after[0][1][name], after[1][1][name], rtol=2e-3)
    exact = jax.jit(adam_step(TrainConfig()))(start(tiny_config(), TrainConfig()), BATCH)[1]
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(after[0][1][name], exact[name], rtol=1e-2)


def test_a_nan_in_float16_at_the_smallest_scale_is_counted(float16):
    compiled, state = float16
    state, _ = compiled(state._replace(loss_scale=jnp.float32(2.0**-24)), weighted(BATCH, np.nan))
    assert (int(state.nonfinite), float(state.loss_scale)) == (1, 2.0**-24)


def test_matmuls_use_bfloat16_and_the_state_is_float32():
    train = TrainConfig()
    state = start(tiny_config(dtype="bfloat16"), train)
    function = jax.jit(adam_step(train))
    text = function.lower(state, BATCH).as_text()
    assert "xbf16>" in text, "matmuls in bfloat16"
    losses = []
    for _ in range(4):
        state, metrics = function(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    floats = [x for x in jax.tree.leaves((state.model, state.optimizer)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert {str(x.dtype) for x in floats} == {"float32"}


# ---------------------------------------------------------------------------------------------------- meshes


def experiment(mesh: MeshConfig, optimizer: str = "adamw", moe: bool = False) -> Experiment:
    model = tiny_config(
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="head"),
        mlp=MLPConfig(hidden_dim=48),
        moe=MoEConfig(num_experts=4, top_k=2, hidden_dim=16) if moe else None,
        dropout=0.1,
    )
    return Experiment(
        name="tiny", model=model, mesh=mesh, data=DataConfig(sequence_length=WIDTH - 1, batch_size=ROWS),
        optimizer=OptimizerConfig(name=optimizer, learning_rate=0.01, warmup_steps=0),
        train=TrainConfig(ema_decay=0.9, steps=10), samples=SampleConfig(count=0),
    )  # fmt: skip


def built(config: Experiment, devices: int) -> Program:
    config.validate(devices)
    return build(config, devices=jax.devices()[:devices])


def laid_out(state: TrainState, program: Program) -> TrainState:
    """Return a copy of `state` sharded as the program requires.

    It equals the state that the program would make (see the last test), without the compilation.
    """
    return jax.tree.map(lambda x, there: jax.device_put(jnp.copy(x), there.sharding), state, program.abstract_state)


def three_steps(program: Program, state: TrainState) -> tuple[list[tuple[float, float]], TrainState]:
    with use_mesh(program.mesh):
        function = jax.jit(program.step, donate_argnums=0)
        losses = []
        for i in range(3):
            batch = packed_batch(i, ROWS, WIDTH, VOCAB, longest=12)
            state, metrics = function(state, put_batch(batch, program.mesh, program.batch_spec))
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return losses, state


def axes(x: jax.Array) -> set[str]:
    return {axis for part in x.sharding.spec if part for axis in ((part,) if isinstance(part, str) else part)}


CASES = [
    pytest.param(MeshConfig(data=8, fsdp=1), "adamw", False, set(), id="dp", marks=pytest.mark.slow),
    pytest.param(MeshConfig(fsdp=8), "adamw", False, {"fsdp"}, id="fsdp", marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=2, fsdp=2, tensor=2), "adamw", False, {"fsdp", "tensor"}, id="dp-fsdp-tp"),
    pytest.param(
        MeshConfig(data=2, fsdp=2, tensor=2), "muon", False, {"fsdp", "tensor"}, id="muon", marks=pytest.mark.slow
    ),
    pytest.param(MeshConfig(fsdp=4, tensor=2), "adafactor", False, {"fsdp"}, id="adafactor", marks=pytest.mark.slow),
    pytest.param(
        MeshConfig(fsdp=2, expert=2, tensor=2), "adamw", True, {"fsdp", "tensor"}, id="experts", marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize(("mesh", "optimizer", "moe", "expected"), CASES)
def test_a_mesh_trains_like_one_device_and_keeps_its_shardings(mesh, optimizer, moe, expected):
    lone_program = built(experiment(MeshConfig(), optimizer, moe), 1)
    program = built(experiment(mesh, optimizer, moe), 8)
    first = jax.jit(lone_program.make_state)()
    losses, state = three_steps(program, laid_out(first, program))
    single, lone = three_steps(lone_program, first)
    np.testing.assert_allclose([loss for loss, _ in losses], [loss for loss, _ in single], rtol=1e-5)
    np.testing.assert_allclose([norm for _, norm in losses], [norm for _, norm in single], rtol=1e-4)

    asked = jax.tree.leaves(program.abstract_state)
    for x, y in zip(jax.tree.leaves(state), asked, strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
    for name, weight in weight_names(state.model):
        if name.rsplit(".", 1)[-1] in ("q", "k", "v", "out", "up", "down", "embedding", "head"):
            assert axes(weight) >= expected, name
    # Arrays of the optimizer state and the average that have the shape of a weight are sharded like that weight.
    layouts: dict[tuple, set] = {}
    for weight in jax.tree.leaves(state.model):
        layouts.setdefault(weight.shape, set()).add(str(weight.sharding.spec))
    for leaf in jax.tree.leaves((state.optimizer, state.ema)):
        if leaf.shape in layouts:
            assert str(leaf.sharding.spec) in layouts[leaf.shape], leaf.shape
    if optimizer == "adamw":
        assert max(distances(state.model, lone.model).values()) < 1e-3


@pytest.mark.parametrize(
    ("objective", "mask"),
    [
        ("fill_in_middle", "causal"),
        pytest.param("masked", "bidirectional", marks=pytest.mark.slow),
        pytest.param("prefix", "prefix", marks=pytest.mark.slow),
    ],
)
def test_objectives_draw_the_same_on_a_mesh(objective, mask):
    """This includes microbatches, and the scores of an evaluation, which also draws if the objective is random."""
    found, first = [], None
    for devices, mesh in ((1, MeshConfig()), (8, MeshConfig(fsdp=4, tensor=2))):
        base = experiment(mesh)
        config = dataclasses.replace(
            base,
            model=tiny_config(attention=dataclasses.replace(base.model.attention, mask=mask), num_layers=1),
            data=dataclasses.replace(base.data, batch_size=2 * ROWS),
            train=TrainConfig(objective=objective, microbatches=2, steps=10, fim_rate=0.9),
        )
        program = built(config, devices)
        first = jax.jit(program.make_state)() if first is None else first
        with use_mesh(program.mesh):
            state = laid_out(first, program)
            batch = put_batch(packed_batch(0, 2 * ROWS, WIDTH, VOCAB), program.mesh, program.batch_spec)
            _, metrics = jax.jit(program.step)(state, batch)
            scored = () if objective == "fill_in_middle" else program.score(state.model, batch)[:2]
        found.append([float(x) for x in (metrics["loss"], metrics["grad_norm"], metrics["tokens"], *scored)])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_weights_are_the_same_on_every_mesh():
    """The initial values depend on the seed and not on the sharding, and the sharding is the requested one."""
    config = dataclasses.replace(experiment(MeshConfig()), train=TrainConfig())
    states = []
    for devices, mesh in ((1, MeshConfig()), (8, MeshConfig(fsdp=4, tensor=2))):
        program = built(dataclasses.replace(config, mesh=mesh), devices)
        with use_mesh(program.mesh):
            states.append(jax.jit(program.make_state)())
    for x, y in zip(jax.tree.leaves(states[1]), jax.tree.leaves(program.abstract_state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (x.sharding, y.sharding)
    assert isinstance(states[0].model, Transformer)
    assert bits(states[0].model) == bits(states[1].model)
