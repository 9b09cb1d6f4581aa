"""Ring and all-to-all attention: n devices match one, forward and backward, with balanced work and little memory."""

from __future__ import annotations

import inspect
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.ahead_of_time import ENVIRONMENT
from sharding.ring import from_zigzag, ring_attention, to_zigzag
from sharding.ulysses import ulysses_attention
from tests.sharding import plain_attention as plain
from tests.sharding.plain_attention import Problem, attend, pair, problem

ROWS = P(None, "sequence")
slow = pytest.mark.slow
PACKED = problem(0, B=2, T=32, N=4, K=2, H=8)


def mesh_of(n: int, devices=None) -> Mesh:
    devices = jax.devices()[:n] if devices is None else devices
    return Mesh(np.asarray(devices), ("sequence",), axis_types=(AxisType.Explicit,))


def spread(n: int, attention, given: Problem, packed: bool = True, check_vma: bool = True):
    """Return (out, dq, dk, dv) of `attention(q, k, v, segments=...)` inside shard_map over n devices."""
    mesh = mesh_of(n)
    inside = jax.shard_map(
        lambda q, k, v, segments: attention(q, k, v, segments=segments if packed else None),
        mesh=mesh, in_specs=(ROWS,) * 4, out_specs=ROWS, check_vma=check_vma,
    )  # fmt: skip

    @jax.jit
    def both(q, k, v, dout, segments):
        out, pull = jax.vjp(lambda q, k, v: inside(q, k, v, segments), q, k, v)
        return out, *pull(dout)

    with jax.set_mesh(mesh):
        return both(*(jax.device_put(x, NamedSharding(mesh, ROWS)) for x in given))


def one_device(given: Problem, packed: bool = True, causal: bool = True, window: int | None = None):
    """Return the same for whole rows on one device, differentiated by JAX."""
    segments = given.segments_BT if packed else None

    @jax.jit
    def both(q, k, v, dout):
        whole = partial(attend, offset=0, q_segments=segments, k_segments=segments, causal=causal, window=window)
        out, pull = jax.vjp(lambda q, k, v: whole(q, k, v)[0], q, k, v)
        return out, *pull(dout)

    return both(*given[:4])


alone = cache(partial(one_device, PACKED))


def same(found, expected, tolerance: float = 1e-5):
    """Assert equality within `tolerance` of the largest entry, or of 1, the size of the inputs, if that is larger."""
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1), err_msg=name)


def test_the_oracles_forward_and_backward_agree():
    """On whole rows, the backward function of these tests equals the gradient that JAX derives."""
    options = dict(offset=0, q_segments=PACKED.segments_BT, k_segments=PACKED.segments_BT)
    out, lse = attend(*PACKED[:3], **options)
    same((out, *plain.attend_backward(*PACKED[:3], out, lse, PACKED.dout_BTNH, **options)), alone())


# ------------------------------------------------------------------------------------------------- the ring


@pytest.mark.parametrize(
    "n, causal, zigzag, packed",
    [
        (2, True, True, True),
        (8, True, True, True),
        (4, True, False, True),
        (8, False, True, True),
        *(
            pytest.param(*way, marks=slow)
            for way in [(4, True, True, True), (4, True, True, False), (2, False, True, False)]
        ),
    ],
)
def test_n_devices_match_one(n, causal, zigzag, packed):
    """Two query heads share a key head, and packed documents cross the borders of chunks."""
    found = spread(n, partial(ring_attention, **pair(causal=causal), causal=causal, zigzag=zigzag), PACKED, packed)
    same(found, alone(packed, causal))


def test_a_ring_of_one_device_is_plain_attention():
    same(spread(1, partial(ring_attention, **pair()), PACKED), alone())


def test_results_do_not_depend_on_check_vma():
    """Kernels whose results carry no varying axes need check_vma=False."""
    same(spread(4, partial(ring_attention, **pair()), PACKED, check_vma=False), alone())


def test_half_precision_is_rounded_once_per_shard():
    """bfloat16 has 8 bits. The output for each shard is rounded before the merge in float32; gradients are rounded once
    at the end."""
    given = Problem(*(x.astype(jnp.bfloat16) for x in PACKED[:4]), PACKED.segments_BT)
    exact = Problem(*(x.astype(jnp.float32) for x in given[:4]), PACKED.segments_BT)
    found = spread(4, partial(ring_attention, **pair()), given)
    assert all(x.dtype == jnp.bfloat16 for x in found)
    same(found, one_device(exact), 1e-2)


@pytest.mark.parametrize("window, steps", [(1, 1), (8, 2), (9, 2), (10, 3), (100, 4)])
def test_a_window_ends_the_ring_early(window, steps):
    """Eight positions per device: with a window of 9, the first one attends to eight keys of the device before."""
    attention = partial(ring_attention, **pair(window=window), zigzag=False, window=window)
    assert ring_steps(4, attention) == steps
    if window == 9:
        same(spread(4, attention, PACKED), alone(window=window))


def ring_steps(n: int, attention) -> int:
    """Return the number of devices whose keys a query attends to, from the last hop of the backward pass, which returns
    the gradients to their device."""

    def gradients(q, k, v):
        out, pull = jax.vjp(attention, q, k, v)
        return pull(out)

    hops = [
        eqn.params["perm"]
        for eqn in equations(traced(n, gradients, *PACKED[:3]).jaxpr)
        if eqn.primitive.name == "ppermute"
    ]
    return n - dict(hops[-1])[0] + 1 if hops else 1


def traced(n: int, function, *arrays):
    """Return the jaxpr of `function` inside shard_map over n devices, for arrays of these shapes."""
    mesh = mesh_of(n)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, ROWS)) for x in arrays]
    return jax.make_jaxpr(jax.shard_map(function, mesh=mesh, in_specs=ROWS, out_specs=ROWS))(*shapes)


def equations(jaxpr):
    """Yield every equation, including nested ones."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_a_contiguous_causal_ring_skips_invisible_keys():
    """One of the two branches has no matmul."""
    names = lambda jaxpr: [eqn.primitive.name for eqn in equations(jaxpr)]
    ring = traced(4, partial(ring_attention, **pair(), zigzag=False), *PACKED[:3])
    choices = [eqn.params["branches"] for eqn in equations(ring.jaxpr) if eqn.primitive.name == "cond"]
    assert choices and all(
        sorted("dot_general" in names(b.jaxpr) for b in branches) == [False, True] for branches in choices
    )


def test_sinks_are_counted_once():
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])
    mesh = mesh_of(4)

    def on_one(q, k, v, sinks):
        out, lse = attend(q, k, v, offset=0, q_segments=None, k_segments=None)
        return out * jnp.exp(lse - jnp.logaddexp(lse, sinks[:, None])).transpose(0, 2, 1)[..., None]

    def on_four(q, k, v, sinks):
        ring = lambda q, k, v, sinks: ring_attention(q, k, v, sinks_N=sinks, **pair())
        return jax.shard_map(ring, mesh=mesh, in_specs=(ROWS, ROWS, ROWS, P()), out_specs=ROWS)(q, k, v, sinks)

    def both(f, *x):
        return jax.jit(lambda *x: jax.tree.leaves(((y := jax.vjp(f, *x))[0], y[1](PACKED.dout_BTNH))))(*x)

    expected = both(on_one, *PACKED[:3], sinks)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *x: jax.vjp(on_four, *x[:4])[1](x[4]))(
            *(jax.device_put(x, NamedSharding(mesh, ROWS)) for x in PACKED[:3]), sinks,
            jax.device_put(PACKED.dout_BTNH, NamedSharding(mesh, ROWS)),
        )  # fmt: skip
    for a, b in zip(found, expected[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_the_ring_works_with_other_mesh_axes():
    """Rows over `data`, heads over `tensor`, positions over `sequence`."""
    mesh = Mesh(
        np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "tensor", "sequence"), axis_types=(AxisType.Explicit,) * 3
    )
    heads, ids = P("data", "sequence", "tensor"), P("data", "sequence")
    ring = lambda q, k, v, segments: ring_attention(q, k, v, segments=segments, **pair())
    inside = jax.shard_map(ring, mesh=mesh, in_specs=(heads, heads, heads, ids), out_specs=heads)

    @jax.jit
    def both(q, k, v, dout, segments):
        out, pull = jax.vjp(lambda q, k, v: inside(q, k, v, segments), q, k, v)
        return out, *pull(dout)

    specs = (heads,) * 4 + (ids,)
    with jax.set_mesh(mesh):
        found = both(*(jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(PACKED, specs, strict=True)))
    same(found, alone())


# ------------------------------------------------------------------------------------------------- zig-zag


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_zigzag_gives_device_i_chunks_i_and_2n_minus_1_minus_i_and_back(n):
    x = jnp.arange(2 * 4 * n).reshape(1, -1)  # chunks of 4
    inside = partial(jax.shard_map, mesh=mesh_of(n), in_specs=ROWS, out_specs=ROWS)
    with jax.set_mesh(mesh_of(n)):
        laid = jax.jit(inside(to_zigzag))(jax.device_put(x, NamedSharding(mesh_of(n), ROWS)))
        back = jax.jit(inside(from_zigzag))(laid)
    chunks = np.asarray(laid).reshape(n, 2, 4)[:, :, 0] // 4
    np.testing.assert_array_equal(chunks, [(i, 2 * n - 1 - i) for i in range(n)])
    np.testing.assert_array_equal(back, x)


def test_zigzag_rows_stay_zigzag():
    """With layout='zigzag' the ring does not exchange rows, so this test permutes them before and after."""
    n, T = 4, 32
    order = np.concatenate([np.arange(T).reshape(2 * n, -1)[[i, 2 * n - 1 - i]].ravel() for i in range(n)])
    laid = Problem(*(jnp.asarray(np.asarray(x)[:, order]) for x in PACKED))
    found = spread(n, partial(ring_attention, **pair(), layout="zigzag"), laid)
    same([np.asarray(x)[:, np.argsort(order)] for x in found], alone())


@pytest.mark.parametrize("n", [pytest.param(2, marks=slow), 4])
def test_zigzag_work_is_balanced_and_never_masked(n):
    """Only a chunk's attention to itself needs the causal mask; elsewhere attention without a mask gives the same.
    There is no branch, so every device computes the same number of pairs: over all steps, exactly the causal half."""
    sizes = []

    def unmasked(function):
        def inner(q, k, *rest, offset, **segments):
            own = isinstance(offset, int)
            assert not own or offset == 0
            sizes.append(q.shape[1] * k.shape[1] / (2 if own else 1))
            return function(q, k, *rest, offset=offset, causal=own, **segments)

        return inner

    attention = partial(ring_attention, attend=unmasked(attend), attend_backward=unmasked(plain.attend_backward))
    same(spread(n, attention, PACKED), alone())
    first, later = sizes[:3], sizes[3:5]  # in the forward pass, which traces its loop and its last step separately
    assert n * (sum(first) + (n - 1) * sum(later)) == 32 * 32 / 2
    names = {eqn.primitive.name for eqn in equations(traced(n, attention, *PACKED[:3]).jaxpr)}
    assert "dot_general" in names and "cond" not in names


# ------------------------------------------------------------------------------------------------- what is compiled


def compiled(n: int, T: int, devices=None, dtype=jnp.float32, **options):
    """Return the compiled gradient for T positions per device and 4 heads of 32."""
    mesh = mesh_of(n, devices)
    ring = jax.shard_map(partial(ring_attention, **pair(), **options), mesh=mesh, in_specs=ROWS, out_specs=ROWS)
    x = jax.ShapeDtypeStruct((1, n * T, 4, 32), dtype, sharding=NamedSharding(mesh, ROWS))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return (
            jax.jit(jax.grad(lambda q, k, v: ring(q, k, v).astype(jnp.float32).sum(), argnums=(0, 1, 2)))
            .lower(x, x, x)
            .compile()
        )


def test_memory_does_not_grow_with_the_number_of_devices_and_nothing_is_gathered():
    """With 256 positions per device, sequences of 1,024 and 2,048 need the same temporaries on a device."""
    sizes = {}
    for n in (4, 8):
        program = compiled(n, 256, layout="zigzag")
        text = program.as_text()
        assert "collective-permute" in text and "all-gather" not in text and "all-to-all" not in text
        sizes[n] = program.memory_analysis().temp_size_in_bytes
    assert sizes[8] < 1.01 * sizes[4]


@slow
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")  # the device is absent
def test_the_tpu_compiler_overlaps_the_ring_with_attention(monkeypatch):
    """Compiled ahead of time for four v5p chips: keys are sent while attention is computed."""
    pytest.importorskip("libtpu")
    # Initialize the CPU first, which reads XLA_FLAGS: the TPU compiler aborts the process at a flag it does not know.
    jax.devices()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1")
    text = compiled(4, 256, topology.devices, jnp.bfloat16, layout="zigzag").as_text()
    assert "all-gather" not in text
    loop = next(
        part for part in text.split("\n\n") if "collective-permute-start" in part and not part.startswith("ENTRY")
    )
    lines = loop.splitlines()
    start = next(i for i, line in enumerate(lines) if " collective-permute-start(" in line)
    done = next(i for i, line in enumerate(lines) if " collective-permute-done(" in line)
    assert any(" fusion(" in line or " convolution(" in line for line in lines[start:done])


# ------------------------------------------------------------------------------------------------- all-to-all


@pytest.mark.parametrize("n, N, K", [(2, 4, 2), (8, 8, 2), pytest.param(4, 4, 1, marks=slow)])
def test_all_to_all_matches_one_device(n, N, K):
    """With key heads that divide over the devices, and with fewer key heads than devices."""
    given = problem(1, B=2, T=32, N=N, K=K, H=4)
    found = spread(n, partial(ulysses_attention, attend=attend), given)
    same(found, one_device(given))


def test_all_to_all_sends_each_device_only_its_heads():
    """Two key heads for eight query heads on four devices: each device receives one key head."""
    shapes = []

    def recording(q, k, v, **options):
        shapes.append((q.shape, k.shape))
        return attend(q, k, v, **options)

    q, k = jnp.zeros((1, 32, 8, 4)), jnp.zeros((1, 32, 2, 4))
    traced(4, partial(ulysses_attention, attend=recording), q, k, k)
    assert shapes == [((1, 32, 2, 4), (1, 32, 1, 4))]


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.unchecked
@pytest.mark.parametrize(
    "attention, shapes, message",
    [
        (partial(ulysses_attention, attend=attend), (6, 2), "6 query heads"),
        (partial(ulysses_attention, attend=attend), (12, 3), "3 key/value heads"),
        (partial(ring_attention, **pair(), layout="striped"), (4, 4), "layout = 'striped'"),
        (
            partial(ring_attention, **pair(), layout="zigzag", zigzag=False),
            (4, 4),
            "layout = 'zigzag' with zigzag = False",
        ),
        (partial(ring_attention, **pair(), window=3), (4, 4), "window = 3"),
        (partial(ring_attention, **pair()), (4, 4, 12), "3 queries a device"),
    ],
)
def test_impossible_arguments_are_refused_by_name(attention, shapes, message):
    N, K, T = (*shapes, 16)[:3]
    q, k = jnp.zeros((1, T, N, 4)), jnp.zeros((1, T, K, 4))
    with pytest.raises(ValueError, match=message):
        traced(4, attention, q, k, k)


def test_the_default_is_a_balanced_causal_ring():
    defaults = {name: p.default for name, p in inspect.signature(ring_attention).parameters.items()}
    assert (defaults["causal"], defaults["zigzag"], defaults["layout"]) == (True, True, "contiguous")
