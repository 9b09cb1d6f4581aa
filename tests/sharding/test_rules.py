"""Mesh sizes and axis rules: valid ones are built, and errors name the numbers or axes in conflict."""

from __future__ import annotations

import math
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from sharding.mesh import MeshConfig, make_mesh, use_mesh
from sharding.rules import LOGICAL_AXES, MESH_AXES, AxisRules, ShardingRules, activation_spec, reshard, weight_spec


@given(sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6), wild=st.integers(0, 6), devices=st.integers(1, 64))
@settings(deadline=None)
def test_sizes_multiply_to_the_devices_or_the_error_has_both_numbers(sizes, wild, devices):
    asked = dict(zip(MESH_AXES, sizes, strict=True))
    if wild < 6:
        asked[MESH_AXES[wild]] = -1
    fixed = math.prod(s for s in asked.values() if s != -1)
    fits = devices % fixed == 0 if wild < 6 else devices == fixed
    if fits:
        got = MeshConfig(**asked).sizes(devices)
        assert math.prod(got) == devices
        assert all(g == s for g, s in zip(got, asked.values(), strict=True) if s != -1)
    else:
        with pytest.raises(ValueError, match=rf"needs .*\b{fixed} devices?, but there are {devices};"):
            MeshConfig(**asked).sizes(devices)


def test_sizes_below_1_and_two_axes_of_minus_1_are_refused():
    with pytest.raises(ValueError, match=r"mesh\.tensor = 0: .*1 or more"):
        MeshConfig(tensor=0).sizes(8)
    with pytest.raises(ValueError, match=r"mesh\.fsdp = -2"):
        MeshConfig(fsdp=-2).sizes(8)
    with pytest.raises(ValueError, match=r"mesh\.data and mesh\.fsdp are both -1"):
        MeshConfig(data=-1).sizes(8)


def test_a_mesh_has_every_axis_and_all_are_explicit():
    mesh = make_mesh(MeshConfig(tensor=2))
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "expert": 1, "tensor": 2, "sequence": 1, "stage": 1}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    assert make_mesh(MeshConfig(), jax.devices()[:1]) is None


def test_rules_refuse_unknown_mesh_axes():
    ShardingRules().validate()
    for side in ("weights", "activations"):
        for axis in LOGICAL_AXES:
            bad = ShardingRules(**{side: replace(getattr(ShardingRules(), side), **{axis: ("tensr",)})})
            with pytest.raises(
                ValueError, match=rf"sharding\.{side}\.{axis} = 'tensr': not a mesh axis; use one of data"
            ):
                bad.validate()


@pytest.mark.parametrize(
    "side, changes, axis",
    [
        ("weights", {"embed": ("tensor",)}, "tensor"),  # a projection is [embed, heads]
        ("weights", {"heads": ("fsdp",), "mlp": ()}, "fsdp"),
        ("weights", {"mlp": ("expert",), "heads": (), "vocab": ()}, "expert"),  # an expert's is [expert, embed, mlp]
        ("weights", {"vocab": ("fsdp",)}, "fsdp"),
        ("weights", {"embed": ("fsdp", "fsdp")}, "fsdp"),
        ("activations", {"batch": ("data", "tensor")}, "tensor"),
        ("activations", {"sequence": ("data",)}, "data"),
        ("activations", {"vocab": ("fsdp",)}, "fsdp"),
        ("activations", {"embed": ("data",)}, "data"),  # the residual stream is [batch, sequence, embed]
        ("activations", {"kv_heads": ("sequence",)}, "sequence"),
        ("activations", {"layer": ("data",)}, "data"),  # a cache is [layer, batch, kv_heads, ...]
    ],
)
def test_rules_refuse_an_axis_used_twice_in_one_array(side, changes, axis):
    rules = ShardingRules()
    with pytest.raises(ValueError, match=rf"sharding\.{side}: mesh axis '{axis}' is used twice by .*give one"):
        replace(rules, **{side: replace(getattr(rules, side), **changes)}).validate()


def test_specs_map_logical_axes_and_refuse_unknown_ones():
    rules = ShardingRules(weights=AxisRules(embed=("fsdp", "data")))
    assert rules.spec("weights", ("vocab", "embed", None)) == P("tensor", ("fsdp", "data"), None)
    assert rules.spec("activations", ("batch", "sequence", "embed")) == P(("data", "fsdp", "expert"), "sequence", None)
    with pytest.raises(ValueError, match="logical axis 'embd' is unknown; use one of batch"):
        rules.spec("weights", ("embd",))


def test_without_a_mesh_nothing_is_sharded():
    x = jnp.ones((8, 4))
    assert weight_spec(ShardingRules(), "embed", "mlp") is None and activation_spec(ShardingRules(), "batch") is None
    assert reshard(x, ShardingRules(), "batch", "embed") is x
    with use_mesh(make_mesh(MeshConfig(fsdp=4, tensor=2))):
        assert weight_spec(ShardingRules(), "embed", "mlp") == P("fsdp", "tensor")
        assert jax.typeof(reshard(x, ShardingRules(), "batch", None)).sharding.spec == P(
            ("data", "fsdp", "expert"), None
        )


def test_rules_refuse_key_heads_on_other_axes_than_their_query_heads():
    for heads, kv_heads in ((("expert", "tensor"), ("tensor",)), (("tensor",), ("expert",)), ((), ("tensor",))):
        rules = ShardingRules(
            activations=replace(ShardingRules().activations, heads=heads, kv_heads=kv_heads, batch=())
        )
        with pytest.raises(ValueError, match=r"sharding\.activations\.kv_heads = .*must be the first of"):
            rules.validate()
    replace(ShardingRules(), activations=replace(ShardingRules().activations, kv_heads=())).validate()
