"""The TPU kernels of flash attention: interpreted against the reference, checked for races, and compiled for every
generation."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import ahead_of_time
from pallas_kernels.flash_attention import Mask, Strided, Tiles, flash_attention, tpu, tpu_pairs, tpu_tiles
from pallas_kernels.flash_attention.mask import EMPTY, MASKED, MaskData, tile_kinds
from pallas_kernels.flash_attention.shapes import CASES, Case
from pallas_kernels.flash_attention.spec import Extra, Spec

SMALL = Tiles(q=128, k=128, q_dkv=128, k_dkv=128)
# Largest error relative to the largest entry, of (out and lse, gradients). bfloat16 has a relative rounding error of
# 2^-9, which applies to results, to weights before they multiply values, and to the factors of gradients.
BOUNDS = {"float32": (2e-5, 2e-5), "float16": (1e-3, 2e-3), "bfloat16": (8e-3, 2e-2)}
FAST = ("causal", "strided_packed", "multi_query", "head_dim_80", "all_together_bfloat16")
RUNNABLE = [case for case in CASES if not case.bias]


def outputs(case: Case, implementation: str, dtype: str, tiles=SMALL, interpret=True):
    """Return out, lse and the gradients of q, k, v (and sinks) for random cotangents of out and lse."""
    (q, k, v), kwargs = case.arguments()
    # Inputs are rounded to the case's dtype, so that the reference gets the kernel's inputs.
    q, k, v = (jnp.asarray(x, case.dtype).astype(dtype) for x in (q, k, v))
    kwargs = {
        name: jax.tree.map(jnp.asarray, x) if isinstance(x, np.ndarray | tuple) else x for name, x in kwargs.items()
    }
    sinks = kwargs.pop("sinks_N", None)
    if case.dropout:
        kwargs["seed"] = jnp.asarray(kwargs["seed"])
    r = np.random.default_rng(1)
    dout = r.normal(size=(*q.shape[:3], v.shape[3])).astype(np.float32)
    dlse = r.normal(size=(q.shape[0], q.shape[2], q.shape[1])).astype(np.float32)

    @jax.jit
    def run(q, k, v, sinks, dout, dlse):
        call = functools.partial(
            flash_attention, implementation=implementation, interpret=interpret, return_lse=True, tiles=tiles, **kwargs
        )
        (out, lse), pull = jax.vjp(lambda q, k, v, sinks: call(q, k, v, sinks_N=sinks), q, k, v, sinks)
        return out, lse, *[g for g in pull((dout.astype(out.dtype), dlse.astype(lse.dtype))) if g is not None]

    return [np.asarray(x.astype(jnp.float32)) for x in run(q, k, v, sinks, jnp.asarray(dout, case.dtype), dlse)]


def assert_equal_to_reference(case: Case, tiles=SMALL, interpret=True):
    got, want = outputs(case, "tpu", case.dtype, tiles, interpret), outputs(case, "reference", "float32")
    bound, gradient_bound = BOUNDS[case.dtype]
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, want, strict=False):
        blind = b <= MASKED / 2
        np.testing.assert_array_equal(a[blind], b[blind], err_msg=name)
        scale = np.abs(b[~blind]).max() if (~blind).any() else 0.0
        error = np.abs(a - b)[~blind].max() if (~blind).any() else 0.0
        assert error <= (bound if name in ("out", "lse") else gradient_bound) * scale, f"{name}: {error} of {scale}"


@pytest.mark.parametrize("name", FAST)
def test_forward_and_gradients_match_the_reference(name):
    assert_equal_to_reference(next(case for case in CASES if case.name == name))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in RUNNABLE if c.name not in FAST], ids=lambda case: case.name)
def test_every_feature_matches_the_reference(case):
    assert_equal_to_reference(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, tiles",
    [
        (Case("pieces", T=600, S=600, H=128, V=128), Tiles(256, 512, 512, 256)),
        (Case("wide_values", T=300, S=300, H=64, V=256, dtype="bfloat16"), Tiles(256, 256, 256, 128)),
        (Case("edges_moved", T=384, S=640, offset=200, mask=Mask(window=300)), Tiles(128, 256, 256, 128)),
        (Case("default_tiles", T=1100, S=1100, N=1, K=1, mask=Mask(window=500), dropout=0.2), Tiles()),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else "",
)
def test_tiles_of_several_pieces_match_the_reference(case, tiles):
    assert_equal_to_reference(case, tiles)


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 200), S=st.integers(1, 200), causal=st.booleans(), window=st.none() | st.integers(1, 200),
    offset=st.integers(-150, 150), groups=st.sampled_from([(1, 1), (2, 1)]), segments=st.integers(0, 2),
)  # fmt: skip
@pytest.mark.slow
def test_random_lengths_and_masks_match_the_reference(T, S, causal, window, offset, groups, segments):
    N, K = groups
    segments = min(segments, S)
    case = Case("drawn", T=T, S=S, N=N, K=K, mask=Mask(causal, window), offset=offset, segments=segments)
    assert_equal_to_reference(case)


@pytest.mark.slow
def test_rows_run_one_by_one_if_their_lists_are_too_long(monkeypatch):
    case = Case("long_list", B=2, T=256, S=256, N=1, K=1, segments=2, dropout=0.3)
    together = outputs(case, "tpu", "float32")
    monkeypatch.setattr(tpu, "MAX_WORDS", 5)  # one row's list is three entries, two rows' six
    for a, b in zip(together, outputs(case, "tpu", "float32"), strict=True):
        np.testing.assert_array_equal(a, b)


def strict_interpreter():
    """Return an interpreter that exposes missing writes and waits: memory starts as NaN, and a transfer only happens
    at its wait."""
    return pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", dma_execution_mode="on_wait")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        # Grouped heads, tiles of dq that are visited twice in a row, and tiles of both sides without visible pairs.
        Case("grouped", T=300, S=300, N=2, K=1, H=128, V=128),
        Case("window", T=512, S=512, N=1, K=1, H=128, V=128, mask=Mask(window=100)),
        Case("sees_nothing", T=384, S=384, N=1, K=1, H=128, V=128, offset=-200),
        Case("segments", B=2, T=256, S=256, N=1, K=1, H=128, V=128, segments=3),
    ],
    ids=lambda case: case.name,
)
def test_no_races_and_no_unwritten_results_in_the_tpu_interpreter(case):
    assert_equal_to_reference(case, interpret=strict_interpreter())
    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
    except ImportError:
        return
    races = getattr(interpreter, "races", None)  # jax 0.10 records races, 0.12 raises
    assert races is None or not races.races_found


def test_results_are_deterministic():
    case = Case("again", T=140, S=140, N=1, K=1)
    for a, b in zip(outputs(case, "tpu", "float32"), outputs(case, "tpu", "float32"), strict=True):
        np.testing.assert_array_equal(a, b)


MASKS = [
    (Mask(), 0), (Mask(), 200), (Mask(), -300), (Mask(window=300), 0), (Mask(causal=False), 0),
    (Mask(causal=False, window=130), 64), (Mask(strided=Strided(16, 2, 8)), 0),
]  # fmt: skip


@pytest.mark.parametrize("mask, offset", MASKS)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_lists_contain_each_visible_tile_once_and_every_result(mask, offset, backward, known):
    T, S, tile_q, tile_k = 1000, 900, 128, 256
    kinds = np.asarray(tile_kinds(mask, MaskData(offset), T, S, tile_q, tile_k))[0, 0]
    data = MaskData(offset if known else jnp.full((2,), offset))
    made = tpu_pairs.pairs(mask, data, T, S, tile_q, tile_k, backward=backward)
    assert isinstance(made.words_RCP, np.ndarray) == known
    for words in np.asarray(made.words_RCP)[:, 0]:
        entries = [(int(tpu_pairs.q_tile(w)), int(tpu_pairs.k_tile(w))) for w in words]
        work = [e for e, w in zip(entries, words, strict=True) if tpu_pairs.kind(w) != EMPTY]
        assert len(set(work)) == len(work) and set(work) == set(zip(*np.nonzero(kinds), strict=True))
        majors = [e[backward] for e in entries]
        assert majors == sorted(majors) and set(majors) == set(range(kinds.shape[backward]))
        for index, name in ((0, "first"), (1, "last")):
            flagged = [m for m, w in zip(majors, words, strict=True) if tpu_pairs.flag(w, index)]
            assert flagged == sorted(set(majors)), name
        if known:  # only visible tiles, and one entry for each result without any
            assert len(words) == (kinds > EMPTY).sum() + (~(kinds > EMPTY).any(0 if backward else 1)).sum()
        else:  # surplus entries repeat the last tiles, so they move no data
            count = len(work) + (~(kinds > EMPTY).any(0 if backward else 1)).sum()
            assert set(entries[count - 1 :]) == {entries[count - 1]}


def test_the_list_of_a_window_is_linear_in_length():
    count = lambda T: tpu_pairs.pairs(Mask(window=1024), MaskData(), T, T, 1024, 1024).words_RCP.size
    assert (count(32768), count(131072)) == (63, 255)


@pytest.mark.parametrize(
    "mask, shift", [(Mask(), 0), (Mask(), -100), (Mask(window=512), 512), (Mask(causal=False, window=64), 30)]
)
def test_pieces_of_edge_tiles_cover_all_visible_pairs(mask, shift):
    inside = np.zeros((512, 512), bool)
    for q0, q1, k0, k1 in tpu_pairs.steps(mask, shift, 512, 512, 512, 512, 128):
        assert not inside[q0:q1, k0:k1].any() and all(x % 128 == 0 for x in (q0, q1, k0, k1))
        inside[q0:q1, k0:k1] = True
    gap = np.arange(512)[:, None] + shift - np.arange(512)[None, :]
    seen = (
        (gap >= 0 if mask.causal else True)
        & (gap < (mask.window or 10**6))
        & ((mask.causal) | (-gap < (mask.window or 10**6)))
    )
    assert inside[seen].all() and not inside.all()


def arguments(T, N, K, H, V, dtype="bfloat16"):
    shape = lambda length, heads, size: jax.ShapeDtypeStruct((1, length, heads, size), jnp.dtype(dtype))
    return shape(T, N, H), shape(T, K, H), shape(T, K, V)


def gradients(q, k, v, **kwargs):
    out, pull = jax.vjp(lambda q, k, v: flash_attention(q, k, v, implementation="tpu", **kwargs), q, k, v)
    return out, pull(out)


@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "7x"])
def test_compiles_forward_and_backward(target):
    pytest.importorskip("libtpu")
    small = functools.partial(gradients, tiles=Tiles(256, 256, 256, 256))
    ahead_of_time.compile_for(target, small, *arguments(512, 2, 1, 128, 128))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "7x"])
def test_compiles_with_default_tiles(target):
    pytest.importorskip("libtpu")
    ahead_of_time.compile_for(target, gradients, *arguments(2048, 1, 1, 128, 128))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "7x"])
@pytest.mark.parametrize("H, V", [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_head_dim_fits_in_the_estimated_memory(target, H, V, dtype):
    """The estimate of tpu_tiles is the limit passed to the compiler, which refuses a kernel that needs more."""
    pytest.importorskip("libtpu")
    ahead_of_time.compile_for(target, gradients, *arguments(2048, 2, 1, H, V, dtype))


def segmented(q, k, v, segments, sinks, seed):
    """Use every feature that the kernels support, apart from shapes."""
    return gradients(
        q, k, v, segment_ids=segments, positions=segments, prefix_BS=segments > 1, sinks_N=sinks, softcap=30.0,
        alibi_N=sinks, dropout=0.1, seed=seed, mask=Mask(window=700, strided=Strided(64, 4, 8)),
    )  # fmt: skip


def blocked(q, k, v, blocks, offset):
    return gradients(q, k, v, mask=Mask(block_shape=(256, 256)), blocks_BNIJ=blocks, offset=offset)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v4", "v5e", "v5p", "v6e", "7x"])
def test_every_feature_compiles(target):
    pytest.importorskip("libtpu")
    q, k, v = arguments(1500, 2, 1, 128, 128)
    ints = jax.ShapeDtypeStruct((1, 1500), jnp.int32)
    sinks, seed = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    ahead_of_time.compile_for(target, segmented, q, k, v, ints, sinks, seed)
    blocks, offset = jax.ShapeDtypeStruct((1, 2, 6, 6), jnp.bool_), jax.ShapeDtypeStruct((1,), jnp.int32)
    ahead_of_time.compile_for(target, blocked, q, k, v, blocks, offset)


DEFAULT_TILES, CAUSAL = Tiles(), Mask()


def reason(tiles=DEFAULT_TILES, mask=CAUSAL, dtype="bfloat16", T=4096, H=128, interpret=True, **extra):
    q, k, v = arguments(T, 4, 2, H, H, dtype)
    return tpu.unsupported(Spec(mask, 0.1, tiles=tiles, interpret=interpret), q, k, v, Extra(**extra))


def test_refusals_give_the_reason():
    assert reason() is None
    assert "needs a TPU" in reason(interpret=False)
    assert "xla" in reason(bias_BNTS=jnp.zeros((1, 1, 8, 8)))
    assert "float32" in reason(dtype="float64")
    assert "tiles.q = 136" in reason(Tiles(q=136))
    assert "block_shape of 64 queries" in reason(
        mask=Mask(block_shape=(64, 128)), data=MaskData(blocks_BNIJ=jnp.ones((1, 1, 64, 32), bool))
    )
    assert "must divide" in reason(
        Tiles(k=256), Mask(block_shape=(128, 128)), data=MaskData(blocks_BNIJ=jnp.ones((1, 1, 32, 32), bool))
    )
    too_large = reason(Tiles(q=16384, k=16384), T=16384)
    assert "tiles.q = 16384" in too_large and "MiB of VMEM" in too_large
    assert "larger tiles" in reason(Tiles(128, 128), T=1 << 19)


def test_vmem_grows_with_the_head_dim_and_tiles_shrink_to_the_device(monkeypatch):
    spec = Spec(Mask(), 1.0)
    cuts = [tpu_tiles.forward_cut(spec, 8192, 8192, H, H, 2, 0, 0) for H in (64, 128, 256, 512)]
    assert all(a.vmem <= b.vmem for a, b in itertools.pairwise(cuts))
    monkeypatch.setattr(tpu_tiles, "generation", lambda: tpu_tiles.GENERATIONS["TPU v4"])
    for make in (tpu_tiles.forward_cut, tpu_tiles.backward_cut):
        cut = make(spec, 8192, 8192, 256, 256, 4, 2, 3)
        assert cut.vmem <= 15 << 20 and cut.q % 128 == cut.k % 128 == 0
