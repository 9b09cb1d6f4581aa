"""Resharding of weights from storage to computation, on eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model.weights import Weight
from sharding.collectives import read_collectives
from sharding.manual import gather_weight
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import AxisRules, ShardingRules

RULES = ShardingRules(weights=AxisRules(embed=("fsdp",), heads=("tensor", "expert"), kv_heads=("tensor", "expert")))
AXES = ("embed", "heads", None)


def test_a_weight_stored_over_two_axes_is_gathered_along_one_at_a_time():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2, tensor=2))
    w = np.random.default_rng(0).normal(size=(8, 8, 4)).astype(np.float32)
    with use_mesh(mesh):
        stored = jax.device_put(w, NamedSharding(mesh, RULES.spec("weights", AXES)))
        function = jax.jit(lambda w: Weight(w, axes=AXES, inputs=1, rules=RULES).gathered(jnp.bfloat16))
        whole = function(stored)
        traffic = read_collectives(function.lower(stored).compile().as_text())
        gradient = jax.jit(jax.grad(lambda w: (function(w).astype(jnp.float32) ** 2).sum()))(stored)
    assert jax.typeof(whole).sharding.spec == P(None, "tensor", None)
    np.testing.assert_array_equal(np.asarray(whole.astype(jnp.float32)), w.astype(jnp.bfloat16).astype(np.float32))
    assert set(traffic.by_kind()) == {"all-gather"}
    assert gradient.sharding == stored.sharding
    np.testing.assert_allclose(gradient, 2 * w, rtol=2e-2)


def test_the_gradient_of_a_weight_gathered_in_shard_map_has_the_stored_sharding():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(1, 8, 2, 4)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    axes = ("expert", "embed", None, "mlp")
    spec, spread = RULES.gathered(axes)
    assert spread == ((), ("fsdp",), (), ())

    def loss(w, x):
        def local(w, x):
            return jnp.einsum("nd,edgf->ngf", x, gather_weight(w, spread))

        rows = P(("data", "fsdp"), None)
        y = jax.shard_map(local, in_specs=(spec, rows), out_specs=P(("data", "fsdp"), None, None), check_vma=False)(
            w, x
        )
        return (y**2).sum()

    expected = jax.grad(lambda w: (jnp.einsum("nd,edgf->ngf", x, w) ** 2).sum())(w)
    with use_mesh(mesh):
        arrays = (
            jax.device_put(w, NamedSharding(mesh, spec)),
            jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"), None))),
        )
        gradient = jax.jit(jax.grad(loss))(*arrays)
    assert gradient.sharding == arrays[0].sharding
    np.testing.assert_allclose(gradient, expected, rtol=1e-4)


def test_axes_of_both_storage_and_use_are_not_gathered():
    rules = ShardingRules(weights=AxisRules(embed=("tensor", "fsdp"), mlp=()))
    # 'tensor' shards the columns in use, so it cannot shard the rows that are gathered.
    assert rules.gathered(("expert", "mlp", "embed")) == (P(("expert",), ("tensor",), ("fsdp",)), ((), (), ("fsdp",)))
