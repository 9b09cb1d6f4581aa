"""Intervals and tests that resample runs: the bootstrap, and the order of several arms."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from experiments.study.power import check_fraction
from experiments.study.statistics import Values

Statistic = Callable[[np.ndarray], float]


@dataclass(frozen=True)
class Bootstrap:
    """A statistic of several runs with its bootstrap interval."""

    estimate: float  # of the runs as they are
    low: float
    high: float
    resamples: int
    failed: int  # resamples without a value; the interval describes the others alone


@dataclass(frozen=True)
class RankOrder:
    """Kendall's tau of a measured and an expected order: 1 for the same order, -1 for the reverse."""

    tau: float  # of the arms' means over seeds
    mean_tau: float  # mean over seeds of the tau of one seed
    p: float  # one-sided, of a mean_tau this large if the arms do not differ


def bootstrap(
    statistic: Statistic,
    runs: np.ndarray,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    method: Literal["percentile", "bca"] = "percentile",
) -> Bootstrap:
    """Return `statistic(runs)` with its bootstrap interval over runs, the rows of `runs` [runs, ...].

    A resample draws as many rows with replacement. One on which `statistic` raises ValueError or returns a value that
    is not finite counts as failed, and the interval leaves it out. Many failures mean that the interval is too narrow.
    "percentile" takes quantiles of the resampled values. "bca" corrects them for bias and skewness, and calls
    `statistic` once more for each run (Efron 1987). With fewer than about 20 runs both are too narrow.

    Raises ValueError if there are fewer than 2 runs, if `statistic` fails on `runs`, or if all resamples fail.
    """
    check_fraction("confidence", confidence)
    runs = np.asarray(runs)
    if runs.ndim == 0 or len(runs) < 2:
        raise ValueError(f"runs of shape {runs.shape}: a bootstrap needs at least 2 runs, one in each row")
    if resamples < 1:
        raise ValueError(f"resamples = {resamples}: use 1 or more, e.g. 10000")
    estimate = _value(statistic, runs)
    if math.isnan(estimate):
        raise ValueError("the statistic has no finite value on all runs, so there is nothing to resample")
    draws = np.random.default_rng(seed).integers(len(runs), size=(resamples, len(runs)))
    values = np.array([_value(statistic, runs[draw]) for draw in draws])
    kept = values[~np.isnan(values)]
    if not len(kept):
        raise ValueError(f"the statistic fails on all {resamples} resamples; use more runs")
    levels = np.array([(1 - confidence) / 2, (1 + confidence) / 2])
    if method == "bca":
        levels = _corrected(statistic, runs, estimate, kept, levels)
    low, high = np.quantile(kept, levels)
    return Bootstrap(estimate, float(low), float(high), resamples, resamples - len(kept))


def _value(statistic: Statistic, runs: np.ndarray) -> float:
    """Return the statistic, or NaN where it fails."""
    try:
        value = float(statistic(runs))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _corrected(
    statistic: Statistic, runs: np.ndarray, estimate: float, values: np.ndarray, levels: np.ndarray
) -> np.ndarray:
    """Return the levels of the quantiles after correction for bias and acceleration (Efron 1987, equation 6.8)."""
    left_out = np.array([_value(statistic, np.delete(runs, i, axis=0)) for i in range(len(runs))])
    if np.isnan(left_out).any():
        raise ValueError('method = "bca": the statistic fails without one of the runs; use "percentile"')
    below = (np.mean(values < estimate) + np.mean(values <= estimate)) / 2
    if not 0 < below < 1:
        raise ValueError('method = "bca": all resampled values lie on one side of the estimate; use "percentile"')
    bias, gaps = special.ndtri(below), left_out.mean() - left_out
    spread = float(np.sum(gaps**2))
    acceleration = float(np.sum(gaps**3)) / (6 * spread**1.5) if spread else 0.0
    shifted = bias + special.ndtri(levels)
    return special.ndtr(bias + shifted / (1 - acceleration * shifted))


def rank_order(values: np.ndarray, expected: Values, permutations: int = 10_000, seed: int = 0) -> RankOrder:
    """Return how well the order of the arms in `values` [arm, seed] agrees with `expected` [arm].

    `expected` gives a number for each arm, for example its published result or its place: an arm with a larger number
    is expected to have larger values. Pairs of arms with equal numbers are not compared. A measured tie counts as half
    agreement. The p value permutes the arms within each seed, since the values of one seed share its data (a stratified
    permutation test). It counts the measured order as one of the permutations, so it is never 0 (Phipson, Smyth 2010).
    """
    values, places = np.asarray(values, np.float64), np.asarray(expected, np.float64)
    if values.ndim != 2 or min(values.shape) < 1 or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape}: use finite values [arm, seed]")
    if places.shape != values.shape[:1] or not np.isfinite(places).all():
        raise ValueError(f"expected = {expected}: use one finite number for each of the {len(values)} arms")
    first, second = np.triu_indices(len(places), 1)
    compared = places[first] != places[second]
    if not compared.any():
        raise ValueError(f"expected = {expected}: expects no order; use different numbers")
    if permutations < 1:
        raise ValueError(f"permutations = {permutations}: use 1 or more, e.g. 10000")
    first, second = first[compared], second[compared]
    signs = np.sign(places[second] - places[first])

    def taus(measured: np.ndarray) -> np.ndarray:
        """Return the taus [...] of values [..., arm]."""
        return np.asarray(np.mean(np.sign(measured[..., second] - measured[..., first]) * signs, axis=-1))

    by_seed = values.T
    observed = float(taus(by_seed).mean())
    drawn = np.random.default_rng(seed).permuted(np.broadcast_to(by_seed, (permutations, *by_seed.shape)), axis=-1)
    reached = np.count_nonzero(taus(drawn).mean(axis=-1) >= observed - 1e-9)  # sums of fractions differ by rounding
    p = (1 + reached) / (1 + permutations)
    return RankOrder(float(taus(values.mean(axis=1))), observed, p)
