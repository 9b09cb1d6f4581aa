"""Biases of experts for every dispatch, on one device and on eight: values against the formula, and gradients against
every expert on every token. The clamped activation.

Shapes: B batch, T time, D width, E experts, C choices of a token, G gates, F hidden width.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.capacity import positions_in_experts
from model.config import MLPConfig, ModelConfig
from model.cost import count_parameters
from model.dispatch import DOWN, DOWN_BIAS, UP, UP_BIAS, run_experts
from model.mlp import ACTIVATIONS, activate, gates
from model.moe import MoE
from model.moe_config import MoEConfig
from pallas_kernels.grouped_matmul import grouped_glu
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import ShardingRules
from tests.models import context, expert_weights, put, tiny_config

B, T, D, E, C, F = 8, 6, 8, 8, 2, 6
RULES = ShardingRules()
CAPACITY = 1.5  # drops some choices
TOKEN = ("batch", "sequence", None)
NAMES = ["y", "x", "weights", "up", "down", "up_bias", "down_bias"]


def config_of(kind: str = "swiglu", **changes) -> ModelConfig:
    return ModelConfig(mlp=MLPConfig(kind, bias=True), moe=MoEConfig(E, C, F, **changes), dtype="float32")


@cache
def inputs(kind: str = "swiglu", bounded: bool = False) -> tuple[np.ndarray, ...]:
    """Return x, indices, weights, up, down, their biases and the gradient of y. A tenth of the choices have no expert,
    and no token uses the second to last expert. Hidden values beyond 7 are common."""
    rng = np.random.default_rng(0)
    x, weights, up, down, up_bias, down_bias, dy = (
        rng.standard_normal(s).astype(np.float32)
        for s in [(B, T, D), (B, T, C), (E, D, gates(kind), F), (E, F, D), (E, gates(kind), F), (E, D), (B, T, D)]
    )
    indices = np.stack([rng.permutation(E)[:C] for _ in range(B * T)]).reshape(B, T, C)
    indices = np.where((rng.random(indices.shape) < 0.1) | (indices == E - 2), E, indices).astype(np.int32)
    if bounded:
        indices = np.asarray(
            positions_in_experts(jnp.asarray(indices), E, MoEConfig(E, C, F, capacity_factor=CAPACITY).capacity(T))[0]
        )
    return x, indices, np.abs(weights), up, down * np.float32(F**-0.5), up_bias * 4, down_bias, dy


def program(config: ModelConfig, rules: ShardingRules = RULES):
    """Return a function for the value and gradients."""

    def f(x, indices, weights, up, down, up_bias, down_bias, dy):
        position = positions_in_experts(indices, E, config.moe.capacity(T))[1] if config.moe.bounded else None

        def run(x, weights, up, down, up_bias, down_bias):
            return run_experts(
                x, indices, weights, position, expert_weights(up, down, rules, (up_bias, down_bias)), config, rules
            )

        y, pull = jax.vjp(run, x, weights, up, down, up_bias, down_bias)
        return y, *pull(dy)

    return jax.jit(f)


@cache
def oracle(kind: str = "swiglu", bounded: bool = False) -> list[np.ndarray]:
    return jax.device_get(program(config_of(kind, dispatch="dense"))(*inputs(kind, bounded)))


def compare(found, expected) -> None:
    for name, a, b in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), rtol=0, err_msg=name)


def hidden(kind: str, h: np.ndarray) -> np.ndarray:
    """Return the activation [..., F] of h [..., G, F], in the dtype of h: float64."""
    gate, up = h[..., 0, :], h[..., -1, :]
    if kind == "swiglu_clamped":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return {"swiglu": lambda: gate / (1 + np.exp(-gate)) * up, "relu2": lambda: np.maximum(gate, 0) ** 2}[kind]()


@pytest.mark.parametrize("kind", ["swiglu_clamped", "relu2"])
def test_every_expert_on_every_token_matches_the_formula(kind):
    x, indices, weights, up, down, up_bias, down_bias, _ = (a.astype(np.float64) for a in inputs(kind))
    expected = np.zeros_like(x)
    for b, t, c in np.ndindex(*indices.shape):
        if (e := int(indices[b, t, c])) < E:
            h_F = hidden(kind, np.einsum("d,dgf->gf", x[b, t], up[e]) + up_bias[e])
            expected[b, t] += weights[b, t, c] * (h_F @ down[e] + down_bias[e])
    found = oracle(kind)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "kind, how",
    [
        ("swiglu_clamped", "sort"),
        ("swiglu", "gather"),
        pytest.param("swiglu", "einsum", marks=pytest.mark.slow),
        pytest.param("relu2", "sort", marks=pytest.mark.slow),
    ],
)
def test_every_dispatch_matches_the_oracle_on_one_device(kind, how):
    bounded = how != "sort"
    config = config_of(kind, dispatch=how, capacity_factor=CAPACITY if bounded else None)
    compare(program(config)(*inputs(kind, bounded)), oracle(kind, bounded))


# The exchange in several rounds, with the columns of experts and the slices of weights each on two devices; gathered
# tokens; buffers; all of a group's tokens on each device.
@pytest.mark.parametrize(
    "axes, changes",
    [
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {"all_to_all_buffer_factor": 0.5}),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {"all_to_all_buffer_factor": None}),
        ({"fsdp": 2, "expert": 2, "tensor": 2}, {"dispatch": "gather", "capacity_factor": CAPACITY}),
        pytest.param({"fsdp": 4, "tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"expert": 8}, {"all_to_all_buffer_factor": 1.0}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "expert": 4}, {"dispatch": "dense"}, marks=pytest.mark.slow),
        pytest.param({"sequence": 2, "expert": 4}, {"all_to_all_buffer_factor": 2.0}, marks=pytest.mark.slow),
        pytest.param(
            {"sequence": 2, "expert": 2, "tensor": 2},
            {"dispatch": "einsum", "capacity_factor": CAPACITY},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_eight_devices_match_one(axes, changes):
    config = config_of(**changes)
    kinds = ("activations", TOKEN), ("activations", TOKEN), ("activations", TOKEN)
    stored = [("weights", axes) for axes in (UP, DOWN, UP_BIAS, DOWN_BIAS)]
    arrays = inputs("swiglu", config.moe.bounded)
    with use_mesh(mesh := make_mesh(MeshConfig(**{"fsdp": 1, **axes}))):
        placed = [
            jax.device_put(a, jax.NamedSharding(mesh, RULES.spec(*spec)))
            for a, spec in zip(arrays, [*kinds, *stored, ("activations", TOKEN)], strict=True)
        ]
        found = jax.device_get(program(config)(*placed))
    compare(found, oracle("swiglu", config.moe.bounded))


def test_gradients_of_biases_are_summed_in_float32():
    """These gradients are sums over many rows, which would stop growing at 256 in bfloat16."""
    rows, config = 4096, replace(config_of(), moe=MoEConfig(1, 1, F))
    x, up, down, ones, up_bias = (
        jnp.zeros(s, jnp.bfloat16) for s in [(1, rows, D), (1, D, 2, F), (1, F, D), (1, rows, 1), (1, 2, F)]
    )

    @jax.jit
    def gradient(down_bias):
        def total(down_bias):
            experts = expert_weights(up, down, RULES, (up_bias, down_bias.astype(jnp.bfloat16)))
            y = run_experts(x, jnp.zeros((1, rows, 1), jnp.int32), ones + 1, None, experts, config, RULES)
            return y.astype(jnp.float32).sum()

        return jax.grad(total)(down_bias)

    np.testing.assert_allclose(gradient(jnp.zeros((1, D))), rows)


def test_the_router_bias_is_used_and_biases_are_counted():
    """The router's bias is part of the logits, so it affects choice and weights. The biases of an expert count as
    active only if it is chosen."""
    config = tiny_config(mlp=MLPConfig("swiglu_clamped", 48, bias=True), moe=MoEConfig(4, 2, 12, shared_experts=1))
    plain = replace(config, mlp=replace(config.mlp, bias=False))
    with_, without = count_parameters(config), count_parameters(plain)
    expert = 2 * 12 + 32
    assert with_.total - without.total == 2 * (4 * expert + 4 + expert)
    assert with_.active - without.active == 2 * (2 * expert + 4 + expert)

    def abstract(config):
        return jax.eval_shape(lambda: MoE(jax.random.key(0), config, RULES))

    rng = np.random.default_rng(1)
    layer = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), abstract(config))
    put(layer, "router_logit_bias", jnp.asarray([0.0, 0.0, 150.0, 140.0]))
    x_BTD = rng.standard_normal((2, 5, 32)).astype(np.float32)
    integers = jnp.zeros((2, 5), jnp.int32)
    _, stats = jax.jit(lambda layer, x: layer(x, context(integers, integers, integers == 0)))(layer, x_BTD)
    np.testing.assert_allclose(stats.load_E, [0, 0, 0.5, 0.5])
    soft, hashed = (abstract(replace(config, moe=MoEConfig(4, 2, 12, router=name))) for name in ("soft", "hash"))
    assert (
        soft.router_logit_bias.shape == (8,) and hashed.router_logit_bias is None and hashed.up_bias.shape == (4, 2, 12)
    )


def test_the_clamped_activation_and_its_gradient_match_the_formula():
    rng = np.random.default_rng(2)
    h = np.concatenate([rng.uniform(-12, 12, (500, 2, 3)), np.full((1, 2, 3), 1000.0), np.full((1, 2, 3), -1000.0)])
    assert (np.abs(h) > 7).mean() > 0.3
    found, pull = jax.vjp(lambda h: activate("swiglu_clamped", h), jnp.asarray(h, jnp.float32))
    np.testing.assert_allclose(found, hidden("swiglu_clamped", np.maximum(h, -400)), rtol=1e-5, atol=1e-5)
    gate, up = h[:, 0], h[:, 1]
    (d,) = pull(jnp.ones_like(found))
    assert np.isfinite(d).all()
    np.testing.assert_array_equal(np.asarray(d)[:, 0][gate > 7], 0)
    np.testing.assert_array_equal(np.asarray(d)[:, 1][np.abs(up) > 7], 0)


def test_the_clamped_activation_is_compiled_into_kernels():
    """Runs the TPU kernel with the activation in interpret mode."""
    rng = np.random.default_rng(3)
    x, up = rng.standard_normal((16, 128)).astype(np.float32), rng.standard_normal((2, 128, 2, 128)).astype(np.float32)
    sizes = np.array([5, 9], np.int32)
    found = grouped_glu(
        *map(jnp.asarray, (x, up, sizes)), ACTIVATIONS["swiglu_clamped"], implementation="tpu", interpret=True
    )
    expert = np.repeat([0, 1], sizes)
    h = np.einsum("md,mdgf->mgf", x[:14].astype(np.float64), up[expert].astype(np.float64))
    assert (np.abs(h) > 7).mean() > 0.3
    np.testing.assert_allclose(found[:14], hidden("swiglu_clamped", h), atol=1e-3)
