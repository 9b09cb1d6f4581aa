"""The commands `check` and `bench`: what they print on a CPU, and that they report errors."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bench, check
from pallas_kernels.flash_attention import Mask
from pallas_kernels.flash_attention.bench import _error, visible_pairs
from pallas_kernels.flash_attention.shapes import Case
from pallas_kernels.grouped_matmul import bench as grouped_bench
from pallas_kernels.grouped_matmul.shapes import Case as GroupedCase

SMALL = (Case("small", T=32, S=32, H=16, V=16), Case("small_window", T=40, S=40, H=16, V=16, mask=Mask(window=8)))


def test_check_passes_correct_results_and_fails_wrong_ones(monkeypatch, capsys):
    monkeypatch.setattr(check, "FLASH_CASES", SMALL)
    monkeypatch.setattr(check, "GROUPED_CASES", ())
    monkeypatch.setattr(sys, "argv", ["check"])
    right = functools.cache(check.flash)  # both runs of `main` share its results
    monkeypatch.setattr(check, "flash", right)
    assert check.main() == 0
    out = capsys.readouterr().out
    assert out.count("xla") == 2 and "all 2 within bounds" in out and "decode_attention: no kernel for cpu" in out

    monkeypatch.setattr(
        check, "flash", lambda case, name: [x * (1.001 if name == "xla" else 1) for x in right(case, name)]
    )
    assert check.main() == 1
    assert "2 of 2 errors exceed their bound" in capsys.readouterr().out


def test_check_of_the_grouped_matmul_fails_a_wrong_gradient(monkeypatch, capsys):
    """NaN in the rows after the last group does not count as an error."""
    monkeypatch.setattr(check, "GROUPED_CASES", (GroupedCase("small", (3, 0, 8), K=8, N=8, G=2, after=3),))
    monkeypatch.setattr(sys, "argv", ["check", "grouped_matmul"])
    assert check.main() == 0
    assert "all 1 within bounds" in capsys.readouterr().out
    right = check.grouped
    wrong = lambda case, name: [x * (1.001 if name == "xla" and i == 2 else 1) for i, x in enumerate(right(case, name))]
    monkeypatch.setattr(check, "grouped", wrong)
    assert check.main() == 1


def test_check_refuses_an_unknown_operation_and_raises_a_bug(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "flash_atention"])
    with pytest.raises(SystemExit):
        check.main()
    assert "unknown; use flash_attention or decode_attention" in capsys.readouterr().err
    right = check.flash
    monkeypatch.setattr(check, "FLASH_CASES", SMALL)

    def broken(case, name):
        if name == "xla":
            raise ValueError("a bug")
        return right(case, name)

    monkeypatch.setattr(check, "flash", broken)
    monkeypatch.setattr(sys, "argv", ["check"])
    with pytest.raises(ValueError, match="a bug"):
        check.main()


def test_bench_rows_show_errors_rooflines_and_refusals():
    contest = bench.Contest(
        "add",
        1e9,
        4e6,
        "float32",
        (jnp.ones(1000),),
        {"ours": lambda x: x + 1, "theirs": lambda x: x.reshape(7)},
        lambda result: float(abs(np.asarray(result) - 2).max()),
    )
    ours, theirs = bench.measure(contest, rounds=3, seconds=0.001)
    assert ours["seconds"] > 0 and ours["error"] == 0 and "refused" not in ours
    assert "reshape" in theirs["refused"] and "seconds" not in theirs
    lines = list(
        bench.table([{**ours, "dtype": "float32"}, {**theirs, "dtype": "float32"}], {"float32": 1e12, "copy": 1e9})
    )
    share = 4e6 / 1e9 / ours["seconds"]
    assert f"{share:.0%}" in lines[2] and "refused" in lines[3]


def test_bench_raises_a_bug_of_our_code_and_lists_one_of_theirs_as_a_refusal():
    def broken(x):
        raise TypeError("a bug")

    ways = {"theirs": broken}
    assert "a bug" in bench.measure(bench.Contest("", 1, 1, "float32", (jnp.ones(2),), ways), 1, 0.001)[0]["refused"]
    with pytest.raises(TypeError, match="a bug"):
        bench.measure(bench.Contest("", 1, 1, "float32", (jnp.ones(2),), {"ours: xla": broken}), 1, 0.001)


@pytest.mark.parametrize(
    "case", [*SMALL, Case("packed", T=32, S=32, segments=3), Case("full", T=8, S=8, mask=Mask(causal=False))]
)
def test_bench_counts_visible_pairs_and_measures_errors(case):
    arrays, kwargs = case.arguments()
    segments = kwargs.get("segment_ids")
    t, s = np.arange(case.T)[:, None], np.arange(case.S)
    seen = (s <= t) | (not case.mask.causal)
    if case.mask.window:
        seen &= t - s < case.mask.window
    if segments is not None:
        seen = seen & (segments[0][0][:, None] == segments[1][0])
    assert visible_pairs(case, segments) == seen.sum()
    q, k, v = (x[0, :, 0].astype(np.float64) for x in arrays)
    logits = np.where(seen, q @ k.T * case.H**-0.5, -np.inf)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    exact = (weights / weights.sum(1, keepdims=True)) @ v
    out = np.zeros((1, case.T, case.N, case.V))
    out[0, :, 0] = exact
    inputs = [x.astype(np.float64) for x in arrays]
    assert _error(case, inputs, segments, out) < 1e-12
    out[0, -1, 0, 0] += 0.5
    assert _error(case, inputs, segments, out) > 0.01


def test_all_ways_of_the_grouped_matmul_bench_match_float64():
    """The error is large for a way that uses another expert's weights."""
    size, sizes = grouped_bench.Size("small", 20, 4, 8, 4), np.array([7, 0, 9, 4], np.int32)
    arguments = (*grouped_bench._arrays(size, "float32"), jnp.asarray(sizes))
    ways = dict(grouped_bench._ways("cpu", size, sizes))
    assert len(ways) == 4
    for name, way in ways.items():
        assert grouped_bench._error(arguments, sizes, jax.jit(way)(*arguments)) < 2e-6, name
    x, up, down, sizes_E = arguments
    assert grouped_bench._error(arguments, sizes, way(x, up[::-1], down, sizes_E)) > 0.1
    for family in ("cut finer", "8192 rows"):
        found = [s for s in grouped_bench.cases("gpu", False) if family in s.name]
        assert [s.E for s in found] == list(grouped_bench.EXPERTS)
        assert len({s.M * s.D * s.F for s in found}) == 1, "equal FLOPs whatever the number of experts"
