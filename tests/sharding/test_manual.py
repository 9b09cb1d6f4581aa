"""Collectives without reduce-scatter, for processes on CPUs, match those of JAX, including gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding.manual import gather_without_reduce_scatter, sum_and_cut


@pytest.mark.parametrize("axes", [("data",), ("tensor",), ("data", "tensor")])
@pytest.mark.parametrize("check", [True, False])
def test_gather_and_scatter_match_jax(axes, check):
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), devices=jax.devices()[:4], axis_types=(AxisType.Explicit,) * 2)
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 8, 12)).astype(np.float32)

    def loss(gather, scatter):
        def body(x, scale):
            return scatter(gather(x, axes, 0) * scale[:1] ** 2, axes, 0)

        spec = P(("data", "tensor"))
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check)
        return lambda x, scale: (mapped(x, scale) ** 2).sum()

    def plain_gather(x, axes, dimension):
        return jax.lax.all_gather(x, axes, axis=dimension, tiled=True)

    def plain_scatter(x, axes, dimension):
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)

    with jax.set_mesh(mesh):
        arrays = [jax.device_put(a, jax.NamedSharding(mesh, P(("data", "tensor")))) for a in (x, scale)]
        ours = jax.jit(jax.value_and_grad(loss(gather_without_reduce_scatter, sum_and_cut), (0, 1)))
        theirs = jax.jit(jax.value_and_grad(loss(plain_gather, plain_scatter), (0, 1)))
        assert "reduce-scatter(" in theirs.lower(*arrays).compile().as_text()
        assert "reduce-scatter(" not in ours.lower(*arrays).compile().as_text()
        for a, b in zip(jax.tree.leaves(ours(*arrays)), jax.tree.leaves(theirs(*arrays)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * float(np.abs(b).max()))
