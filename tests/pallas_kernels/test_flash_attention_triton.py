"""The Triton kernels, interpreted on the CPU against the reference and lowered for CUDA. No GPU is needed."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import (
    EMPTY,
    FULL,
    PARTIAL,
    Mask,
    Strided,
    Tiles,
    flash_attention,
    flash_attention_backward,
    tile_kinds,
)
from pallas_kernels.flash_attention.mask import MaskData
from pallas_kernels.flash_attention.shapes import CASES, Case
from pallas_kernels.flash_attention.triton import list_tiles
from pallas_kernels.flash_attention.triton_kernels import parts
from tests.closeness import assert_close

SMALL = Tiles(q=64, k=32, q_dkv=32, k_dkv=64, q_dq=32, k_dq=32)
# Relative to the largest entry. bfloat16: weights and logit gradients are rounded to 8 bits before their products.
FORWARD = {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1.5e-3}
BACKWARD = {"float32": 4e-6, "bfloat16": 2e-2, "float16": 3e-3}

RUN = [case for case in CASES if not case.bias]
QUICK = {
    "strided_packed", "block_sparse", "odd_bidirectional", "offset_by_row", "sees_nothing", "bfloat16", "all_together",
}  # fmt: skip


def arrays(case, seed=0):
    """Return q, k, v in the case's dtype, and its other arguments, as JAX arrays."""
    (q, k, v), kwargs = case.arguments(seed)
    as_jax = lambda x: jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, x)
    return tuple(jnp.asarray(x, case.dtype) for x in (q, k, v)), {name: as_jax(x) for name, x in kwargs.items()}


def outcome(case, implementation, tiles=SMALL, seed=0):
    """Return {out, lse, gradients of q, k, v and sinks} in float32. Both `out` and `lse` have a cotangent."""
    (q, k, v), kwargs = arrays(case, seed)
    r = np.random.default_rng(seed + 1)
    dout = jnp.asarray(r.normal(size=(*q.shape[:3], v.shape[3])), jnp.float32)
    dlse = jnp.asarray(r.normal(size=(q.shape[0], q.shape[2], q.shape[1])), jnp.float32)
    traced = {name: kwargs.pop(name) for name in ("sinks_N",) if name in kwargs}

    def loss(q, k, v, traced):
        out, lse = flash_attention(
            q, k, v, **traced, **kwargs, tiles=tiles, implementation=implementation,
            interpret=implementation == "triton", return_lse=True,
        )  # fmt: skip
        return (out.astype(jnp.float32) * dout).sum() + jnp.where(lse > -1e29, lse * dlse, 0.0).sum(), (out, lse)

    (_, (out, lse)), (dq, dk, dv, dtraced) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(
        q, k, v, traced
    )
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv} | {f"d{name}": x for name, x in dtraced.items()}
    return {name: np.asarray(x, np.float32) for name, x in found.items()}


def agree(found, wanted, dtype, terms=0.0):
    """Assert closeness. `terms`: the size of the terms of a gradient's sum, in case they cancel."""
    for name, x in wanted.items():
        # The lse of a masked row must match exactly, and must not set the scale for the others.
        unmasked = np.abs(x) < 1e29
        np.testing.assert_array_equal(found[name][~unmasked], x[~unmasked])
        forward = name in ("out", "lse")
        scale = max(np.abs(x[unmasked]).max(initial=0.0), 1e-6 if forward else terms, 1e-6)
        bound = (FORWARD if forward else BACKWARD)[dtype]
        assert_close(found[name][unmasked], x[unmasked], bound, scale=scale, what=name)


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=c.name, marks=() if c.name in QUICK else pytest.mark.slow) for c in RUN]
)
def test_matches_the_reference(case):
    """The interpreter's outputs start as NaN, so an entry that is not written fails."""
    tiles = Tiles() if case.mask.block_shape else SMALL
    agree(outcome(case, "triton", tiles), outcome(case, "reference"), case.dtype)


@st.composite
def calls(draw):
    """Draw a small call of any shape and mask."""
    T, S, K, G = draw(st.integers(1, 70)), draw(st.integers(1, 70)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    strided = draw(st.none() | st.builds(Strided, st.integers(1, 9), st.integers(1, 3), st.integers(1, 4)))
    mask = Mask(draw(st.booleans()), draw(st.none() | st.integers(1, 40)), strided)
    return Case(
        "drawn",
        B=draw(st.integers(1, 2)),
        T=T,
        S=S,
        N=K * G,
        K=K,
        H=draw(st.sampled_from((8, 16, 24))),
        V=16,
        mask=mask,
        offset=max(0, S - T) if draw(st.booleans()) else draw(st.integers(-20, 20)),
        prefix=draw(st.integers(0, S)),
        segments=draw(st.integers(0, min(3, S))),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from((None, 3.0))),
        alibi=draw(st.booleans()),
    )


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(calls(), st.sampled_from((Tiles(q=16, k=16, q_dkv=16, k_dkv=16, q_dq=16, k_dq=32), Tiles(k=16, q_dkv=16))))
def test_random_calls_match_the_reference(case, tiles):
    """The gradient of a logit is p * (dout @ v - delta). For a query that sees one key, the two terms cancel, and the
    result is the rounding error of dout @ v, a sum of V products of order one, so of size sqrt(V)."""
    agree(outcome(case, "triton", tiles), outcome(case, "reference"), case.dtype, terms=(case.V / case.H) ** 0.5)


def test_results_are_deterministic():
    case = Case("twice", T=70, S=70, N=4, K=2, H=32, V=32, dtype="bfloat16", dropout=0.3)
    qkv, kwargs = arrays(case)
    attend = partial(flash_attention, **kwargs, tiles=SMALL, implementation="triton", interpret=True)
    step = jax.jit(jax.value_and_grad(lambda qkv: attend(*qkv).astype(jnp.float32).sum()))
    for first, second in zip(jax.tree.leaves(step(qkv)), jax.tree.leaves(step(qkv)), strict=True):
        np.testing.assert_array_equal(first, second)


def test_nan_in_unseen_tiles_does_not_spread():
    """Neither NaN in keys and values of tiles that no query sees, nor NaN in queries that see no key."""
    case = Case("poison", T=96, S=128, H=16, V=16, mask=Mask(window=32), offset=0)
    (q, k, v), _ = arrays(case)
    k, v = k.at[:, 96:].set(jnp.nan), v.at[:, 96:].set(jnp.nan)
    tiles = Tiles(q=32, k=32, q_dkv=32, k_dkv=32, q_dq=32, k_dq=32)

    def both_ways(q, k, v, **kwargs):
        attend = lambda *qkv: flash_attention(*qkv, **kwargs, tiles=tiles, implementation="triton", interpret=True)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(jnp.ones_like(out))

    out, dq, dk, dv = jax.jit(partial(both_ways, mask=case.mask))(q, k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in (out, dq))
    assert not np.asarray(dk[:, 96:]).any() and not np.asarray(dv[:, 96:]).any()
    ids = (jnp.repeat(jnp.array([[1, 2, 3]]), 32, axis=1), jnp.repeat(jnp.array([[1, 3, 4, 1]]), 32, axis=1))
    (q, k, v), _ = arrays(case)
    q, k, v = q.at[:, 32:64].set(jnp.nan), k.at[:, 64:96].set(jnp.nan), v.at[:, 64:96].set(jnp.nan)
    out, *grads = jax.jit(partial(both_ways, mask=Mask(causal=False), segment_ids=ids))(q, k, v)
    assert not np.asarray(out[:, 32:64]).any()
    assert all(bool(jnp.isfinite(x).all()) for x in (out, *grads))


def test_gradients_from_halves_of_the_keys_match_the_whole():
    """Each half gets the whole rows' out and lse, as on the devices of a ring."""
    case = Case("ring", T=64, S=128, N=4, K=2, H=16, V=16, offset=64, softcap=4.0)
    (q, k, v), kwargs = arrays(case)
    dout = jnp.asarray(np.random.default_rng(3).normal(size=q.shape), jnp.float32)
    kwargs.pop("offset")

    def of_part(k, v, out, lse, offset, implementation):
        return flash_attention_backward(
            q, k, v, out, lse, dout, **kwargs, offset=offset, implementation=implementation,
            interpret=implementation == "triton", tiles=SMALL,
        )  # fmt: skip

    @jax.jit
    def both(k, v):
        out, lse = flash_attention(q, k, v, **kwargs, offset=64, implementation="reference", return_lse=True)
        part = lambda k, v, offset: of_part(k, v, out, lse, offset, "triton")
        # The offset is data, so that both halves share one program.
        dq, dk, dv = jax.lax.map(lambda x: part(*x), (halves(k), halves(v), jnp.array([64, 0])))
        whole = of_part(k, v, out, lse, 64, "reference")
        return (dq.sum(0), joined(dk), joined(dv)), whole

    halves = lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1)
    joined = lambda x: x.swapaxes(0, 1).reshape(k.shape)
    found, whole = both(k, v)
    for a, b in zip(found, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from((EMPTY, PARTIAL, FULL)), min_size=5, max_size=5), min_size=3, max_size=3))
def test_lists_contain_each_visible_tile_once(kinds):
    """Decoded like the kernel does: FULL tiles first, then PARTIAL ones, and no EMPTY ones."""
    kinds = np.array(kinds)[None, None]
    for made in (list_tiles(kinds, False), list_tiles(jnp.asarray(kinds), False)):
        for line, row in zip(np.asarray(made)[0, 0], kinds[0, 0], strict=True):
            full, partial = line[:2]
            assert list(line[2 : 2 + full]) == list(np.flatnonzero(row == FULL))
            assert list(line[2 + full : 2 + full + partial]) == list(np.flatnonzero(row == PARTIAL))


@settings(deadline=None)
@given(*[st.integers(0, 3)] * 5)
def test_ranges_contain_each_visible_tile_once(before, left, full, right, after):
    row = np.repeat([EMPTY, PARTIAL, FULL, PARTIAL, EMPTY], [before, left, full, right, 1 + after])
    row = np.pad(row, (0, 16 - len(row)))  # a fixed length, so that JAX compiles once
    for made in (list_tiles(row[None, None, None], True), list_tiles(jnp.asarray(row)[None, None, None], True)):
        full, partial, start, left = np.asarray(made)[0, 0, 0]
        assert [start + left + j for j in range(full)] == list(np.flatnonzero(row == FULL))
        assert [start + j + (0 if j < left else full) for j in range(partial)] == list(np.flatnonzero(row == PARTIAL))


@settings(deadline=None)
@given(
    st.booleans(), st.none() | st.integers(1, 90), st.integers(-90, 90), st.integers(1, 90), st.integers(1, 90),
    st.sampled_from((8, 16, 32)), st.sampled_from((8, 16, 32)), st.booleans(),
)  # fmt: skip
def test_causal_and_window_masks_have_ranges_of_tiles(causal, window, offset, T, S, tile_q, tile_k, transpose):
    """At any offset, a tile of queries or keys has one range of visible tiles, with the FULL ones in the middle."""
    kinds = tile_kinds(Mask(causal, window), MaskData(offset), T, S, tile_q, tile_k)[0, 0]
    kinds = kinds.T if transpose else kinds
    for line, row in zip(list_tiles(kinds[None, None], True)[0, 0], kinds, strict=True):
        full, partial_, start, left = line
        assert [start + left + j for j in range(full)] == list(np.flatnonzero(row == FULL))
        assert [start + j + (0 if j < left else full) for j in range(partial_)] == list(np.flatnonzero(row == PARTIAL))


@given(st.integers(1, 256), st.sampled_from((64, 256)))
def test_parts_cover_a_dimension(size, most):
    found = parts(size, most)
    assert [start for start, _ in found] == list(np.cumsum([0] + [n for _, n in found])[:-1])
    assert all(16 <= n <= most and n & (n - 1) == 0 for _, n in found)
    assert 0 <= sum(n for _, n in found) - size < 16


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"bias_BNTS": jnp.zeros((1, 2, 32, 32))}, "bias"),
        ({"tiles": Tiles(k_dq=48)}, "tiles.k_dq = 48"),
        ({"tiles": Tiles(q=8)}, "tiles.q = 8"),
        ({"mask": Mask(block_shape=(24, 16)), "blocks_BNIJ": jnp.ones((1, 1, 2, 2), bool)}, "block_shape"),
        (
            {"mask": Mask(block_shape=(32, 32)), "blocks_BNIJ": jnp.ones((1, 1, 1, 1), bool), "tiles": Tiles(k_dkv=64)},
            "k_dkv",
        ),
        ({"H": 320}, "at most 256"),
    ],
)
def test_calls_that_the_kernel_cannot_run_are_refused(change, wanted):
    q = jnp.zeros((1, 32, 2, change.get("H", 16)))
    kwargs = {name: x for name, x in change.items() if name != "H"}
    with pytest.raises(ValueError, match=wanted):
        flash_attention(q, q, q, **kwargs, implementation="triton", interpret=True)


LOWERED = [
    replace(case, name=f"{case.name}_{dtype}", dtype=dtype)
    for case, dtype in (
        (Case("causal", N=4, K=2, H=128, V=128), "bfloat16"),
        (Case("widest", H=256, V=256, T=200, S=300), "float32"),
        (
            Case(
                "everything",
                B=2,
                T=200,
                S=330,
                N=4,
                K=2,
                H=80,
                V=64,
                offset=(130, 7),
                segments=3,
                positions=True,
                prefix=20,
                mask=Mask(window=150, strided=Strided(16, 2, 4)),
                alibi=True,
                softcap=5.0,
                sinks=True,
                dropout=0.1,
            ),
            "float16",
        ),
    )
]


@pytest.mark.parametrize("case", LOWERED, ids=lambda case: case.name)
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
def test_lowers_for_cuda(case):
    """Forward and backward lower to three Triton programs for a GPU that this machine lacks."""
    (q, k, v), kwargs = arrays(case)
    attend = lambda q, k, v: flash_attention(q, k, v, **kwargs, implementation="triton").astype(jnp.float32).sum()
    step = jax.jit(jax.value_and_grad(attend, argnums=(0, 1, 2)))
    here = nullcontext()
    if hasattr(jax.sharding, "AbstractDevice") and not jax.__version__.startswith("0.10."):
        device = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
        here = jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))
    with here:
        text = step.trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @__gpu$xla.gpu.triton") == 3
    assert {name for name in ("forward", "dkv", "dq") if f"flash_attention_{name}" in text} == {"forward", "dkv", "dq"}
