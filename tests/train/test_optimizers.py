"""AdamW matches float64 NumPy, schedules match values by hand, and Muon and muP have their defining properties."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.config import AttentionConfig, MoEConfig, NormConfig, PositionConfig
from model.transformer import Transformer, forward
from model.weights import named_weights
from sharding.config import MeshConfig
from sharding.mesh import make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.models import random_model, tiny_config, weight_names
from tests.train.batches import whole_rows
from train.config import OptimizerConfig
from train.objectives import NextToken
from train.optimizers import make_optimizer, schedule

OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")
# All kinds of weights that a decay mask must distinguish: norms with biases, q/k norms, attention biases, sinks,
# experts, learned positions.
FULL = tiny_config(
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, bias="all", sinks=True, qk_norm="head"),
    norm=NormConfig(kind="layernorm", bias=True),
    position=PositionConfig(kind="learned"),
    moe=MoEConfig(num_experts=4, top_k=2, hidden_dim=24),
)
VECTORS = ("scale", "bias", "sinks")  # endings of the names of weights that are not matrices


def is_vector(name: str) -> bool:
    return name.rsplit(".", 1)[-1].endswith(VECTORS)


def values(tree) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in weight_names(tree)}


def random_like(model, seed: int):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.standard_normal(x.shape).astype(np.float32), model)


def one_update(config: OptimizerConfig, model_config, model, grads) -> dict[str, np.ndarray]:
    optimizer = make_optimizer(config, model_config, steps=10)
    update = jax.jit(lambda grads, model: optimizer.update(grads, optimizer.init(model), model)[0])
    return values(update(grads, model))


def constant_rate(name: str, **changes) -> OptimizerConfig:
    fields = {"learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": None}
    return OptimizerConfig(name=name, **{**fields, **changes})


@pytest.fixture(scope="module")
def full():
    return random_model(FULL)


# ---------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1}),
        ("linear", {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1}),
        ("wsd", {0: 0, 5: 0.5, 10: 1, 60: 1, 90: 1, 100: 0.55, 110: 0.1}),  # the last 20 of 100 steps after warm-up
        ("exponential", {0: 0, 5: 0.5, 10: 1, 60: 0.1**0.5, 110: 0.1}),
        ("inverse_sqrt", {0: 0, 5: 0.5, 10: 1, 40: 0.5, 90: 1 / 3}),
        ("constant", {0: 0, 5: 0.5, 10: 1, 60: 1, 110: 1}),
    ],
)
def test_each_schedule_matches_values_by_hand(kind, expected):
    config = OptimizerConfig(learning_rate=0.2, schedule=kind, warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
    rate = schedule(config, steps=110)
    found = {step: float(rate(step)) for step in expected}
    assert found == pytest.approx({step: 0.2 * part for step, part in expected.items()}, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "exponential", "inverse_sqrt", "constant"])
def test_without_warm_up_a_schedule_starts_at_its_peak_and_never_rises(kind):
    rates = [
        float(schedule(OptimizerConfig(learning_rate=0.2, schedule=kind, warmup_steps=0), 50)(s)) for s in range(60)
    ]
    assert rates[0] == pytest.approx(0.2) and all(a >= b >= 0 for a, b in itertools.pairwise(rates))


# ---------------------------------------------------------------------------------------------------- AdamW


def test_adamw_equals_float64_numpy(full):
    """Five steps with warm-up, cosine, the decay mask, and clipping that is active on some of them."""
    config = OptimizerConfig(
        learning_rate=0.03, warmup_steps=2, betas=(0.8, 0.9), epsilon=1e-6, weight_decay=0.2, clip_norm=200.0
    )
    optimizer = make_optimizer(config, FULL, steps=5)
    model, state = full, optimizer.init(full)
    update = jax.jit(optimizer.update)
    w = {name: x.astype(np.float64) for name, x in values(full).items()}
    m, v = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    for t in range(5):
        grads = jax.tree.map(lambda g, t=t: g * (0.1 + t), random_like(full, t))
        updates, state = update(grads, state, model)
        model = optax.apply_updates(model, updates)

        g = {name: x.astype(np.float64) for name, x in values(grads).items()}
        norm = np.sqrt(sum(np.square(x).sum() for x in g.values()))
        assert (norm > 200) == (t >= 2), "clipping must be active on some steps only"
        lr = 0.03 * t / 2 if t < 2 else 0.03 * (0.1 + 0.9 * (1 + np.cos(np.pi * (t - 2) / 3)) / 2)
        for name in w:
            clipped = g[name] * min(1, 200 / norm)
            m[name] = 0.8 * m[name] + 0.2 * clipped
            v[name] = 0.9 * v[name] + 0.1 * clipped**2
            step = m[name] / (1 - 0.8 ** (t + 1)) / (np.sqrt(v[name] / (1 - 0.9 ** (t + 1))) + 1e-6)
            w[name] = w[name] - lr * (step + (0 if is_vector(name) else 0.2) * w[name])
    for name, x in values(model).items():
        np.testing.assert_allclose(x, w[name], rtol=2e-5, atol=2e-6, err_msg=name)


# ---------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_decay_shrinks_matrices_and_leaves_norms_biases_and_sinks(full, name, decay):
    """With a zero gradient, the update is the decay, rate * weight_decay of the weight."""
    zeros = jax.tree.map(jnp.zeros_like, full)
    updates = one_update(constant_rate(name, weight_decay=0.5, decay=decay), FULL, full, zeros)
    assert sum(map(is_vector, updates)) >= 8
    for path, w in values(full).items():
        expected = np.zeros_like(w) if decay == "matrices" and is_vector(path) else -0.01 * 0.5 * w
        np.testing.assert_allclose(updates[path], expected, rtol=1e-5, atol=1e-7, err_msg=path)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_lowers_a_loss(full, name):
    target = random_model(FULL, seed=1)
    optimizer = make_optimizer(constant_rate(name, learning_rate=0.02, clip_norm=1.0), FULL, steps=40)

    def loss(model):
        return sum(
            jnp.square(a - b).mean() for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(target), strict=True)
        )

    @jax.jit
    def step(carry):
        model, state = carry
        updates, state = optimizer.update(jax.grad(loss)(model), state, model)
        return optax.apply_updates(model, updates), state

    carry = (full, optimizer.init(full))
    for _ in range(40):
        carry = step(carry)
    assert float(loss(carry[0])) < 0.8 * float(loss(full))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_above_the_clipping_norm_give_the_same_update(full, name):
    """Gradients that differ only in length, both above the bound, give the same update."""
    grads = random_like(full, 0)
    config = constant_rate(name, clip_norm=0.5)
    short, long = (one_update(config, FULL, full, jax.tree.map(lambda g, s=s: s * g, grads)) for s in (1.0, 64.0))
    for path in short:
        np.testing.assert_allclose(short[path], long[path], rtol=1e-3, atol=1e-6, err_msg=path)


# ---------------------------------------------------------------------------------------------------- Muon


def matrices(path: str, update: np.ndarray) -> np.ndarray | None:
    """Return the update of a hidden weight as matrices [N, inputs, outputs]; None if Muon does not update it."""
    last = path.rsplit(".", 1)[-1]
    if not path.startswith("stacks") or is_vector(path) or last == "router" or last.endswith("_bias"):
        return None
    if last in ("q", "k", "v"):  # [R, D, N, H]
        return update.reshape(*update.shape[:2], -1)
    if last == "out":  # [R, N, H, D]
        return update.reshape(update.shape[0], -1, update.shape[-1])
    if last == "up":  # [R, (E,) D, G, F]
        update = np.moveaxis(update, -2, -3)
    return update.reshape(-1, *update.shape[-2:])


@pytest.mark.parametrize("config", [FULL, tiny_config()], ids=["experts", "dense"])
def test_muon_orthogonalizes_each_matrix_separately(config):
    model = random_model(config)
    draw = np.random.default_rng(0)

    def skewed(x):  # columns whose lengths differ by a factor of 30
        return (draw.standard_normal(x.shape) * np.geomspace(1, 30, x.shape[-1])).astype(np.float32)

    updates = one_update(constant_rate("muon"), config, model, jax.tree.map(skewed, model))
    checked = 0
    for path, update in updates.items():
        stacked = matrices(path, update)
        if stacked is None:
            continue
        # The smallest singular values of a square random matrix are too close to zero for a few iterations to lift.
        low, high = np.quantile(np.linalg.svd(stacked, compute_uv=False), [0.1, 1], axis=1)
        assert (high / low < 2).all(), path
        # Updates are as large as Adam's: their root mean square is 0.2 * rate for matrices of every shape.
        rms = np.sqrt(np.square(stacked).mean((1, 2)))
        assert ((0.6 < rms / (0.2 * 0.01)) & (rms / (0.2 * 0.01) < 1.4)).all(), (path, rms)
        checked += 1
    assert checked == 6


def test_muon_updates_layers_and_experts_independently(full):
    grads = random_like(full, 0)
    other = jax.tree.map(lambda g, h: np.concatenate([g[:1], h[1:]]), grads, random_like(full, 1))
    a, b = (one_update(constant_rate("muon"), FULL, full, g) for g in (grads, other))
    for path in a:
        if matrices(path, a[path]) is not None:
            np.testing.assert_allclose(a[path][0], b[path][0], rtol=1e-4, atol=1e-7, err_msg=path)
            assert (np.abs(a[path][1] - b[path][1]).max(axis=tuple(range(-2, 0))) > 1e-4).all(), path
    up = next(path for path in a if path.endswith("mlp.up"))
    one = values(grads)[up].copy()
    one[:, 1:] = values(random_like(full, 2))[up][:, 1:]  # another gradient for every expert but the first
    leaves = [one if path == up else g for path, g in values(grads).items()]
    c = one_update(constant_rate("muon"), FULL, full, jax.tree.unflatten(jax.tree.structure(full), leaves))
    np.testing.assert_allclose(a[up][:, 0], c[up][:, 0], rtol=1e-4, atol=1e-7)
    assert np.abs(a[up][:, 1:] - c[up][:, 1:]).max() > 1e-4


def test_muon_divides_its_matrices_over_the_devices():
    """On replicas, and on devices that store parts of each matrix, a device multiplies those of half of the layers."""
    optimizer = make_optimizer(constant_rate("muon"), FULL, steps=10)
    flops = {}
    for name, config in {"one": MeshConfig(), "data": MeshConfig(2, 1), "fsdp": MeshConfig(1, 2)}.items():
        mesh = make_mesh(config, jax.devices()[: 1 if name == "one" else 2])
        with use_mesh(mesh):
            model = jax.jit(lambda: Transformer(jax.random.key(0), FULL, ShardingRules()))()
            update = jax.jit(lambda g, s, m: optimizer.update(g, s, m)[0])
            compiled = update.lower(model, jax.jit(optimizer.init)(model), model).compile()
        flops[name] = sum_of_matmuls(compiled.as_text())
    assert flops["data"] == flops["fsdp"] == flops["one"] / 2 > 0


def sum_of_matmuls(hlo: str) -> int:
    """Return the number of results of all matmuls of a compiled program without loops."""
    return sum(math.prod(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", hlo))


# ---------------------------------------------------------------------------------------------------- muP


def test_mup_slows_only_hidden_matrices(full):
    grads = random_like(full, 0)
    plain = one_update(constant_rate("adamw"), FULL, full, grads)
    mup = one_update(constant_rate("adamw"), dataclasses.replace(FULL, mup_base_dim=8), full, grads)
    for path in plain:
        hidden = path.startswith("stacks") and not is_vector(path)
        np.testing.assert_allclose(mup[path], plain[path] * (0.25 if hidden else 1.0), rtol=1e-6, err_msg=path)


def test_every_weight_is_a_matrix_or_a_vector_by_its_role(full):
    for name, weight in named_weights(full):
        assert (weight.role in ("vector", "buffer")) == is_vector(name), name


@pytest.mark.slow
def test_activations_change_equally_at_all_widths_under_mup():
    """Yang et al. 2022, sec. D.1: the change of the activations after a few Adam steps does not grow with the width
    under muP, and does without."""
    batch = whole_rows(0, 8, 17, 64)

    def change(width: int, mup: bool) -> float:
        attention = AttentionConfig(num_heads=width // 8, num_kv_heads=width // 8, head_dim=8)
        config = tiny_config(embed_dim=width, attention=attention, mup_base_dim=32 if mup else None)
        model = Transformer(jax.random.key(0), config, ShardingRules())
        optimizer = make_optimizer(constant_rate("adamw", learning_rate=0.01), config, steps=5)

        def objective(model):
            loss = NextToken()(model, None, batch, None)
            return loss.total / loss.count

        @jax.jit
        def step(model, state):
            updates, state = optimizer.update(jax.grad(objective)(model), state, model)
            return optax.apply_updates(model, updates), state

        def residual(model):  # before the final norm, whose output has a fixed scale
            model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(model))
            model.final_norm = lambda x: x
            return forward(model, batch.tokens).hidden_BTD

        before, state = jax.jit(residual)(model), optimizer.init(model)
        for _ in range(4):
            model, state = step(model, state)
        return float(jnp.sqrt(jnp.square(jax.jit(residual)(model) - before).mean()))

    narrow, wide = 32, 256
    assert change(wide, mup=True) / change(narrow, mup=True) < 1.3
    assert change(wide, mup=False) / change(narrow, mup=False) > 2.5
