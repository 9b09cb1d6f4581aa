"""Ahead-of-time compilation of a layer's experts for four TPUs: the exchange, ragged and padded, with the grouped
matmul kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from model import exchange
from model.config import MLPConfig, ModelConfig, MoEConfig
from model.dispatch import DOWN, DOWN_BIAS, UP, UP_BIAS, run_experts
from pallas_kernels import ahead_of_time
from sharding.rules import MESH_AXES, ShardingRules
from tests.models import expert_weights

E, K, D, F, ROWS, LENGTH = 8, 2, 256, 256, 4, 512
RULES = ShardingRules()


def lowered(target: str, sizes: dict[str, int], factor: float | None, biased: bool) -> jax.stages.Lowered:
    """Return the lowered value and gradients of a layer's experts for the four devices of `target`'s smallest
    topology."""
    ahead_of_time.mesh_of(target)  # loads the compiler
    devices = topologies.get_topology_desc(platform="tpu", topology_name=ahead_of_time.TOPOLOGIES[target]).devices
    mesh = jax.sharding.Mesh(
        np.asarray(devices).reshape([sizes.get(axis, 1) for axis in MESH_AXES]), MESH_AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(MESH_AXES),
    )  # fmt: skip
    config = ModelConfig(
        mlp=MLPConfig("swiglu_clamped" if biased else "swiglu", bias=biased),
        moe=MoEConfig(E, K, F, all_to_all_buffer_factor=factor),
        dtype="bfloat16",
    )

    def array(shape, dtype, side, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, RULES.spec(side, axes)))

    tokens = ("activations", "batch", "sequence", None)
    arrays = [
        array((ROWS, LENGTH, D), jnp.bfloat16, *tokens),
        array((ROWS, LENGTH, K), jnp.float32, *tokens),
        array((ROWS, LENGTH, K), jnp.int32, *tokens),
        array((E, D, 2, F), jnp.bfloat16, "weights", *UP),
        array((E, F, D), jnp.bfloat16, "weights", *DOWN),
    ]
    if biased:
        arrays += [
            array((E, 2, F), jnp.bfloat16, "weights", *UP_BIAS),
            array((E, D), jnp.bfloat16, "weights", *DOWN_BIAS),
        ]

    def loss(x, weights, indices, up, down, *biases):
        y = run_experts(x, indices, weights, None, expert_weights(up, down, RULES, biases), config, RULES)
        return (y.astype(jnp.float32) ** 2).sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradient = jax.jit(jax.value_and_grad(loss, (0, 1, *range(3, len(arrays)))))
        return gradient.trace(*arrays).lower(lowering_platforms=("tpu",))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache:UserWarning")
@pytest.mark.parametrize(
    "target, sizes, factor, ragged, biased",
    [
        ("v5p", {"expert": 4}, 2.0, True, False),
        ("v5p", {"expert": 2, "tensor": 2}, 1.25, False, False),
        ("v5e", {"fsdp": 2, "expert": 2}, 2.0, True, False),
        ("v5e", {"expert": 4}, None, None, False),
        ("v5p", {"expert": 2, "tensor": 2}, 2.0, True, True),
    ],
)
def test_the_exchange_and_the_kernel_compile(target, sizes, factor, ragged, biased, monkeypatch):
    if ragged is False:
        monkeypatch.setattr(exchange, "target", lambda: ("cpu", "as on it"))
    program = lowered(target, sizes, factor, biased)
    text = program.as_text()
    # Each direction once forward and once backward; again in the loops of overflow rounds, whose backward pass also
    # runs the forward pass.
    assert text.count("@ragged_all_to_all") == (2 + 2 + 2 + 4 if ragged else 0)
    assert text.count("stablehlo.all_to_all") == (2 + 2 + 2 + 4 if ragged is False else 0)
    assert text.count("@tpu_custom_call") > 0
    program.compile()
