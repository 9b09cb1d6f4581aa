"""Expert buffers of fixed capacity, filled by gathers and by one-hot matmuls, against every expert on every token."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from model.buffers import buffered_experts
from model.capacity import positions_in_experts
from model.experts import every_expert
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import AxisRules, ShardingRules

E, D, F, B, T = 4, 8, 6, 8, 8
RULES = ShardingRules()
TOKENS = ("batch", "sequence", None)
AXES = [TOKENS, TOKENS, TOKENS, TOKENS, ("expert", None, None, "mlp"), ("expert", "mlp", None), TOKENS]
NAMES = ["y", "gradient of x", "of weights", "of up", "of down"]


def inputs(style: str, C: int, capacity: int, G: int = 2, seed: int = 0) -> list[np.ndarray]:
    """Return x, indices, weights, positions, up, down and the gradient of y. A tenth of the choices, and those beyond
    the capacity, have no expert."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, D), (B, T, C), (E, D, G, F), (E, F, D), (B, T, D)]
    x, weights, up, down, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    indices = np.stack([rng.permutation(E)[:C] for _ in range(B * T)]).reshape(B, T, C)
    if style == "same":  # most choices exceed the capacity
        indices[:] = np.arange(C)
    indices = np.where(rng.random(indices.shape) < (1.0 if style == "none" else 0.1), E, indices).astype(np.int32)
    kept, position = positions_in_experts(jnp.asarray(indices), E, capacity)
    return [x, np.asarray(kept), weights, np.asarray(position), up, down, dy]


def program(how: str | None, capacity: int, kind: str = "swiglu", rules: ShardingRules = RULES):
    """Return a function for the value and gradients; None for `how` selects the oracle."""

    def f(x, indices, weights, position, up, down, dy):
        def run(x, weights, up, down):
            if how is None:
                flat = (y.reshape(B * T, -1) for y in (x, indices, weights))
                return every_expert(*flat, up, down, kind).reshape(x.shape)
            return buffered_experts(x, indices, weights, position, capacity, up, down, kind, rules, how)

        y, pull = jax.vjp(run, x, weights, up, down)
        return y, *pull(dy)

    return jax.jit(f)


def compare(found, expected, message: str = ""):
    for name, a, b in zip(NAMES, found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()), rtol=0, err_msg=f"{message} {name}")


@pytest.mark.parametrize("how", ["gather", "einsum"])
@pytest.mark.parametrize("C, capacity, kind", [(2, 3, "swiglu"), (1, 1, "relu2"), (4, 8, "geglu")])
def test_buffers_match_the_oracle_with_the_same_drops(C, capacity, kind, how):
    ours, oracle = program(how, capacity, kind), program(None, capacity, kind)

    @given(style=st.sampled_from(["any", "same", "none"]), seed=st.integers(0, 1000))
    @settings(max_examples=8, deadline=None)
    def check(style, seed):
        given = inputs(style, C, capacity, 2 if kind.endswith("glu") else 1, seed)
        compare(ours(*given), oracle(*given), style)

    check()


SEQUENCE = replace(RULES, activations=AxisRules(batch=("data",), sequence=("sequence",), expert=("sequence",)))
BOTH = replace(RULES, activations=AxisRules(batch=("data", "expert"), expert=("expert", "tensor"), mlp=()))


@pytest.mark.parametrize("how", ["gather", "einsum"])
@pytest.mark.parametrize(
    "axes, rules",
    [
        ({"data": 2, "expert": 2, "tensor": 2}, RULES),
        ({"sequence": 2, "expert": 4}, RULES),
        ({"data": 2, "sequence": 4}, SEQUENCE),  # experts on the devices of a sequence's shards
        ({"data": 2, "expert": 2, "tensor": 2}, BOTH),
    ],
    ids=["data-expert-tensor", "sequence-expert", "over-sequence", "over-two"],
)
def test_buffers_on_a_mesh_match_one_device(axes, rules, how):
    rules.validate()
    capacity = 4 if how == "gather" else 3  # the sequence axes do not divide 3
    with use_mesh(mesh := make_mesh(MeshConfig(**{"fsdp": 1, **axes}))):
        together = program(how, capacity, rules=rules)
    oracle = program(None, capacity)
    for style in ("any", "same"):
        given = inputs(style, 2, capacity)
        with use_mesh(mesh):
            laid_out = [
                jax.device_put(x, jax.NamedSharding(mesh, rules.spec("activations", names)))
                for x, names in zip(given, AXES, strict=True)
            ]
            found = together(*laid_out)
        compare(found, oracle(*given), style)
        assert found[0].sharding.is_equivalent_to(laid_out[0].sharding, 3)


def test_a_non_finite_token_affects_only_itself():
    given = inputs("any", 2, 3)
    clean = program("gather", 3)(*given)[0]
    given[0][2, 5] = np.nan
    y = np.array(program("gather", 3)(*given)[0])
    assert not np.isfinite(y[2, 5]).any() or (given[1][2, 5] == E).all()
    y[2, 5] = clean[2, 5]
    np.testing.assert_array_equal(y, clean)


def test_experts_are_exchanged_by_all_to_all():
    """As in GShard, an all-to-all reshards buffers from sequences to experts, and nothing is gathered."""
    with use_mesh(mesh := make_mesh(MeshConfig(fsdp=1, data=2, expert=4))):
        given = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, RULES.spec("activations", names)))
            for x, names in zip(inputs("any", 2, 4), AXES, strict=True)
        ]
        text = program("gather", 4).lower(*given).compile().as_text()
    assert "all-to-all" in text and "all-gather" not in text
