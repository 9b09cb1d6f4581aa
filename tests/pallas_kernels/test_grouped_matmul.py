"""The grouped matmul's API: its results against float64 NumPy, and its refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import IMPLEMENTATIONS, Tiles, best_implementation, grouped_glu, grouped_matmul
from pallas_kernels.grouped_matmul.shapes import Case, swiglu


def exactly(case: Case, arrays: dict, dout: np.ndarray) -> dict[str, np.ndarray]:
    """Return {out, dlhs, drhs} in float64, row by row, for float32 weights, with swiglu or without an activation."""
    lhs, rhs = (np.asarray(arrays[name], np.float64) for name in ("lhs", "rhs"))
    made = {"out": np.zeros((case.M, case.N)), "dlhs": np.zeros_like(lhs), "drhs": np.zeros_like(rhs)}
    for m, e in enumerate(np.repeat(np.arange(len(case.sizes)), case.sizes)):
        if case.G is None:
            w = rhs[e].T if case.transpose else rhs[e]
            made["out"][m], made["dlhs"][m] = lhs[m] @ w, dout[m] @ w.T
            outer = np.outer(lhs[m], dout[m])
            made["drhs"][e] += outer.T if case.transpose else outer
            continue
        gate, up = (lhs[m] @ rhs[e, :, g] for g in range(2))
        s = 1 / (1 + np.exp(-gate))
        made["out"][m] = gate * s * up
        for g, d in enumerate((dout[m] * up * s * (1 + gate * (1 - s)), dout[m] * gate * s)):
            made["dlhs"][m] += d @ rhs[e, :, g].T
            made["drhs"][e, :, g] += np.outer(lhs[m], d)
    return made


def found(case: Case, arrays: dict, dout: np.ndarray, implementation: str | None) -> dict[str, np.ndarray]:
    def both_ways(lhs, rhs, sizes, dout):
        out, pull = jax.vjp(lambda lhs, rhs: case.call(lhs, rhs, sizes, implementation=implementation), lhs, rhs)
        return out, *pull(dout)

    return dict(
        zip(("out", "dlhs", "drhs"), jax.jit(both_ways)(**arrays, dout=jnp.asarray(dout, jnp.float32)), strict=True)
    )


def agree(case: Case, implementation: str | None, seed: int = 0, poison: bool = False) -> None:
    arrays, after = case.arguments(seed), sum(case.sizes)
    dout = np.random.default_rng(seed + 1).normal(size=(case.M, case.N)).astype(np.float32)
    wanted = exactly(case, arrays, dout)
    if poison:
        arrays["lhs"], dout[after:] = arrays["lhs"].at[after:].set(jnp.nan), np.nan
    for name, x in found(case, arrays, dout, implementation).items():
        np.testing.assert_allclose(
            x, wanted[name], atol=2e-6 * max(abs(wanted[name]).max(), 1e-6), rtol=0, err_msg=name
        )


UNEVEN = (7, 0, 1, 20, 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(
    "case",
    [
        Case("plain", UNEVEN, K=12, N=9, after=5),
        Case("transpose", UNEVEN, K=12, N=9, transpose=True),
        Case("glu", UNEVEN, K=9, N=6, G=2),
    ],
    ids=lambda case: case.name,
)
def test_each_row_is_multiplied_by_the_matrix_of_its_group(case, implementation):
    agree(case, implementation)


def test_rows_after_the_last_group_are_not_read():
    agree(Case("after", UNEVEN, K=9, N=6, G=2, after=5), "xla", poison=True)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=5), st.integers(0, 10), st.integers(1, 20), st.integers(1, 20),
    st.sampled_from((None, 2)), st.booleans(), st.sampled_from(("reference", "xla")),
)  # fmt: skip
def test_random_calls_match_float64(sizes, after, K, N, G, transpose, implementation):
    case = Case(
        "drawn", tuple(sizes), K=K, N=N, G=G, after=after + (sum(sizes) + after == 0), transpose=transpose and G is None
    )
    agree(case, implementation, poison=implementation == "xla")


def test_the_default_on_a_cpu_is_xla():
    case = Case("default", (3, 5), K=8, N=8)
    arrays = case.arguments()
    np.testing.assert_array_equal(case.call(**arrays), case.call(**arrays, implementation="xla"))


@pytest.mark.parametrize(
    ("platform", "kind", "first"),
    [
        ("gpu", "NVIDIA H100 80GB HBM3", "triton"),
        ("cuda", "NVIDIA A100-SXM4-80GB", "triton"),
        ("gpu", "NVIDIA GeForce RTX 3090", "triton"),
        ("gpu", "Tesla V100-SXM2-16GB", "xla"),
        ("gpu", "Tesla T4", "xla"),
        ("gpu", "NVIDIA GeForce RTX 2080 Ti", "xla"),
        ("tpu", "TPU v5 lite", "tpu"),
        ("cpu", "cpu", "xla"),
    ],
)
def test_best_implementation_by_device(platform, kind, first):
    names = best_implementation(platform, kind)
    assert names[0] == first and names[-1] == "xla" and set(names) <= set(IMPLEMENTATIONS)


LHS, RHS, SIZES = jnp.zeros((8, 4)), jnp.zeros((2, 4, 6)), jnp.array([3, 5])


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("arguments", "options", "wanted"),
    [
        ((LHS, RHS[0], SIZES), {}, r"rhs of shape \(4, 6\)"),
        ((LHS, RHS[:, :3], SIZES), {}, "with the same K"),
        ((LHS, RHS, SIZES), {"transpose": True}, "with the same K"),
        ((LHS[:0], RHS, SIZES), {}, "no dimension may be empty"),
        ((LHS, RHS.astype(jnp.bfloat16), SIZES), {}, "must share one of"),
        ((LHS.astype(int), RHS.astype(int), SIZES), {}, "must share one of"),
        ((LHS, RHS, SIZES[:1]), {}, r"sizes of shape \(1,\)"),
        ((LHS, RHS, SIZES.astype(float)), {}, "one integer per group"),
        ((LHS, RHS, SIZES), {"scale_EN": jnp.ones((2, 6))}, "other dtypes take none"),
        ((LHS, RHS.astype(jnp.int8), SIZES), {}, "without a scale"),
        ((LHS, RHS.astype(jnp.int8), SIZES), {"scale_EN": jnp.ones((2, 4))}, r"must be \(2, 6\)"),
        ((LHS, RHS, SIZES), {"tiles": Tiles(m=48)}, "tiles.m = 48"),
        ((LHS, RHS, SIZES), {"tiles": Tiles(n=128)}, "implementation = None: .*'xla': tiles.n = 128"),
        ((LHS, RHS, SIZES), {"implementation": "gpu"}, "'gpu': unknown; use one of tpu, triton, xla, reference"),
        ((LHS, RHS, SIZES), {"interpret": True}, "name the kernel to interpret"),
        ((LHS, RHS, SIZES), {"implementation": "reference", "interpret": True}, "only Pallas kernels"),
        ((LHS, RHS, SIZES), {"implementation": "reference", "tiles": Tiles(m=16)}, "implementation = 'reference'"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument_and_the_fix(arguments, options, wanted):
    with pytest.raises(ValueError, match=wanted):
        grouped_matmul(*arguments, **options)


@pytest.mark.parametrize(
    ("platform", "kind", "name"), [("gpu", "NVIDIA A100-SXM4-80GB", "triton"), ("tpu", "TPU v5 lite", "tpu")]
)
def test_the_default_lists_the_reasons_if_no_implementation_can_run(platform, kind, name):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    wanted = rf"for a {platform} can run the call. '{name}': .*tiles.n = 8\b.*; 'xla': tiles.n = 8\b"
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=wanted):
        jax.eval_shape(partial(grouped_matmul, tiles=Tiles(n=8)), LHS, RHS, SIZES)


@pytest.mark.unchecked
def test_the_glu_refuses_wrong_shapes():
    with pytest.raises(ValueError, match=r"must be \[E, K, G, N\]"):
        grouped_glu(LHS, RHS, SIZES, swiglu)
    with pytest.raises(ValueError, match=r"must be \(2, 2, 6\)"):
        grouped_glu(LHS, jnp.zeros((2, 4, 2, 6), jnp.int8), SIZES, swiglu, scale_EGN=jnp.ones((2, 6)))


def test_quantized_weights_and_scales_get_no_gradient():
    case = Case("int8", (3, 0, 5), K=8, N=8, weights="int8")
    arrays = case.arguments()
    loss = lambda lhs, scale: case.call(lhs, arrays["rhs"], arrays["sizes"], scale, implementation="reference").sum()
    dlhs, dscale = jax.jit(jax.grad(loss, (0, 1)))(arrays["lhs"], arrays["scale"])
    weights = np.asarray(arrays["rhs"], np.float64) * np.asarray(arrays["scale"], np.float64)[:, None]
    expert = np.repeat(np.arange(3), case.sizes)
    np.testing.assert_allclose(dlhs, weights[expert].sum(2), atol=1e-5)
    assert not np.asarray(dscale).any()
