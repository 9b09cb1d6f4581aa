"""Decode attention against the formula in float64, on caches that hold NaN wherever no query looks."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention import MASKED, decode_attention, tpu
from pallas_kernels.decode_attention import merge as merge_parts
from pallas_kernels.decode_attention.shapes import CASES, NOWHERE, Case
from pallas_kernels.decode_attention.spec import Cache, Spec, block_range, first_slot

# float32: rounding of sums of 300 terms. 16 bits: rounding of the result and of the weights, 2**-9 and 2**-11.
TOLERANCE = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1.5e-3}
KERNELS = ("tpu", "gpu")
BY_NAME = {case.name: case for case in CASES}

# A kernel takes seconds per case in interpret mode. These cases and the tests below cover every feature once.
QUICK = {
    "tpu": ("slots_innermost", "odd_slots", "int8_pages_of_32_bfloat16"),
    "gpu": ("one_query", "head_dim_80_value_96", "pages_of_128_bfloat16", "float8_e5m2", "all_together"),
    "reference": tuple(BY_NAME),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 128 slots, so that a row has several and its parts begin inside it."""
    monkeypatch.setattr(tpu, "BLOCK_BYTES", 1)


def by_case(*implementations: str) -> list:
    """Return every case with every implementation; those not in QUICK are marked slow."""
    return [
        pytest.param(name, case, id=f"{name}-{case.name}", marks=() if case.name in QUICK[name] else pytest.mark.slow)
        for name in implementations
        for case in CASES
    ]


@lru_cache
def compiled(implementation: str, interpret, **choices):
    return jax.jit(
        lambda arrays: decode_attention(
            **arrays, **choices, implementation=implementation, interpret=interpret, return_lse=True
        )
    )


def run(case: Case, implementation: str, seed: int = 0, interpret=True, **others):
    """Return (out, lse) of a case."""
    if implementation == "reference":
        others["splits"], interpret = None, False
    call = compiled(implementation, interpret, **(case.choices() | others))
    return jax.tree.map(np.asarray, call(case.arguments(seed)))


def formula(case: Case, seed: int = 0):
    """Return (out, lse) in float64, computed for one query and one head at a time."""
    a = {name: np.asarray(x) for name, x in case.arguments(seed).items()}
    wide = lambda x: x.astype(np.float64)
    G = case.N // case.K
    out = np.zeros((case.B, case.T, case.N, case.V))
    lse = np.full((case.B, case.N, case.T), MASKED)
    for b, length in enumerate(case.lengths):
        for t in range(case.T):
            slot = length - case.T + t
            start = 0 if case.window is None else max(slot - case.window + 1, 0)
            if slot < 0:
                continue
            slots = np.arange(start, slot + 1)
            if case.page:
                at = a["page_table_BP"][b, slots // case.page]
                assert NOWHERE not in at
                take = lambda x, head: x[at, head, slots % case.page]  # noqa: B023
            else:
                take = lambda x, head: x[b, head, slots]  # noqa: B023
            for n in range(case.N):
                k, v = (wide(take(a[f"{name}_cache"], n // G)) for name in "kv")
                if "k_scales" in a:
                    k, v = (x * wide(take(a[f"{s}_scales"], n // G))[:, None] for x, s in ((k, "k"), (v, "v")))
                logits = k @ wide(a["q_BTNH"][b, t, n]) * case.H**-0.5
                if case.softcap is not None:
                    logits = case.softcap * np.tanh(logits / case.softcap)
                if case.alibi:
                    logits = logits - wide(a["alibi_N"])[n] * (slot - slots)
                everything = np.append(logits, a["sinks_N"][n]) if case.sinks else logits
                top = everything.max()
                lse[b, n, t] = top + np.log(np.exp(everything - top).sum())
                out[b, t, n] = np.exp(logits - lse[b, n, t]) @ v
    return out, lse


def check(case: Case, implementation: str, seed: int = 0, **others) -> None:
    out, lse = run(case, implementation, seed, **others)
    expected, expected_lse = formula(case, seed)
    assert out.dtype == case.dtype and lse.dtype == np.float32
    np.testing.assert_allclose(
        out.astype(np.float64), expected, atol=TOLERANCE[case.dtype] * 3, rtol=TOLERANCE[case.dtype]
    )
    blind = expected_lse == MASKED
    np.testing.assert_array_equal(lse[blind], np.float32(MASKED))
    logit_error = 2e-6 if np.dtype(case.dtype) == np.float32 else 1e-5  # logits are float32 sums of exact products
    np.testing.assert_allclose(lse[~blind], expected_lse[~blind], atol=logit_error, rtol=logit_error)


@pytest.mark.parametrize(("implementation", "case"), by_case("reference", *KERNELS))
def test_matches_the_formula(implementation, case):
    check(case, implementation)


@pytest.mark.parametrize("implementation", KERNELS)
def test_pages_give_the_same_bits_as_a_contiguous_cache(implementation):
    paged = BY_NAME["pages_of_16"]
    for ours, theirs in zip(run(paged, implementation), run(replace(paged, page=None), implementation), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("implementation", KERNELS)
def test_splits_match_a_single_part_and_are_deterministic(implementation):
    case = BY_NAME["head_dim_128_splits"]
    one, four = (run(case, implementation, splits=splits) for splits in (1, 4))
    np.testing.assert_allclose(one[0], four[0], atol=1e-6)
    np.testing.assert_allclose(one[1], four[1], rtol=1e-6)
    again = run(case, implementation, splits=4)
    assert all((ours == theirs).all() for ours, theirs in zip(four, again, strict=True))


def test_heads_that_exceed_vmem_together_run_in_groups(monkeypatch):
    case = Case("groups", N=4, K=4, H=128, V=128, S=384, lengths=(0, 384, 100))
    monkeypatch.setattr(tpu, "VMEM_BUDGET", 1 << 20)
    shapes = case.shapes()
    cut = tpu.plan(Spec(1, 1.0, None, None, 1, True), shapes["q_BTNH"], Cache(shapes["k_cache"], shapes["v_cache"]))
    assert cut is not None and cut.heads == 2 and cut.block == 128
    check(case, "tpu")


def test_no_races_and_no_reads_of_unwritten_memory():
    """The TPU interpreter fills memory with NaN, completes a copy only at its wait, and detects races."""
    case = BY_NAME["all_together"]
    check(case, "tpu", interpret=pltpu.InterpretParams(detect_races=True))
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    if hasattr(interpreter, "races"):  # jax 0.10 records a race, 0.12 raises
        assert not interpreter.races.races_found


def draw_case(data) -> Case:
    draw = lambda *options: data.draw(st.sampled_from(options))
    T, page, S = draw(1, 2, 5), draw(None, 8, 64), draw(128, 200, 320)
    S = S if page is None else S // page * page
    return Case(
        "any", B=2, T=T, N=draw(2, 6), K=draw(1, 2), H=draw(32, 128), V=draw(32, 128), S=S, page=page,
        lengths=tuple(data.draw(st.integers(0, S)) for _ in range(2)), cache=draw(None, "int8"),
        window=draw(None, 1, 33), softcap=draw(None, 3.0), alibi=draw(False, True), sinks=draw(False, True),
        splits=draw(1, 3),
    )  # fmt: skip


@settings(max_examples=10, deadline=None, derandomize=True)
@given(data=st.data())
def test_reference_matches_the_formula_on_random_cases(data):
    check(draw_case(data), "reference")


@pytest.mark.slow
@pytest.mark.parametrize("implementation", KERNELS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_kernels_match_the_formula_on_random_cases(implementation, data):
    check(draw_case(data), implementation)


def test_caches_of_idle_rows_are_not_read():
    """Idle rows give zeros although their caches hold NaN and their page tables are invalid."""
    case = replace(BY_NAME["pages_of_16"], lengths=(0, 0, 0))
    for implementation in KERNELS:
        out, lse = run(case, implementation)
        assert (out == 0).all() and (lse == np.float32(MASKED)).all()


@settings(max_examples=200, deadline=None)
@given(
    length=st.integers(0, 700),
    T=st.integers(1, 16),
    window=st.none() | st.integers(1, 300),
    block=st.sampled_from((16, 128)),
    parts=st.integers(1, 5),
)
def test_parts_cover_exactly_the_visible_blocks(length, T, window, block, parts):
    spec = Spec(T, 1.0, window, None, parts, False)
    ranges = [tuple(int(x) for x in block_range(spec, np.int32(length), block, part)) for part in range(parts)]
    read = [i for first, end in ranges for i in range(first, end)]
    seen = [s for s in range(length) if window is None or s > length - T - window]
    assert read == sorted({s // block for s in seen})
    assert int(first_slot(spec, np.int32(length))) == (seen[0] if seen else 0)
    sizes = [end - first for first, end in ranges]
    assert all(size >= 0 for size in sizes) and max(sizes) <= -(-len(read) // parts)


@lru_cache
def _parts():
    r = np.random.default_rng(0)
    return r.normal(size=(3, 4, 8)).astype(np.float32), r.normal(size=(3, 4)).astype(np.float32) * 20


def test_merge_matches_softmax_over_all_parts():
    outs, lses = _parts()
    merge = jax.jit(merge_parts)
    out, lse = merge(outs, lses)
    weights = np.exp(lses.astype(np.float64))
    np.testing.assert_allclose(out, (weights[..., None] * outs).sum(0) / weights.sum(0)[:, None], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(lse, np.log(weights.sum(0)), rtol=1e-6, atol=1e-6)
    # Order and grouping do not matter, and a part without visible keys changes nothing, whatever its output.
    pair = merge(jnp.stack([outs[2], merge(outs[:2], lses[:2])[0]]), jnp.stack([lses[2], merge(outs[:2], lses[:2])[1]]))
    np.testing.assert_allclose(pair[0], out, rtol=1e-5, atol=1e-6)
    empty = merge(np.concatenate([outs, np.full((1, 4, 8), np.nan)]), np.concatenate([lses, np.full((1, 4), MASKED)]))
    np.testing.assert_array_equal(empty[0], out)
    nothing = merge(np.full((2, 4, 8), np.nan), np.full((2, 4), MASKED))
    assert (nothing[0] == 0).all() and (nothing[1] == np.float32(MASKED)).all()


def test_sinks_given_to_one_half_of_a_cache_match_the_whole():
    """As for a cache spread over devices: only the first half gets the sinks, and `merge` joins the halves."""
    case = Case("whole", B=1, T=1, S=64, lengths=(64,), sinks=True)
    whole = run(case, "reference")
    a = case.arguments()
    sinks = a.pop("sinks_N")
    halves = []
    for start, extra in ((0, {"sinks_N": sinks}), (32, {})):
        part = {
            **a,
            **{f"{x}_cache": a[f"{x}_cache"][:, :, start : start + 32] for x in "kv"},
            "lengths_B": jnp.array([32]),
        }
        halves.append(compiled("reference", False)({**part, **extra}))
    out, lse = jax.jit(merge_parts)(
        *(jnp.stack(x) for x in ([h[0][:, 0] for h in halves], [h[1][..., 0] for h in halves]))
    )
    np.testing.assert_allclose(out, whole[0][:, 0], atol=1e-6)
    np.testing.assert_allclose(lse, whole[1][..., 0], rtol=1e-6)


def test_without_a_kernel_the_reference_ignores_splits_and_keeps_finite():
    r = np.random.default_rng(0)
    q, k, v = (jnp.asarray(r.normal(size=shape), jnp.float32) for shape in ((2, 1, 2, 8), (2, 1, 16, 8), (2, 1, 16, 8)))
    lengths = jnp.asarray([3, 16])
    np.testing.assert_array_equal(decode_attention(q, k, v, lengths, splits=2), decode_attention(q, k, v, lengths))
    with pytest.raises(ValueError, match="the reference does not split rows"):
        decode_attention(q, k, v, lengths, splits=2, implementation="reference")
    dirty = v.at[0, :, 3:].set(1e30)  # finite and unseen, so `finite=True` must not change the result
    np.testing.assert_array_equal(
        decode_attention(q, k, dirty, lengths, finite=True), decode_attention(q, k, v, lengths)
    )
