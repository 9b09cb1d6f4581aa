"""Ahead-of-time compilation of the network's attention for four TPUs: kernels in shard_map, with the expected
collectives."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from model.config import AttentionConfig, LatentConfig, ModelConfig
from model.transformer import Transformer, forward, init_cache, logits, unstack
from pallas_kernels import ahead_of_time
from sharding.mesh import concrete_shardings
from sharding.rules import MESH_AXES, ShardingRules

CONFIG = ModelConfig(
    vocab_size=512, num_layers=2, embed_dim=256, dtype="bfloat16",
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=128, sinks=True),
)  # fmt: skip
RULES = ShardingRules()


def compiled(config: ModelConfig) -> str:
    """Return the compiled text of loss and gradients for v5p, with `tensor` and `sequence` of size two."""
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
    program = compiled(replace(CONFIG, attention=replace(CONFIG.attention, context_parallel=context)))
    kernels, exchanges, hops = (
        program.count(x) for x in ("tpu_custom_call", "all-to-all(", "collective-permute-start")
    )
    assert kernels >= 2  # in the scan over layers: forward and backward
    assert (exchanges > 0) == (context == "ulysses")
    assert (hops > 0) == (context == "ring")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache:UserWarning")
def test_latent_attention_runs_the_tpu_kernels_on_a_mesh():
    """The head widths of DeepSeek-V3: 192 for queries and keys, 128 for values."""
    attention = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=192, latent=LatentConfig(128, 512, 64, 128))
    assert compiled(replace(CONFIG, attention=attention)).count("tpu_custom_call") >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Error (reading|writing) persistent compilation cache:UserWarning")
def test_the_tpu_kernel_reads_a_latent_cache_that_is_written_in_place():
    attention = AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=192, latent=LatentConfig(None, 512, 64, 128))
    config = replace(CONFIG, attention=attention)
    ahead_of_time.mesh_of("v5p")  # loads the compiler
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    sizes = [4 if axis == "tensor" else 1 for axis in MESH_AXES]
    mesh = jax.sharding.Mesh(
        np.asarray(devices).reshape(sizes), MESH_AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 6
    )
    spec = RULES.spec("activations", ("batch", None))

    def decode(model, cache, ids_B1):
        def step(_, state):
            out = forward(model, state[1], cache=state[0])
            ids = jnp.argmax(logits(model, out.hidden_BTD), -1).astype(jnp.int32)
            return out.cache, jax.sharding.reshard(ids, spec)

        return jax.lax.fori_loop(0, 8, step, (cache, ids_B1))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        key = jax.eval_shape(lambda: jax.random.key(0))
        model = concrete_shardings(jax.eval_shape(lambda key: unstack(Transformer(key, config, RULES)), key), mesh)
        cache = concrete_shardings(jax.eval_shape(lambda model: init_cache(model, 8, 1024), model), mesh)
        ids = jax.ShapeDtypeStruct((8, 1), jnp.int32, sharding=jax.NamedSharding(mesh, spec))
        lowered = jax.jit(decode, donate_argnums=1).trace(model, cache, ids).lower(lowering_platforms=("tpu",))
    lines = lowered.compile().as_text().splitlines()
    assert sum("tpu_custom_call" in line for line in lines) == 2  # one per layer
    body = [line for line in lines if "bf16[8,1,1024,576]" in line.split("(")[0] and "while/body" in line]
    assert body and not [line for line in body if " copy(" in line or " transpose(" in line]
