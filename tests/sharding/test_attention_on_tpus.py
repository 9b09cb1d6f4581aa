"""The network's attention compiled for four TPUs that are not here: kernels in shard_map, with the collectives one expects."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from model.config import AttentionConfig, ModelConfig
from model.transformer import Transformer, forward
from pallas_kernels import ahead_of_time
from sharding.mesh import concrete_shardings
from sharding.rules import MESH_AXES, ShardingRules

CONFIG = ModelConfig(
    vocab_size=512, num_layers=2, embed_dim=256, dtype="bfloat16",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=128, sinks=True),
)  # fmt: skip
RULES = ShardingRules()


def compiled(config: ModelConfig) -> str:
    """The program of loss and gradients for v5p, `tensor` and `sequence` of two."""
    ahead_of_time.mesh_of("v5p")  # loads the compiler
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    sizes = {"tensor": 2, "sequence": 2}
    mesh = jax.sharding.Mesh(
        np.asarray(devices).reshape([sizes.get(axis, 1) for axis in MESH_AXES]), MESH_AXES,
        axis_types=(jax.sharding.AxisType.Explicit,) * len(MESH_AXES),
    )  # fmt: skip

    def loss(model, tokens, segments):
        return (forward(model, tokens, segment_ids_BT=segments).hidden_BTD.astype(jnp.float32) ** 2).sum()

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        key = jax.eval_shape(lambda: jax.random.key(0))
        abstract = jax.eval_shape(lambda key: Transformer(key, config, RULES), key)
    model = concrete_shardings(abstract, mesh)
    rows = jax.NamedSharding(mesh, RULES.spec("activations", ("batch", "sequence")))
    ids = jax.ShapeDtypeStruct((2, 2048), jnp.int32, sharding=rows)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(jax.value_and_grad(loss)).trace(model, ids, ids).lower(lowering_platforms=("tpu",))
    return lowered.compile().as_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache:UserWarning")
@pytest.mark.parametrize("context", ["gather", "ring", "ulysses"])
def test_the_network_runs_the_tpu_kernels_on_a_mesh(context):
    program = compiled(replace(CONFIG, attention=replace(CONFIG.attention, context=context)))
    kernels, exchanges, hops = (program.count(x) for x in ("tpu_custom_call", "all-to-all(", "collective-permute-start"))
    assert kernels >= 2  # of the scan over layers: forward, backward
    assert (exchanges > 0) == (context == "ulysses")
    assert (hops > 0) == (context == "ring")
