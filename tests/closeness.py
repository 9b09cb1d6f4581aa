"""Comparison with tolerances relative to the scale of the values, and a log of the margins.

`MARGINS=file python -m pytest ...` appends one line for every comparison by `assert_close` or NumPy's
`assert_allclose`: the fraction of the bound that the error used, a tab, and the test. The largest fractions are the
smallest margins.
"""

import os
import sys

import numpy as np

_allclose = np.testing.assert_allclose


def assert_close(actual, expected, relative: float, *, scale=None, what: str = "") -> None:
    """Assert |actual - expected| <= relative * scale for every entry.

    `scale`: None uses the largest magnitude of `expected`, which suits sums whose terms are about as large as the
    results. If terms cancel, pass their size as a number or an array that broadcasts. There is no absolute tolerance.
    """
    expected = np.asarray(expected, np.float64)
    scale = np.abs(expected).max(initial=0) if scale is None else np.asarray(scale, np.float64)
    bound = np.broadcast_to(np.asarray(relative * scale), expected.shape)
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == expected.shape, f"{what}: shapes {actual.shape} and {expected.shape}"
    used = fraction_used(actual, expected, bound)
    _log(used)
    assert used <= 1, (
        f"{what or 'values'}: error {np.abs(actual - expected).max():.3g} of values up to "
        f"{np.abs(expected).max(initial=0):.3g} is {used:.3g} of the bound, relative = {relative:g}"
    )


def fraction_used(actual, expected, bound) -> float:
    """Return the largest ratio of an error to its bound; infinite if only one of the two values is finite."""
    with np.errstate(all="ignore"):
        error = np.abs(actual - expected)
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        used = np.where(same, 0.0, np.where(error <= 0, 0.0, error / bound))
    return float(np.nan_to_num(used, nan=np.inf).max(initial=0.0))


def log_margins() -> None:
    """Log the comparisons of NumPy too if MARGINS names a file."""
    if "MARGINS" in os.environ:
        np.testing.assert_allclose = _logged


def _logged(actual, desired, rtol=1e-7, atol=0, *rest, **options):
    __tracebackhide__ = True
    _allclose(actual, desired, rtol, atol, *rest, **options)
    if rtol or atol:
        a, b = (np.asarray(x).astype(np.float64) for x in (actual, desired))
        _log(fraction_used(*np.broadcast_arrays(a, b), atol + rtol * np.abs(b)))


def _log(used: float) -> None:
    if "MARGINS" in os.environ:
        caller = sys._getframe(2)
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" (")[0]
        with open(os.environ["MARGINS"], "a") as file:
            file.write(f"{used:.4f}\t{test}\tline {caller.f_lineno}\n")
