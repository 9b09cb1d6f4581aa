"""Collectives read from a small text, and from programs with known traffic compiled for eight CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sharding.collectives import read_collectives

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %s = f32[] add(%x, %y)
}

%fused (p: s32[]) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%p, %limit), direction=LT
}

%condition (p: (s32[], f32[4])) -> pred[] {
  ROOT %c = pred[] fusion(%i), kind=kLoop, calls=%fused
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %g = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, metadata={op_name="the gather"}
  %w = (s32[], f32[4]) while(%t), condition=%unknown, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%inner (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %r = f32[2,4]{1,0} reduce-scatter(%x), replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %a = f32[8] all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %d = f32[2] dynamic-slice(%a, %i), dynamic_slice_sizes={2}
}

%small (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8] all-to-all(%p), replica_groups={}, dimensions={0}
}

%large (p: f32[8]) -> f32[8] {
  %b = f32[8] all-to-all(%p), replica_groups={}, dimensions={0}
  ROOT %c = f32[8] all-to-all(%b), replica_groups={}, dimensions={0}
}

%started (p: f32[16]) -> f32[16] {
  ROOT %a = f32[16] all-to-all(%p), replica_groups={{0,1}}
}

%until (p: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %needed), direction=LT
}

%more (p: (s32[], s32[])) -> (s32[], s32[]) {
  %a = s32[10] ragged-all-to-all(%x, %y), replica_groups=mesh['a'=8] {'a':(2)4}
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %w = (s32[]{:T(128)}, f32[4]{0}) while(%t), condition=%condition, body=%body
  %f = f32[2] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  %c = f32[8] conditional(%pred, %p, %p), branch_computations={%small, %large}
  %s = ((f32[16]), f32[16], u32[]) async-start(%p), calls=%started
  %e = f32[16] async-done(%s), calls=%started
  %n = (f32[3]{0}, f32[24]{0:T(8,128)}) all-gather-start(%p), replica_groups={{0,1,2,3,4,5,6,7}}
  %m = f32[24] all-gather-done(%n)
  %v = (f32[3], bf16[2]) all-reduce(%p, %q), replica_groups={}, to_apply=%add
  %k = f32[6] collective-permute(%p), source_target_pairs={{0,1},{1,0}}
  %o = (s32[], s32[]) while(%t), condition=%until, body=%more
}
"""  # noqa: E501


def test_every_notation_of_hlo_is_read():
    traffic = read_collectives(TEXT)
    read = {(c.kind, c.bytes, c.devices, c.count) for c in traffic.collectives}
    assert read == {
        ("all-gather", 64, 4, 5),
        ("reduce-scatter", 32, 2, 15),
        ("reduce-scatter", 8, 4, 1),
        ("all-to-all", 32, 8, 1),
        ("all-to-all", 64, 2, 1),
        ("all-gather", 96, 8, 1),
        ("all-reduce", 16, 8, 1),
        ("collective-permute", 24, 2, 1),
    }
    assert next(c for c in traffic.collectives if c.count == 5).source == "the gather"
    assert traffic.most == traffic.output_bytes + 32
    assert (traffic.open_loops, traffic.a_round) == (1, 40)
    assert traffic.by_kind()["reduce-scatter"] == (16, 15 * 32 + 8, 15 * 32 * 1 + 8 * 3)
    assert traffic.by_kind()["all-gather"][2] == pytest.approx(5 * 64 * 3 / 4 + 96 * 7 / 8)
    assert traffic.by_kind()["all-reduce"][2] == pytest.approx(2 * 16 * 7 / 8)


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_collectives("nothing")


@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_compiled_scan_counts_its_iterations(length):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def local(w, x):
        def layer(x, w):
            whole = jax.lax.all_gather(w, "fsdp", tiled=True)
            return jax.lax.psum(x * whole.sum(), ("data", "fsdp")), None

        return jax.lax.scan(layer, x, w)[0]

    step = jax.shard_map(
        local, mesh=mesh, in_specs=(P(None, "fsdp"), P(("data", "fsdp"))), out_specs=P(), check_vma=False
    )
    shapes = jax.ShapeDtypeStruct((length, 32), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.float32)
    traffic = read_collectives(jax.jit(step).lower(*shapes).compile().as_text())
    assert {c.kind: (c.bytes, c.devices, c.count) for c in traffic.collectives} == {
        "all-gather": (4 * 32, 4, length),
        "all-reduce": (4 * 16, 8, length),
    }
    assert traffic.open_loops == 0


def test_a_loop_of_unknown_length_is_reported_separately():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def local(x, limit):
        more = lambda carry: carry[0] < limit[0]
        return jax.lax.while_loop(more, lambda carry: (carry[0] + 1, jax.lax.psum(carry[1], "a")), (0, x))[1]

    step = jax.shard_map(local, mesh=mesh, in_specs=(P("a"), P()), out_specs=P(), check_vma=False)
    shapes = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
    traffic = read_collectives(jax.jit(step).lower(*shapes).compile().as_text())
    assert (traffic.output_bytes, traffic.open_loops, traffic.a_round) == (0, 1, 32)
