"""Flash attention's API, masks and the implementations that run on any device, against the formula in float64."""

from dataclasses import replace
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import (
    EMPTY,
    FULL,
    MASKED,
    Mask,
    Strided,
    Tiles,
    best_implementation,
    flash_attention,
    flash_attention_backward,
    tile_kinds,
)
from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.mask import MaskData
from pallas_kernels.flash_attention.shapes import CASES, Case
from pallas_kernels.flash_attention.triton_kernels import UNSEEN

TINY = [replace(c, T=min(c.T, 96), S=min(c.S, 96 if c.T == c.S else 150)) for c in CASES if c.name != "chunked_prefill"]
TINY = [replace(c, mask=replace(c.mask, block_shape=(32, 32))) if c.blocks else c for c in TINY]
TINY += [
    Case("chunked_prefill", T=30, S=100, offset=70),
    Case("sees_nothing_within_a_tile", T=64, S=64, offset=-40),
    Case("padded_tiles", T=50, S=70, mask=Mask(causal=False)),
]
TILES = Tiles(q=32, k=32)
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2, "float16": 2e-3}  # relative to the largest entry


def visible_pairs(case, kwargs):
    """Return the visible pairs, bool [B, N, T, S], by the mask's definition, one query at a time."""
    mask = case.mask
    seen = np.zeros((case.B, case.N, case.T, case.S), bool)
    offset = np.broadcast_to(np.asarray(case.offset), (case.B,))
    keys = np.arange(case.S)
    for b in range(case.B):
        for t in range(case.T):
            slot = t + offset[b]
            row = np.ones(case.S, bool)
            if mask.causal:
                row &= keys <= slot
            if mask.window is not None:
                row &= (slot - keys < mask.window) & (keys - slot < mask.window)
            if mask.strided is not None:
                s = mask.strided
                q_position, k_positions = (
                    (slot, keys)
                    if "positions" not in kwargs
                    else (p[b][i] for p, i in zip(kwargs["positions"], (t, keys), strict=True))
                )
                row &= (abs(q_position // s.size - k_positions // s.size) < s.local) | (
                    k_positions // s.size % s.stride == s.stride - 1
                )
            if "prefix_BS" in kwargs:
                row |= kwargs["prefix_BS"][b]
            if "segment_ids" in kwargs:
                row &= kwargs["segment_ids"][0][b, t] == kwargs["segment_ids"][1][b]
            seen[b, :, t] = row
            if "blocks_BNIJ" in kwargs:
                blocks = np.broadcast_to(kwargs["blocks_BNIJ"], (case.B, case.N, *kwargs["blocks_BNIJ"].shape[2:]))
                seen[b, :, t] &= blocks[b, :, t // mask.block_shape[0]][:, keys // mask.block_shape[1]]
    return seen


def formula(case, kwargs, q, k, v, bias, sinks):
    """Return the output, log-sum-exp and blind queries of float64 arrays by the formula; a sink is one more key, whose
    value is zero."""
    group = case.N // case.K
    logits = case.H**-0.5 * jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, group, axis=2))
    if case.softcap:
        logits = case.softcap * jnp.tanh(logits / case.softcap)
    if bias is not None:
        logits += bias
    if case.alibi:
        slots = np.arange(case.T)[:, None] + np.broadcast_to(np.asarray(case.offset), (case.B,))[:, None, None, None]
        logits -= kwargs["alibi_N"].astype(np.float64)[:, None, None] * abs(slots - np.arange(case.S))
    seen = visible_pairs(case, kwargs)
    logits = jnp.where(seen, logits, -jnp.inf)
    if sinks is not None:
        logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:3], 1))], axis=-1)
    blind = ~(seen.any(-1) | (sinks is not None))
    logits = jnp.where(blind[..., None], 0.0, logits)  # removes infinities, whose gradients would be NaN
    weights = jnp.where(blind[..., None], 0.0, jax.nn.softmax(logits))
    weights = weights[..., : case.S]
    if case.dropout:
        index = np.ix_(*(np.arange(n, dtype=np.int32) for n in (case.B, case.N, case.T, case.S)))
        weights = jnp.where(keep(jnp.int32(kwargs["seed"]), *index, case.dropout), weights / (1 - case.dropout), 0.0)
    out = jnp.einsum("bnts,bsnv->btnv", weights, jnp.repeat(v, group, axis=2))
    return out, jnp.where(blind, np.float32(MASKED), jax.nn.logsumexp(logits, axis=-1)), blind


def expected(case):
    """Return [out, lse, gradients of q, k, v, bias and sinks] in float64, the blind queries, and the cotangents."""
    arrays, kwargs = case.arguments()
    r = np.random.default_rng(1)
    dout, dlse = r.normal(size=(case.B, case.T, case.N, case.V)), r.normal(size=(case.B, case.N, case.T))
    with jax.enable_x64(True):
        # Implementations get rounded inputs, so the formula gets the same.
        wide = [jnp.asarray(jnp.asarray(x, case.dtype), jnp.float64) for x in arrays]
        wide += [
            None if (x := kwargs.get(name)) is None else jnp.asarray(x, jnp.float64)
            for name in ("bias_BNTS", "sinks_N")
        ]

        def loss(*arrays):
            out, lse, blind = formula(case, kwargs, *arrays)
            return (out * dout).sum() + jnp.where(blind, 0.0, lse * dlse).sum(), (out, lse, blind)

        gradients, (out, lse, blind) = jax.jit(jax.grad(loss, range(5), has_aux=True))(*wide)
    return [None if x is None else np.asarray(x) for x in (out, lse, *gradients)], np.asarray(blind), (dout, dlse)


def actual(case, cotangents, blind, implementation, tiles):
    arrays, kwargs = case.arguments()
    as_jax = lambda x: jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, x)
    kwargs = {name: as_jax(x) for name, x in kwargs.items()}
    bias, sinks = kwargs.pop("bias_BNTS", None), kwargs.pop("sinks_N", None)
    dout, dlse = (jnp.asarray(x, jnp.float32) for x in cotangents)

    def loss(q, k, v, bias, sinks):
        out, lse = flash_attention(
            q,
            k,
            v,
            bias_BNTS=bias,
            sinks_N=sinks,
            **kwargs,
            implementation=implementation,
            tiles=tiles,
            return_lse=True,
        )
        return (out.astype(jnp.float32) * dout).sum() + jnp.where(blind, 0.0, lse * dlse).sum(), (out, lse)

    q, k, v = (jnp.asarray(x, case.dtype) for x in arrays)
    gradients, (out, lse) = jax.jit(jax.grad(loss, range(5), has_aux=True))(q, k, v, bias, sinks)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    return [None if x is None else np.asarray(x, np.float64) for x in (out, lse, *gradients)]


# Head dimensions, which these two implementations leave to XLA, and combinations of features that other cases cover.
SLOW = (
    "head_dim_80",
    "head_dim_96",
    "head_dim_128",
    "head_dim_256",
    "multi_query",
    "all_together_bfloat16",
    "window_head_dim_48",
)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c.name in SLOW else ()) for c in TINY], ids=lambda c: c.name
)
def test_output_and_gradients_match_the_formula_in_float64(case):
    exact, blind, cotangents = expected(case)
    for implementation in ("reference", "xla"):
        found = actual(case, cotangents, blind, implementation, TILES)
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv", "dbias", "dsinks"), found, exact, strict=True):
            name = f"{implementation}: {name}"
            assert (x is None) == (y is None), name
            if y is None:
                continue
            assert np.isfinite(x).all(), name
            np.testing.assert_allclose(
                x,
                y,
                rtol=0,
                atol=TOLERANCE[case.dtype] * max(abs(y[y > MASKED / 2]).max(initial=0), 1e-3),
                err_msg=name,
            )


masks = st.builds(
    Mask,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    strided=st.none() | st.builds(Strided, st.integers(1, 9), st.integers(1, 3), st.integers(1, 4)),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    mask=masks,
    T=st.integers(1, 60),
    S=st.integers(1, 60),
    offset=st.integers(-20, 60),
    segments=st.integers(0, 4),
    prefix=st.integers(0, 20),
    tile_q=st.sampled_from([8, 16, 24]),
    tile_k=st.sampled_from([8, 16, 24]),
    seed=st.integers(0, 99),
)
def test_empty_tiles_have_no_visible_pair_and_full_tiles_only_visible_ones(
    mask, T, S, offset, segments, prefix, tile_q, tile_k, seed
):
    segments = segments if segments < min(T, S) else 0
    case = Case(
        "", T=T, S=S, N=1, K=1, mask=mask, offset=offset, segments=segments, positions=bool(segments), prefix=prefix
    )
    _, kwargs = case.arguments(seed)
    ids, positions = kwargs.get("segment_ids", (None, None)), kwargs.get("positions", (None, None))
    data = MaskData(offset, *ids, *positions, kwargs.get("prefix_BS"))
    # Under jit, since without it each operation compiles separately.
    kinds = np.asarray(jax.jit(lambda: tile_kinds(mask, data, T, S, tile_q, tile_k))())
    if not segments and not prefix:
        assert isinstance(tile_kinds(mask, MaskData(offset), T, S, tile_q, tile_k), np.ndarray)
    padded = np.zeros((-(-T // tile_q) * tile_q, -(-S // tile_k) * tile_k), bool)
    padded[:T, :S] = visible_pairs(case, kwargs)[0, 0]
    for i, j in np.ndindex(*kinds.shape[2:]):
        rows = slice(i * tile_q, min((i + 1) * tile_q, T))
        tile = padded[rows, j * tile_k : (j + 1) * tile_k]
        assert kinds[0, 0, i, j] != EMPTY or not tile.any()
        assert kinds[0, 0, i, j] != FULL or tile.all()


def test_tile_kinds_of_a_static_window_are_exact():
    kinds = tile_kinds(Mask(window=64), MaskData(0), 256, 256, 32, 32)[0, 0]
    i, j = np.indices(kinds.shape)
    np.testing.assert_array_equal(kinds != EMPTY, (j <= i) & (i - j <= 2))
    np.testing.assert_array_equal(kinds == FULL, (j < i) & (i - j < 2))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_from_parts_of_the_keys_sum_to_the_whole(implementation):
    """Ring attention relies on this. Each part gets the whole row's out and lse."""
    r = np.random.default_rng(0)
    q, k, v, dout = (jnp.asarray(r.normal(size=(1, 64, n, 16)), jnp.float32) for n in (4, 2, 2, 4))
    (out, lse), pull = jax.vjp(lambda *x: flash_attention(*x, implementation=implementation, return_lse=True), q, k, v)
    whole = pull((dout, jnp.zeros_like(lse)))
    half = lambda x, i: x[:, 32 * i : 32 * i + 32]
    parts = [
        flash_attention_backward(
            q, half(k, i), half(v, i), out, lse, dout, offset=jnp.int32(-32 * i), implementation=implementation
        )
        for i in (0, 1)
    ]
    for x, y in zip(
        (parts[0][0] + parts[1][0], *(jnp.concatenate(p, 1) for p in list(zip(*parts, strict=True))[1:])),
        whole,
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=3e-6)


def test_memory_grows_linearly_with_length():
    def temporaries(T, implementation):
        x = jax.ShapeDtypeStruct((1, T, 2, 32), jnp.float32)
        loss = lambda q, k, v: flash_attention(q, k, v, implementation=implementation).sum()
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8192, "xla") < 2.2 * temporaries(4096, "xla")
    assert temporaries(8192, "xla") < temporaries(8192, "reference") / 50


def test_dropout_keeps_the_right_fraction_and_depends_only_on_its_counters():
    index = [
        jnp.arange(n, dtype=jnp.int32).reshape(s)
        for n, s in ((4, (4, 1, 1, 1)), (4, (4, 1, 1)), (128, (128, 1)), (128, (1, 128)))
    ]
    kept = np.asarray(keep(jnp.int32(3), *index, 0.3))
    assert abs(kept.mean() - 0.7) < 4 * (0.21 / kept.size) ** 0.5
    for axis in range(4):  # no row, head, query or key is a copy of its neighbour
        a, b = np.moveaxis(kept, axis, 0)[:2]
        assert abs((a == b).mean() - 0.58) < 5 * (0.25 / a.size) ** 0.5
    assert abs((kept == np.asarray(keep(jnp.int32(4), *index, 0.3))).mean() - 0.58) < 0.01
    part = keep(jnp.int32(3), index[0][2:3], index[1][1:2], index[2][40:60], index[3][:, 7:9], 0.3)
    np.testing.assert_array_equal(part, kept[2:3, 1:2, 40:60, 7:9])


X = jnp.zeros((2, 16, 4, 8))
KV = jnp.zeros((2, 16, 2, 8))


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k_BSKH": KV[..., :4]}, "must be .B, T, N, H."),
        ({"k_BSKH": KV.astype(jnp.bfloat16)}, "must share one of"),
        ({"k_BSKH": jnp.zeros((2, 16, 3, 8)), "v_BSKV": jnp.zeros((2, 16, 3, 8))}, "3 heads: must divide the 4"),
        ({"v_BSKV": jnp.zeros((2, 0, 2, 8)), "k_BSKH": jnp.zeros((2, 0, 2, 8))}, "no dimension may be empty"),
        ({"mask": Mask(window=0)}, "mask.window = 0"),
        ({"mask": Mask(strided=Strided(0, 1, 1))}, "mask.strided"),
        ({"mask": Mask(block_shape=(8, 8))}, "blocks_BNIJ and mask.block_shape"),
        (
            {"mask": Mask(block_shape=(8, 8)), "blocks_BNIJ": jnp.ones((2, 4, 2, 3), bool)},
            r"must be \(1 or 2, 1 or 4, 2, 2\)",
        ),
        ({"softcap": 0.0}, "softcap = 0.0"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"dropout": 0.5}, "needs seed"),
        ({"segment_ids": jnp.ones((2, 8), jnp.int32)}, "segment_ids of shapes"),
        ({"offset": jnp.zeros(3, jnp.int32)}, "offset of shape"),
        ({"offset": 1.0}, "dtype float32: must be an int"),
        ({"segment_ids": jnp.ones((2, 16))}, "must be integers"),
        ({"dropout": 0.5, "seed": jnp.zeros(2, jnp.int32)}, "needs seed, an int32 scalar"),
        ({"interpret": True}, "name the kernel to interpret"),
        ({"sinks_N": jnp.zeros(3)}, "sinks_N of shape"),
        ({"tiles": Tiles(q=12)}, "tiles.q = 12"),
        ({"implementation": "cuda"}, "unknown; use one of tpu"),
    ],
)
def test_refusals_name_the_argument_and_the_fix(change, words):
    with pytest.raises(ValueError, match=words):
        flash_attention(**{"q_BTNH": X, "k_BSKH": KV, "v_BSKV": KV, **change})


@pytest.mark.unchecked
def test_backward_refuses_block_masks_and_a_transposed_lse():
    lse = jnp.zeros((2, 4, 16))
    with pytest.raises(ValueError, match="strided and block_shape need whole rows"):
        flash_attention_backward(X, KV, KV, X, lse, X, mask=Mask(block_shape=(8, 8)))
    with pytest.raises(ValueError, match=r"lse_BNT of shape \(2, 16, 4\)"):
        flash_attention_backward(X, KV, KV, X, lse.transpose(0, 2, 1), X)


@pytest.mark.parametrize("head_dim", range(8, 257, 8))
def test_weights_of_unseen_keys_vanish_without_rounding_of_the_product(head_dim):
    """GPUs may fuse (UNSEEN / unit) * unit - top into one operation. Even then the difference is far below exp2's
    range."""
    unit = np.float32(head_dim**-0.5 * 1.4426950408889634)
    exact = Fraction(float(np.float32(UNSEEN) / unit)) * Fraction(float(unit))
    assert exact - Fraction(float(np.float32(MASKED))) < -1000


def test_triton_is_the_default_only_on_supported_gpus():
    assert best_implementation("gpu", "NVIDIA H100 80GB HBM3") == ("triton", "xla")
    assert (
        best_implementation("gpu", "Tesla V100-SXM2-16GB")
        == best_implementation("gpu", "AMD Instinct MI300X")
        == ("xla",)
    )
    assert best_implementation("tpu", "TPU v5 lite") == ("tpu", "xla") and best_implementation("cpu", "cpu") == ("xla",)


def test_a_named_kernel_for_another_device_is_refused():
    with pytest.raises(ValueError, match=r"interpret"):
        jax.jit(lambda q, k: flash_attention(q, k, k, implementation="tpu"))(X, KV).block_until_ready()
