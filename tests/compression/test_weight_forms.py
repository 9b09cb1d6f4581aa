"""A network with adapters or int8 weights computes the same as with the merged, dequantised arrays.

Covers dense networks and experts on one and eight devices. Shapes: B batch, T time.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from compression.int8 import quantise
from interop.load import named
from model.config import MoEConfig
from model.lora import add_lora
from model.transformer import forward, logits
from model.weights import Weight, dense_weights, map_named_weights, merge, named_weights, split
from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import AxisRules, ShardingRules
from tests.models import random_model, tiny_config

RULES = ShardingRules(weights=AxisRules(embed=("fsdp",)))
MESH = MeshConfig(fsdp=2, expert=2, tensor=2)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
CONFIGS = {
    "dense": tiny_config(),
    "experts": tiny_config(moe=MoEConfig(num_experts=4, top_k=2, hidden_dim=16, load_balance=0.0, z_loss=0.0)),
}


def with_lora(config):
    """Return a network with adapters on one projection and on experts, if any; their second factor is not zero."""
    names = {"attention.q"} | ({"mlp.up", "mlp.down"} if config.moe else set())
    model = add_lora(random_model(config, rules=RULES), names, rank=3, key=jax.random.key(1), alpha=6.0)

    def moved(path: str, weight: Weight) -> Weight:
        if weight.adapter is None:
            return weight
        up = np.random.default_rng(len(path)).standard_normal(weight.adapter.up.shape).astype(np.float32)
        return replace(weight, adapter=replace(weight.adapter, up=0.2 * up))

    return map_named_weights(moved, model)


def with_int8(config):
    """Return a network with its MLP or experts as int8."""
    return quantise(random_model(config, rules=RULES), {"mlp.up", "mlp.down"})


def loss(model) -> jax.Array:
    return (jax.nn.log_softmax(logits(model, forward(model, TOKENS).hidden_BTD)) ** 2).mean()


def placed(model, mesh):
    """Return the network with its arrays sharded by `rules.weights`."""

    def put(path: str, weight: Weight) -> Weight:
        lead = (None,) * (weight.ndim - len(weight.axes))

        def shard(x, names):
            return jax.device_put(x, NamedSharding(mesh, RULES.spec("weights", (*lead, *names))))

        return jax.tree.map(shard, weight, weight.part_axes())

    return map_named_weights(put, model)


def close(found, expected, what: str) -> None:
    """Check to within 1e-5 of the largest entry, since float32 sums may be in another order."""
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale, err_msg=what)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("form", [with_lora, with_int8])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_match_dense_weights(name, form, devices):
    model = form(CONFIGS[name])
    floating = lambda path, weight, part: part == "adapter" or weight.scale is None
    trainable, frozen = split(model, floating)
    assert jax.tree.leaves(frozen) or form is with_lora

    @jax.jit
    def ours(trainable, frozen):
        return jax.value_and_grad(lambda trainable: loss(merge(trainable, frozen)))(trainable)

    @jax.jit
    def theirs(model):
        """Return loss and gradients of the dense network, with the chain rule for adapter factors."""
        trainable, frozen = split(model, floating)
        return jax.value_and_grad(lambda trainable: loss(dense_weights(merge(trainable, frozen))))(trainable)

    expected, slopes = theirs(model)
    if devices == 8:
        mesh = make_mesh(MESH)
        with use_mesh(mesh):
            found, gradients = ours(*split(placed(model, mesh), floating))
    else:
        found, gradients = ours(trainable, frozen)
    close(found, expected, "loss")
    for (path, want), (_, got) in zip(named_weights(slopes), named_weights(gradients), strict=True):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            close(np.asarray(a), np.asarray(b), path)
    changed = dense_weights(model)
    difference = np.abs(np.asarray(jax.jit(loss)(random_model(CONFIGS[name]))) - np.asarray(expected))
    assert difference > 1e-6, "the adapter or the rounding changes the loss"
    assert all(weight.scale is None and weight.adapter is None for _, weight in named_weights(changed))


def test_int8_rounds_to_nearest_with_a_scale_per_output():
    model = random_model(CONFIGS["experts"])
    small = quantise(model, {"mlp.up"})
    before, after = model.stacks[0][0].mlp.up, small.stacks[0][0].mlp.up
    assert after.value.dtype == jnp.int8 and after.scale.shape == (2, 4, 1, 2, 16)
    assert small.stacks[0][0].mlp.down is not None and small.stacks[0][0].mlp.down.scale is None
    found = np.asarray(dense_weights(small).stacks[0][0].mlp.up.value)
    assert (np.abs(found - np.asarray(before.value)) <= 0.5001 * np.asarray(after.scale)).all()


def test_a_new_adapter_changes_nothing_and_is_small():
    model = random_model(CONFIGS["dense"])
    adapted = add_lora(model, {"attention.q", "attention.v"}, rank=2, key=jax.random.key(0))
    np.testing.assert_array_equal(jax.jit(loss)(adapted), jax.jit(loss)(model))
    trainable, frozen = split(adapted, lambda path, weight, part: part == "adapter")
    sizes = [sum(x.size for x in jax.tree.leaves(side)) for side in (trainable, frozen)]
    assert sizes == [2 * 2 * (32 + 32) + 2 * 2 * (32 + 16), sum(x.size for x in jax.tree.leaves(model))]
    merged = merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(adapted)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(adapted), strict=True))


@pytest.mark.parametrize("blocks", [(1, 4), (2, 1), (2, 2)])
def test_block_scales_and_zero_points_match_the_dequantised_matrix(blocks):
    """Blocks split inputs, outputs or both."""
    rng = np.random.default_rng(3)
    shape = (8 // 4 * 2 if blocks[0] > 1 else 1, blocks[1])
    value = rng.integers(0, 16, (8, 4)).astype(np.uint8)
    scale, zero = rng.random(shape, np.float32) + 0.5, rng.integers(0, 16, shape).astype(np.uint8)
    x = rng.standard_normal((3, 8)).astype(np.float32)
    repeat = lambda a: np.repeat(np.repeat(a, 8 // shape[0], 0), 4 // shape[1], 1).astype(np.float64)
    for point in (None, zero):
        held = (None if array is None else jnp.asarray(array) for array in (value, scale, point))
        weight = Weight(*held, axes=(None, None), inputs=1)
        dense = (value - (0 if point is None else repeat(point))) * repeat(scale)
        close(weight.gathered(jnp.float32), dense, "gathered")
        close(weight.dot(jnp.asarray(x), (None,)), x @ dense, "dot")


@pytest.mark.parametrize("form", [with_lora, with_int8])
def test_published_formats_require_dense_weights(form):
    model = form(CONFIGS["dense"])
    with pytest.raises(ValueError, match=r"stacks/0/0/.*dense_weights"):
        named(model)
    assert named(dense_weights(model)).keys() == named(random_model(CONFIGS["dense"])).keys()


@pytest.mark.parametrize("blocks", [(8, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("inside", [False, True])
def test_block_scales_match_on_a_mesh_that_splits_blocks(blocks, inside):
    """Weights are gathered as in a layer, or inside shard_map as for experts; a dimension may be 1 per device."""
    rng, mesh = np.random.default_rng(4), make_mesh(MeshConfig(fsdp=4, tensor=2))
    value = rng.integers(-127, 128, (1, 16, 1, 8)).astype(np.int8)
    scale = (rng.random((1, blocks[0], 1, blocks[1])) + 0.5).astype(np.float32)
    whole = np.repeat(np.repeat(scale, 16 // blocks[0], 1), 8 // blocks[1], 3)
    axes = ("expert", "embed", "gate", "mlp")
    with use_mesh(mesh):
        put = lambda x, names: jax.device_put(x, NamedSharding(mesh, RULES.spec("weights", names)))
        weight = Weight(put(value, axes), put(scale, (None,) * 4), axes=axes, inputs=1, rules=RULES)

        @jax.jit
        def dense(weight):
            if not inside:
                return weight.gathered(jnp.float32)
            entering, specs = weight.entering(jnp.float32)
            out = RULES.spec("activations", axes)
            return jax.shard_map(lambda w: w.local(jnp.float32), in_specs=(specs,), out_specs=out, check_vma=False)(
                entering
            )

        found = dense(weight)
    close(np.asarray(found), value * whole, "value * scale")


def test_a_dimension_of_size_one_per_device_is_gathered():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    bias = np.arange(8, dtype=np.float32).reshape(2, 4)
    with use_mesh(mesh):
        held = jax.device_put(bias, NamedSharding(mesh, RULES.spec("weights", ("expert", "embed"))))
        entering, specs = Weight(held, axes=("expert", "embed"), role="vector", rules=RULES).entering(jnp.float32)
        local = jax.shard_map(
            lambda w: w.local(jnp.float32), in_specs=(specs,), out_specs=RULES.spec("activations", ("expert", "embed")),
            check_vma=False,
        )  # fmt: skip
        found = jax.jit(local)(entering)
    np.testing.assert_array_equal(found, bias)
