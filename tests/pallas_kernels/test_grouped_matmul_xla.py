"""The grouped matmul in plain JAX matches the reference's values and gradients however blocks and groups overlap."""

from __future__ import annotations

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from pallas_kernels.grouped_matmul import Tiles, grouped_glu, grouped_matmul, xla

E, K, N = 4, 5, 6
ACTIVATIONS = {1: jax.nn.relu, 2: lambda gate, up: jax.nn.silu(gate) * up}


@partial(jax.jit, static_argnames=("how", "transpose", "tiles"))
def matmul_and_gradients(lhs, rhs, sizes, dout, how, transpose=False, tiles=None):
    def run(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, transpose=transpose, tiles=tiles or Tiles(), implementation=how)

    out, pull = jax.vjp(run, lhs, rhs)
    return out, *pull(dout)


@partial(jax.jit, static_argnames="how")
def glu_and_gradients(lhs, rhs, sizes, dout, how):
    activation = ACTIVATIONS[rhs.shape[2]]
    out, pull = jax.vjp(lambda lhs, rhs: grouped_glu(lhs, rhs, sizes, activation, implementation=how), lhs, rhs)
    return out, *pull(dout)


def numbers(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def same(found, expected, tolerance: float = 1e-5):
    for name, a, b in zip(("out", "gradient of lhs", "of rhs"), found, expected, strict=True):
        a, b = (np.asarray(y, np.float64) for y in (a, b))
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()), rtol=0, err_msg=name)


# Blocks of 4 and 2 rows: groups end at, before and after the border of a block and of the array.
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=E, max_size=E), st.integers(0, 99), st.booleans())
def test_groups_of_any_size_match_the_reference(sizes, seed, poisoned):
    M = 23
    sizes = np.minimum(sizes, np.maximum(M - np.cumsum(sizes) + sizes, 0)).astype(np.int32)
    lhs, rhs, gates, dout = numbers(seed, (M, K), (E, N, K), (E, K, 2, N), (M, N))
    clean = lhs.copy()
    if poisoned:  # rows of no group
        lhs[sizes.sum() :], clean[sizes.sum() :] = np.nan, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "BLOCKS", (4, 2))
        found = (
            matmul_and_gradients(lhs, rhs, sizes, dout, "xla", transpose=True),
            glu_and_gradients(lhs, gates, sizes, dout, "xla"),
        )
    expected = (
        matmul_and_gradients(clean, rhs, sizes, dout, "reference", transpose=True),
        glu_and_gradients(clean, gates, sizes, dout, "reference"),
    )
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)
        assert not np.asarray(ours[0])[sizes.sum() :].any() and not np.asarray(ours[1])[sizes.sum() :].any()
        assert not np.asarray(ours[2])[sizes == 0].any()


@pytest.mark.parametrize(
    "M, sizes", [(600, (0, 300, 1, 290)), (1, (0, 0, 1, 0)), (37, (0, 0, 0, 0)), (352, (16, 256, 64, 16))]
)
def test_default_blocks_match_the_reference(M, sizes):
    lhs, rhs, dout = numbers(M, (M, K), (E, K, 1, N), (M, N))
    given = (lhs, rhs, np.array(sizes, np.int32), dout)
    same(glu_and_gradients(*given, "xla"), glu_and_gradients(*given, "reference"))


def test_tiles_set_the_rows_of_a_block():
    lhs, rhs, dout = map(jnp.asarray, numbers(0, (50, K), (E, K, N), (50, N)))
    sizes = jnp.array([20, 0, 13, 17])
    assert [xla._cuts(50, 2, rows) for rows in (None, 8, 32)] == [(50, 16), (8,), (32, 16)]
    assert (
        xla._cuts(16, 8, None) == (2,) and xla._cuts(8, 64, None) == (1,) and xla._cuts(3, 1, None) == (3,)
    )  # decoding
    assert [xla._cuts(16, 8, rows) for rows in (8, 32)] == [(8,), (16,)] and xla._cuts(64, 32, 32) == (32, 16)
    same(
        matmul_and_gradients(lhs, rhs, sizes, dout, "xla", tiles=Tiles(m=8)),
        matmul_and_gradients(lhs, rhs, sizes, dout, "reference"),
    )
    for tiles in (Tiles(n=8), Tiles(k=8)):
        with pytest.raises(ValueError, match=r"tiles\.[nk] = 8: xla divides only rows"):
            grouped_matmul(lhs, rhs, sizes, tiles=tiles, implementation="xla")


@pytest.mark.parametrize("dtype, tolerance", [("bfloat16", 1e-2), ("float16", 1e-3)])
def test_half_precision_is_summed_in_float32(dtype, tolerance):
    lhs, rhs, dout = (jnp.asarray(y, dtype) for y in numbers(1, (40, 64), (E, 64, N), (40, N)))
    given = (lhs, rhs, np.array([3, 0, 30, 5], np.int32), dout)
    found = matmul_and_gradients(*given, "xla")
    assert {y.dtype.name for y in found} == {dtype}
    same(
        found,
        matmul_and_gradients(
            *(y.astype(jnp.float32) for y in given[:2]), given[2], dout.astype(jnp.float32), "reference"
        ),
        tolerance,
    )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("gates", [1, 2])
def test_quantized_weights_match_the_reference(dtype, gates):
    M, sizes = 30, jnp.array([7, 0, 11, 9])
    lhs, rhs, scale, dout = map(jnp.asarray, numbers(2, (M, K), (E, K, gates, N), (E, gates, N), (M, N)))
    weights = jnp.round(20 * rhs).astype(dtype)

    def run(how):
        def f(lhs):
            return grouped_glu(lhs, weights, sizes, ACTIVATIONS[gates], scale_EGN=scale, implementation=how)

        out, pull = jax.vjp(f, lhs)
        return out, pull(dout)[0], np.zeros(1)

    exact = weights.astype(jnp.float32) * scale[:, None]
    expected = glu_and_gradients(lhs, exact, sizes, dout, "reference")
    same(jax.jit(lambda: run("xla"))(), (*expected[:2], np.zeros(1)))


def test_experts_without_rows_are_not_read():
    """In decoding most experts have no rows. Their weights, here NaN, must not even be multiplied by zero."""
    lhs, rhs = numbers(3, (2, K), (E, K, N))
    rhs[[0, 2]] = np.nan
    out = jax.jit(partial(grouped_matmul, implementation="xla"))(lhs, rhs, jnp.array([0, 1, 0, 1]))
    np.testing.assert_allclose(out, np.stack([lhs[0] @ rhs[1], lhs[1] @ rhs[3]]), rtol=1e-5)


def test_work_grows_with_rows_and_not_with_groups():
    """The compiled program's largest matmul has the weights of one group."""
    groups = 64
    lhs, rhs = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, K), (groups, K, N)))
    sizes = jax.ShapeDtypeStruct((groups,), jnp.int32)
    run = jax.jit(partial(grouped_matmul, implementation="xla"))
    once = run.lower(lhs, rhs, sizes).compile().cost_analysis()["flops"]
    assert once < 2 * 2 * 512 * K * N + 100 * groups + 512 * 20
