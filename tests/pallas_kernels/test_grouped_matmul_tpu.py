"""The TPU kernels of the grouped matmul, interpreted against the reference and compiled for every generation."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ahead_of_time
from pallas_kernels.flash_attention.tpu_tiles import GENERATIONS, MIB
from pallas_kernels.grouped_matmul import Tiles, grouped_glu, grouped_matmul, tpu, tpu_tiles, tpu_walk
from pallas_kernels.grouped_matmul.spec import Spec
from pallas_kernels.grouped_matmul.tpu_tiles import Call, Cut

SMALL = Tiles(m=128, n=128, k=128)
PARTS = Tiles(m=256, n=128, k=128)  # a tile of rows has parts of 128 and 256
# Largest error relative to the largest entry. bfloat16 has a relative rounding error of 2^-9, which applies to results
# and to the products that the backward pass reads.
BOUNDS = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 2e-3}
TARGETS = ("v4", "v5e", "v5p", "v6e", "7x")


def swiglu(gate, round_up):
    return jax.nn.silu(gate) * round_up


def shifted(h):
    """Return an activation that is not zero at zero."""
    return jnp.cos(h)


@functools.cache
def compiled(implementation: str, activation, transpose: bool, tiles: Tiles, interpret, quantized: bool):
    """Return a program for out and the gradients of lhs and, unless they are quantized, the weights."""

    @jax.jit
    def run(lhs, rhs, scale, sizes, dout):
        how = {"implementation": implementation, "tiles": tiles, "interpret": interpret}

        def call(lhs, rhs):
            if activation is None:
                return grouped_matmul(lhs, rhs, sizes, scale_EN=scale, transpose=transpose, **how)
            return grouped_glu(lhs, rhs, sizes, activation, scale_EGN=scale, **how)

        out, pull = jax.vjp((lambda lhs: call(lhs, rhs)) if quantized else call, *((lhs,) if quantized else (lhs, rhs)))
        return out, *pull(dout.astype(out.dtype))

    return run


def assert_equal_to_reference(
    M, sizes, K=128, G=1, N=128, activation=None, transpose=False, dtype="float32", quantize=None, tiles=SMALL,
    interpret=True, poison=True, seed=0,
):  # fmt: skip
    """Assert that the kernel matches the reference, and return the errors. Rows after the last group hold NaN for the
    kernel if `poison`, and zeros for the reference."""
    r = np.random.default_rng(seed)
    E, used = len(sizes), sum(sizes)
    draw = lambda *shape: jnp.asarray(r.normal(size=shape), dtype)
    lhs, dout = draw(M, K), draw(M, N)
    rhs = draw(E, K, G, N) if activation is not None else draw(E, N, K) if transpose else draw(E, K, N)
    scale = None
    if quantize is not None:
        rhs = (rhs.astype(jnp.float32) * 20).astype(quantize)
        scale = jnp.asarray(r.uniform(0.01, 0.1, (E, G, N) if activation is not None else (E, N)), jnp.float32)
    sizes = jnp.asarray(sizes, jnp.int32)
    after = np.arange(M)[:, None] >= used
    clean = [jnp.where(after, 0, x) for x in (lhs, dout)]
    dirty = [jnp.where(after, jnp.nan, x) for x in (lhs, dout)] if poison else clean
    run = lambda name, tiles, interpret, lhs, rhs, dout: [
        np.asarray(x, np.float64)
        for x in compiled(name, activation, transpose, tiles, interpret, quantize is not None)(
            lhs, rhs, scale, sizes, dout
        )
    ]
    got = run("tpu", tiles, interpret, dirty[0], rhs, dirty[1])
    wide = lambda x: x if x.dtype.itemsize == 1 else x.astype(jnp.float32)
    want = run("reference", Tiles(), False, wide(clean[0]), wide(rhs), wide(clean[1]))
    errors = {}
    for name, a, b in zip(("out", "dlhs", "drhs"), got, want, strict=False):
        assert np.isfinite(a).all(), name
        if name != "drhs":
            assert not a[used:].any(), f"{name}: rows after the last group"
        errors[name] = np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-6)
        assert errors[name] <= BOUNDS[dtype], f"{name}: {errors}"
    return errors


@st.composite
def group_sizes(draw, groups=5):
    """Draw sizes whose sum is at most 300."""
    cuts = sorted(draw(st.lists(st.integers(0, 300), min_size=groups, max_size=groups)))
    return tuple(b - a for a, b in zip([0, *cuts], cuts, strict=False))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sizes=group_sizes())
@example(sizes=(0, 0, 0, 0, 0))
@example(sizes=(0, 0, 300, 0, 0))
@example(sizes=(1, 127, 128, 1, 1))
@example(sizes=(128, 128, 0, 0, 44))
@example(sizes=(0, 1, 0, 1, 0))
def test_glu_and_gradients_match_for_any_sizes(sizes):
    assert_equal_to_reference(300, sizes, G=2, N=128, activation=swiglu, tiles=PARTS)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(sizes=group_sizes())
def test_transposed_bfloat16_matches_for_any_sizes(sizes):
    assert_equal_to_reference(300, sizes, transpose=True, dtype="bfloat16", tiles=PARTS)


def test_the_error_of_weight_gradients_does_not_depend_on_alignment():
    """Other kernels are known to lose accuracy silently if groups are not aligned to tiles."""
    table = {
        at: assert_equal_to_reference(300, (at, 100, 60), tiles=PARTS)["drhs"]
        for at in (0, 1, 7, 8, 15, 16, 17, 64, 127, 128)
    }
    assert max(table.values()) <= 2e-6, table


CASES = {
    "odd everything": dict(M=75, sizes=(3, 0, 40, 17), K=40, G=2, N=24, activation=swiglu, tiles=Tiles()),
    "one row": dict(M=1, sizes=(0, 1, 0), tiles=Tiles()),
    "activation of zero is not zero": dict(M=140, sizes=(30, 0, 50), activation=shifted),
    "pieces of columns and of K": dict(M=260, sizes=(100, 9, 100), K=384, G=2, N=256, activation=swiglu),
    "float16": dict(M=140, sizes=(30, 0, 50), dtype="float16"),
    "int8": dict(M=140, sizes=(30, 0, 90), G=2, activation=swiglu, quantize="int8", dtype="bfloat16"),
    "int8 transposed": dict(M=140, sizes=(30, 0, 90), transpose=True, quantize="int8"),
    "float8_e4m3fn": dict(M=140, sizes=(30, 0, 90), quantize="float8_e4m3fn"),
    "float8_e5m2": dict(M=140, sizes=(30, 0, 90), N=200, quantize="float8_e5m2", dtype="bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_features_match_the_reference(name):
    assert_equal_to_reference(**CASES[name])


def test_nan_stays_in_its_row_and_group():
    x = jnp.ones((40, 128)).at[12].set(jnp.nan)
    w = jnp.ones((3, 128, 128))
    sizes = jnp.array([10, 20, 10])
    run = compiled("tpu", None, False, SMALL, True, False)
    out, _, dw = run(x, w, None, sizes, jnp.ones_like(x))
    assert np.isnan(out[12]).all() and np.isfinite(np.delete(np.asarray(out), 12, 0)).all()
    assert np.isnan(dw[1]).all() and np.isfinite(dw[0]).all() and np.isfinite(dw[2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [SMALL, Tiles(m=32, n=128, k=128), Tiles(k=256)], ids=str)
def test_no_races_and_no_unwritten_results_in_the_tpu_interpreter(tiles):
    """Memory starts as NaN, and a transfer only happens at its wait."""
    strict = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait")
    assert_equal_to_reference(
        200, (30, 0, 99, 5), K=256, G=2, N=256, activation=swiglu, tiles=tiles, interpret=strict, poison=False
    )
    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
    except ImportError:
        return
    races = getattr(interpreter, "races", None)  # jax 0.10 records races, 0.12 raises
    assert races is None or not races.races_found


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=group_sizes(6), tile=st.sampled_from([16, 64, 128, 512]), empty=st.booleans())
@example(sizes=(0,) * 6, tile=64, empty=True)
@example(sizes=(0,) * 6, tile=64, empty=False)
@example(sizes=(300, 0, 0, 0, 0, 0), tile=64, empty=False)
def test_the_walk_visits_each_row_once(sizes, tile, empty):
    M = 300
    words, count = jax.jit(tpu_walk.walk, static_argnums=(1, 2), static_argnames="empty")(
        jnp.asarray(sizes), M, tile, empty=empty
    )
    most = tpu_walk.max_visits(M, len(sizes), tile)
    assert words.shape == (4 * most,) and 0 <= int(count) <= most
    visits = np.asarray(words).reshape(4, -1)[:, : int(count)].T
    rows = [(group, tile * t + row) for t, group, start, stop in visits for row in range(start, stop)]
    assert rows == list(enumerate_rows(sizes))
    tiles, groups = visits[:, 0].tolist(), visits[:, 1].tolist()
    assert groups == sorted(groups)  # a group's visits are consecutive
    if empty:  # each group has a visit, which writes its result
        assert set(groups) == set(range(len(sizes)))
        assert all(sizes[g] == 0 for g, start, stop in visits[:, 1:] if start == stop)
    else:  # each tile has a visit, its visits are consecutive, and no empty group has one
        assert tiles == sorted(tiles) and set(tiles) == set(range(-(-M // tile)))
        filled = sum(start < stop for _, _, start, stop in visits)
        assert filled == sum(
            (end - 1) // tile - (end - n) // tile + 1 for n, end in zip(sizes, np.cumsum(sizes), strict=True) if n
        )


def enumerate_rows(sizes):
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            yield group, row
            row += 1


def test_parts_are_multiples_of_sixteen_rows():
    assert Cut(512, 128, 128, 128, 64, 0, 0).parts() == [64, 128, 256, 512]
    assert Cut(48, 128, 128, 128, 16, 0, 0).parts() == [48]  # 24 is not a multiple of 16


CALLS = [
    Call(8192, 8, 4096, 14336, 2), Call(8192, 8, 28672, 4096), Call(16384, 256, 2048, 512, 2, keep=True),
    Call(64, 8, 4096, 14336, 2),
    Call(100, 3, 200, 100), Call(8192, 8, 2048, 8192, 2, 4, 4), Call(8192, 64, 2048, 1408, 2, wb=1),
]  # fmt: skip


@pytest.mark.parametrize("device", GENERATIONS.values(), ids=lambda device: device.name)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_tiles_fit_in_vmem_and_divide_the_dimensions(device, call):
    cut = tpu_tiles.forward_cut(device, call, Tiles())
    assert cut.vmem <= device.vmem and cut.m % 16 == 0
    assert tpu_tiles.round_up(call.K) % cut.k == 0 and tpu_tiles.round_up(call.N) % cut.n == 0
    assert tpu_tiles.gradient_cut(device, call, Tiles()).vmem <= device.vmem


def test_a_tile_holds_all_of_k_where_it_fits():
    """Otherwise a group's weights are read at every visit."""
    for name in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"):
        assert tpu_tiles.forward_cut(GENERATIONS[name], CALLS[0], Tiles()).k == 4096


def test_refusals_give_the_reason():
    def reason(M=256, K=256, N=256, E=4, dtype="bfloat16", tiles=Tiles(), interpret=True):  # noqa: B008
        shape = lambda *x: jax.ShapeDtypeStruct(x, jnp.dtype(dtype))
        return tpu.unsupported(Spec(False, None, tiles, interpret), shape(M, K), shape(E, K, 1, N), None)

    assert reason() is None
    assert "needs a TPU" in reason(interpret=False)
    with jax.enable_x64(True):
        assert "float64" in reason(dtype="float64")
    assert "tiles.m = 8" in reason(tiles=Tiles(m=8))
    assert "tiles.n = 64" in reason(tiles=Tiles(n=64))
    assert "MiB of VMEM" in reason(M=8192, K=8192, N=8192, tiles=Tiles(m=8192, n=8192, k=8192))
    assert "scalar memory" in reason(M=1 << 20, tiles=Tiles(m=16))


def both(activation, **how):
    """Return a function that computes out and every gradient."""

    def run(lhs, rhs, sizes, dout, scale=None):
        call = lambda lhs, rhs: grouped_glu(lhs, rhs, sizes, activation, scale_EGN=scale, implementation="tpu", **how)
        if scale is not None:
            out, pull = jax.vjp(lambda lhs: call(lhs, rhs), lhs)
        else:
            out, pull = jax.vjp(call, lhs, rhs)
        return out, pull(dout)

    return run


def compile_both(target, M, E, K, N, dtype="bfloat16", quantize=None, **how):
    shape = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    arguments = [shape(dtype, M, K), shape(quantize or dtype, E, K, 2, N), shape("int32", E), shape(dtype, M, N)]
    arguments += [shape("float32", E, 2, N)] if quantize else []
    return ahead_of_time.compile_for(target, both(swiglu, **how), *arguments)


QUICK = ("v5e", "v6e")


@pytest.mark.parametrize("target", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS])
def test_compiles_forward_and_gradients(target):
    pytest.importorskip("libtpu")
    compile_both(target, 200, 5, 128, 128, tiles=SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("quantize", ["int8", "float8_e4m3fn", "float8_e5m2"])
def test_quantized_weights_compile(target, quantize):
    pytest.importorskip("libtpu")
    compile_both(target, 1000, 4, 512, 384, quantize=quantize)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "shape", [(300, 5, 200, 200), (8192, 8, 4096, 14336), (8192, 8, 14336, 4096), (16384, 256, 2048, 512)], ids=str
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_default_tiles_fit_in_the_estimated_memory(target, shape, dtype):
    """The estimate of tpu_tiles is the limit passed to the compiler, which refuses a kernel that needs more."""
    pytest.importorskip("libtpu")
    compile_both(target, *shape, dtype=dtype)


def test_the_compiler_refuses_a_kernel_above_its_limit(monkeypatch):
    """The test above relies on this."""
    pytest.importorskip("libtpu")
    real = tpu_tiles.forward_cut
    monkeypatch.setattr(tpu_tiles, "forward_cut", lambda *given: Cut(**(vars(real(*given)) | {"vmem": MIB // 4})))
    with pytest.raises(Exception, match=r"(?i)vmem"):
        compile_both("v5e", 200, 5, 128, 128, tiles=SMALL)
