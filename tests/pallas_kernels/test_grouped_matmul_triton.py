"""The Triton kernels of the grouped matmul, interpreted on the CPU against the reference and lowered for CUDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import Tiles, grouped_matmul
from pallas_kernels.grouped_matmul.shapes import CASES, Case
from pallas_kernels.grouped_matmul.spec import Spec
from pallas_kernels.grouped_matmul.triton import max_visits, tile_sizes, visits
from pallas_kernels.grouped_matmul.triton_kernels import band, widen

DEFAULT, SMALL = Tiles(), Tiles(m=16, n=16, k=16)
# Relative to the largest entry. The reference sums in another order; 16-bit types also round the result and the
# products that the backward pass reads.
BOUNDS = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}
QUICK = {"rows_after", "transpose_odd", "glu_rows_after", "plain_activation", "int8_glu", "bfloat16_glu"}


def outcome(case: Case, implementation: str, tiles: Tiles = DEFAULT, poison: bool = False) -> dict[str, np.ndarray]:
    """Return out and the gradients of lhs and rhs, in float32. `poison`: NaN in the rows after the last group."""
    arrays = case.arguments()
    dout = jnp.asarray(np.random.default_rng(1).normal(size=(case.M, case.N)), case.dtype)
    if poison:
        after = sum(case.sizes)
        arrays["lhs"], dout = arrays["lhs"].at[after:].set(jnp.nan), dout.at[after:].set(jnp.nan)
    learned = ("lhs",) if case.weights else ("lhs", "rhs")

    def both_ways(arrays, dout):
        rest = {name: x for name, x in arrays.items() if name not in learned}
        how = {"tiles": tiles, "implementation": implementation, "interpret": implementation == "triton"}
        out, pull = jax.vjp(lambda these: case.call(**these, **rest, **how), {name: arrays[name] for name in learned})
        return {"out": out} | {f"d{name}": x for name, x in pull(dout)[0].items()}

    return {name: np.asarray(x, np.float32) for name, x in jax.jit(both_ways)(arrays, dout).items()}


def agree(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], dtype: str, least: float = 1e-6) -> None:
    """Assert closeness relative to the largest entry, or to `least` if that is larger."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, atol=BOUNDS[dtype] * max(abs(x).max(), least), rtol=0, err_msg=name)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.slow) for c in CASES]
)
def test_matches_the_reference_and_ignores_nan_after_the_last_group(case):
    """The interpreter's outputs start as NaN, so an entry that is not written fails."""
    agree(outcome(case, "triton", SMALL, poison=True), outcome(case, "reference"), case.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name in ("unaligned", "glu_rows_after", "bfloat16_transpose")], ids=str
)
def test_matches_the_reference_with_default_tiles(case):
    agree(outcome(case, "triton", poison=True), outcome(case, "reference"), case.dtype)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 20), st.integers(1, 40), st.integers(1, 40),
    st.sampled_from((None, 1, 2)), st.sampled_from((Tiles(16, 16, 16), Tiles(32, 16, 32))), st.booleans(),
)  # fmt: skip
def test_random_calls_match_the_reference(sizes, after, K, N, G, tiles, transpose):
    case = Case(
        "drawn", tuple(sizes), K=K, N=N, G=G, after=after + (sum(sizes) + after == 0), transpose=transpose and G is None
    )
    # With few entries, products of order one may cancel, so rounding errors are relative to 1, not to the result.
    agree(outcome(case, "triton", tiles, poison=True), outcome(case, "reference"), case.dtype, least=1.0)


def test_results_are_deterministic():
    case = next(c for c in CASES if c.name == "bfloat16_glu")
    first, second = (outcome(case, "triton", SMALL) for _ in range(2))
    for name, x in first.items():
        np.testing.assert_array_equal(x, second[name])


def test_sizes_beyond_the_rows_do_not_access_memory_outside_the_array():
    """Such sizes are a caller's bug, but no program may read or write outside the array."""
    lhs, rhs = jnp.ones((20, 8)), jnp.ones((3, 8, 8))
    out = grouped_matmul(lhs, rhs, jnp.array([10, 300, 5]), implementation="triton", interpret=True, tiles=SMALL)
    np.testing.assert_array_equal(out, np.full((20, 8), 8.0))
    listed = np.asarray(visits(jnp.array([10, 300, 5]), 20, 16))
    assert listed[:, 1:].max() <= 20


@given(st.lists(st.integers(0, 50), min_size=5, max_size=5), st.integers(0, 30), st.sampled_from((16, 32)))
@settings(deadline=None)
def test_visits_contain_each_row_once(sizes, after, tile):
    """Each row is in one visit, of its group. An empty group has no visit, and `max_visits` is an upper bound."""
    M, E = 300, len(sizes)
    sizes[-1] += max(M - after - sum(sizes), 0)  # a fixed M, so that JAX compiles once
    listed = np.asarray(jax.jit(visits, static_argnums=(1, 2))(jnp.array(sizes), M, tile))
    group_M = np.repeat(np.arange(E + 1), [*sizes, M - sum(sizes)])
    seen = np.zeros(M, int)
    for group, start, end in listed:
        assert 0 <= start <= end <= M and end - start <= tile
        assert (group_M[start:end] == group).all()
        seen[start:end] += 1
    assert (seen == 1).all()
    used = listed[listed[:, 1] < listed[:, 2]]
    assert len(used) == sum(-(-n // tile) for n in (*sizes, M - sum(sizes)))
    assert len(listed) == max_visits(M, E, tile)
    in_groups = used[used[:, 0] < E]
    assert len(in_groups) <= -(-sum(sizes) // tile) + E - 1


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 12), st.integers(1, 64))
def test_the_bound_on_visits_is_tight(M, E, tile):
    """The worst sizes reach it: as many groups as possible have one row more than whole tiles."""
    filled = min(E + 1, M)
    worst = [1] * filled
    worst[0] += (M - filled) // tile * tile
    worst[-1] += (M - filled) % tile
    assert sum(worst) == M
    assert sum(-(-n // tile) for n in worst) == max_visits(M, E, tile)


@given(st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None, max_examples=20)
def test_bands_visit_every_tile_once(rows, columns):
    found = [tuple(int(x) for x in band(jnp.int32(i), rows, columns)) for i in range(min(rows * columns, 60))]
    assert len(set(found)) == len(found)
    assert all(0 <= row < rows and 0 <= column < columns for row, column in found)
    assert {row for row, _ in found[: 8 * columns]} == set(range(min(rows, 8, len(found))))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_float8_conversion_matches_jax(name, dtype):
    """All 256 values, with subnormals, infinities and NaN."""
    bits = jnp.arange(256, dtype=jnp.uint8)
    wanted = np.asarray(jax.lax.bitcast_convert_type(bits, jnp.dtype(name)).astype(dtype), np.float32)
    found = np.asarray(widen(jax.lax.bitcast_convert_type(bits, jnp.int8), name, jnp.dtype(dtype)), np.float32)
    np.testing.assert_array_equal(found, wanted)


@settings(deadline=None)
@given(
    st.sampled_from(("forward", "weights_gradient")), st.integers(1, 10**5), st.integers(1, 300), st.integers(1, 10**4),
    st.integers(1, 10**4), st.integers(1, 8), st.sampled_from(("float32", "bfloat16")),
)  # fmt: skip
def test_tiles_fit_the_smallest_gpus(direction, M, E, K, N, G, dtype):
    """Sizes are powers of two of at least 16, pipelined operands fit in 99 KiB of shared memory, sums in registers."""
    s = tile_sizes(direction, Spec(), M, E, K, N, G, dtype)
    assert all(size >= 16 and size & (size - 1) == 0 for size in (s.m, s.n, s.k))
    operands = s.m * s.k + s.k * s.n * G if direction == "forward" else s.m * (s.k + s.n)
    assert operands * s.stages * jnp.dtype(dtype).itemsize <= 99 * 1024
    sums = s.m * s.n * G if direction == "forward" else s.k * s.n
    assert sums <= 64 * 32 * s.warps


@pytest.mark.parametrize(
    ("change", "wanted"),
    [({"tiles": Tiles(k=8)}, "tiles.k = 8"), ({"dtype": "float64"}, "float64"), ({"G": 9}, "9 gates")],
)
def test_calls_that_the_kernel_cannot_run_are_refused(change, wanted):
    case = Case("refused", (16,), dtype=change.get("dtype", "float32"), G=change.get("G"))
    with jax.enable_x64(True), pytest.raises(ValueError, match=f"implementation = 'triton': .*{wanted}"):
        case.call(**case.arguments(), tiles=change.get("tiles", DEFAULT), implementation="triton", interpret=True)


def test_a_cpu_is_refused():
    case = Case("refused", (16,))
    with pytest.raises(ValueError, match="implementation = 'triton': needs a GPU, not a cpu"):
        case.call(**case.arguments(), implementation="triton")


LOWERED = [
    Case("mixtral", (1000, 24, 0, 1024), K=512, N=256, G=2, dtype="bfloat16"),
    Case("transpose", (100, 24, 0, 68), K=64, N=1024, dtype="float16", transpose=True),
    Case("odd", (3, 0, 70), K=41, N=27, G=2, after=10),
    Case("int8", (3, 0, 70), K=64, N=32, weights="int8", dtype="bfloat16"),
    Case("float8", (3, 0, 70), K=64, N=32, G=1, weights="float8_e4m3fn", dtype="bfloat16"),
]


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_lowers_for_cuda(case, monkeypatch):
    """Forward and backward lower to Triton programs for a GPU that this machine lacks, and Triton's verifier accepts
    them."""
    from jax._src.pallas.triton import lowering

    modules, lower = [], lowering.lower_jaxpr_to_triton_module
    # Pallas does not verify the module, so a loop over an i1, which Triton refuses on the device, would pass here.
    keep = lambda *args, **kwargs: modules.append(lower(*args, **kwargs)) or modules[-1]
    monkeypatch.setattr(lowering, "lower_jaxpr_to_triton_module", keep)
    learned = ("lhs",) if case.weights else ("lhs", "rhs")
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in case.arguments().items()}

    def loss(these, rest):
        return case.call(**these, **rest, implementation="triton").astype(jnp.float32).sum()

    device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)):
        step = jax.jit(jax.value_and_grad(loss)).trace(
            {name: shapes[name] for name in learned}, {name: x for name, x in shapes.items() if name not in learned}
        )
        text = step.lower(lowering_platforms=("cuda",)).as_text()
    kernels = 2 if case.weights else 3
    assert text.count("custom_call @__gpu$xla.gpu.triton") == kernels == len(modules)
    assert all(name in text for name in ("grouped_matmul_forward", "grouped_matmul_weights_gradient")[: kernels - 1])
    assert all(made.module.operation.verify() for made in modules)
    assert f"<{len(case.sizes)}x{case.M}x" not in text, "a copy of the rows for each group"
