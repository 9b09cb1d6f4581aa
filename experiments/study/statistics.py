"""Tests of a difference between two arms of a study.

A value is the result of one run, for example held-out bits per byte. `baseline` and `arm` hold one value for each seed.
In a paired function, entry i of both comes from the same seed: the same data order and the same evaluation. Differences
are arm - baseline, in the unit of the values.

Every function raises ValueError if values are missing, not finite or too few. A study decides what a diverged run
counts as, usually its initial loss, before it calls them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from experiments.study.power import check_fraction, half_width, quantile

Values = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Paired:
    """A mean difference with its confidence interval."""

    n: int  # pairs of runs
    mean: float
    sd: float  # of the differences
    low: float
    high: float
    p: float  # two-sided, of no difference
    cohen_dz: float  # mean / sd


@dataclass(frozen=True)
class Unpaired:
    """A difference of the means of two independent groups with its confidence interval."""

    n: int  # runs of the smaller group
    mean: float
    sd: float  # of the difference between one run of each group
    low: float
    high: float
    p: float  # two-sided, of no difference
    cohen_dz: float  # mean / sd


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests (TOST) of |difference| < margin."""

    n: int
    mean: float
    sd: float
    margin: float
    low: float  # of the interval with confidence 1 - 2 alpha
    high: float
    p: float  # the larger of the two one-sided values
    equivalent: bool


@dataclass(frozen=True)
class NonInferiority:
    """A one-sided test of difference < margin, where lower values are better."""

    n: int
    mean: float
    sd: float
    margin: float
    high: float  # the one-sided upper bound of the difference
    p: float
    noninferior: bool


@dataclass(frozen=True)
class VarianceComponents:
    """Variances of arms, of seeds and of the rest, in the squared unit of the values."""

    arm: float
    seed: float
    residual: float

    @property
    def paired_sd(self) -> float:
        """The standard deviation of the difference between two arms that share a seed."""
        return math.sqrt(2 * self.residual)

    @property
    def unpaired_sd(self) -> float:
        """The standard deviation of the difference between two arms with independent seeds."""
        return math.sqrt(2 * (self.seed + self.residual))


# ---- differences ----


def paired(baseline: Values, arm: Values, confidence: float = 0.95) -> Paired:
    """Return the paired t test of arm - baseline.

    If all differences are equal, the interval has no width, and p is 0, or 1 where the differences are 0.
    """
    n, mean, sd = _moments(_differences(baseline, arm))
    half = half_width(sd, n, confidence)
    p = _two_sided(mean, sd / math.sqrt(n), n - 1)
    return Paired(n, mean, sd, mean - half, mean + half, p, _ratio(mean, sd))


def unpaired(baseline: Values, arm: Values, confidence: float = 0.95) -> Unpaired:
    """Return Welch's t test of arm - baseline for runs that share no seeds (Welch 1947)."""
    check_fraction("confidence", confidence)
    n_baseline, mean_baseline, sd_baseline = _moments(_checked("baseline", baseline))
    n_arm, mean_arm, sd_arm = _moments(_checked("arm", arm))
    mean = mean_arm - mean_baseline
    squared_baseline, squared_arm = sd_baseline**2 / n_baseline, sd_arm**2 / n_arm
    squared = squared_baseline + squared_arm
    n, sd = min(n_baseline, n_arm), math.hypot(sd_baseline, sd_arm)
    if squared == 0:
        return Unpaired(n, mean, sd, mean, mean, _two_sided(mean, 0.0, 1), _ratio(mean, sd))
    share = squared_baseline / squared
    degrees = 1 / (share**2 / (n_baseline - 1) + (1 - share) ** 2 / (n_arm - 1))  # Welch-Satterthwaite
    error = math.sqrt(squared)
    half = quantile(degrees, 0.5 + confidence / 2) * error
    return Unpaired(n, mean, sd, mean - half, mean + half, _two_sided(mean, error, degrees), _ratio(mean, sd))


def equivalence(baseline: Values, arm: Values, margin: float, confidence: float = 0.95) -> Equivalence:
    """Return the paired TOST that arm and baseline differ by less than `margin` (Schuirmann 1987).

    With alpha = 1 - confidence, the arms are equivalent if both one-sided tests reject at alpha: the interval with
    confidence 1 - 2 alpha lies within ±margin.
    """
    check_fraction("confidence", confidence, least=0.5)
    if not 0 < margin < math.inf:
        raise ValueError(f"margin = {margin}: equivalence needs a margin above 0, in the unit of the values")
    found = paired(baseline, arm, 2 * confidence - 1)
    p = max(p_above(found, -margin), p_below(found, margin))
    return Equivalence(found.n, found.mean, found.sd, margin, found.low, found.high, p, p <= alpha_of(confidence))


def noninferiority(baseline: Values, arm: Values, margin: float, confidence: float = 0.95) -> NonInferiority:
    """Return the one-sided paired test that the arm is not higher than the baseline by `margin` or more.

    Lower values are better. For values of which higher is better, negate both arms.
    """
    check_fraction("confidence", confidence, least=0.5)
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin = {margin}: use a margin of 0 or more, in the unit of the values")
    found = paired(baseline, arm, 2 * confidence - 1)
    p = p_below(found, margin)
    return NonInferiority(found.n, found.mean, found.sd, margin, found.high, p, p <= alpha_of(confidence))


def p_above(found: Paired, bound: float = 0.0) -> float:
    """Return the p value of the one-sided t test that the mean difference is above `bound`."""
    return _upper_tail(found.mean - bound, found.sd / math.sqrt(found.n), found.n - 1)


def p_below(found: Paired, bound: float = 0.0) -> float:
    """Return the p value of the one-sided t test that the mean difference is below `bound`."""
    return _upper_tail(bound - found.mean, found.sd / math.sqrt(found.n), found.n - 1)


def holm(p_values: Values) -> np.ndarray:
    """Return Holm's adjusted p values [tests] in the given order (Holm 1979).

    Rejecting those of at most alpha has a family-wise error rate of at most alpha, however the tests depend on each
    other.
    """
    p = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p_values = {p_values}: use a sequence of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(steps, 1)
    return adjusted


def variance_components(values: np.ndarray) -> VarianceComponents:
    """Return the variance components of values [arm, seed], by the method of moments.

    The model is value = mean + arm + seed + residual with independent random terms and one run for each arm and seed
    (Searle, Casella, McCulloch 1992, chapter 4). Negative estimates are returned as 0.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or min(values.shape) < 2 or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape}: use finite values [arm, seed], at least 2 of each")
    arms, seeds = values.shape
    by_arm, by_seed = values.mean(axis=1, keepdims=True), values.mean(axis=0, keepdims=True)
    rest = values - by_arm - by_seed + values.mean()
    residual = float(np.sum(rest**2)) / ((arms - 1) * (seeds - 1))
    arm = (seeds * float(by_arm.var(ddof=1)) - residual) / seeds
    seed = (arms * float(by_seed.var(ddof=1)) - residual) / arms
    return VarianceComponents(max(arm, 0.0), max(seed, 0.0), residual)


# ---- parts ----


def _checked(name: str, values: Values) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1:
        raise ValueError(f"{name} has shape {found.shape}; use one value for each seed")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} = {found}: not finite. Decide what a diverged run counts as, e.g. its initial loss")
    return found


def _differences(baseline: Values, arm: Values) -> np.ndarray:
    left, right = _checked("baseline", baseline), _checked("arm", arm)
    if len(left) != len(right):
        raise ValueError(
            f"baseline has {len(left)} values and arm has {len(right)}: a paired test needs the same seeds in both. "
            "Leave out seeds that only one of them has, or use `unpaired`"
        )
    return right - left


def _moments(values: np.ndarray) -> tuple[int, float, float]:
    """Return (n, mean, standard deviation); the latter is exactly 0 if all values are equal."""
    n = len(values)
    if n < 2:
        raise ValueError(f"n = {n}: a test needs at least 2 seeds. Run more seeds")
    if values.min() == values.max():
        return n, float(values[0]), 0.0
    mean = float(values.mean())
    rest = values - mean
    return n, mean, math.sqrt(float(rest @ rest) / (n - 1))


def alpha_of(confidence: float) -> float:
    """Return 1 - confidence, rounded so that 0.95 gives 0.05."""
    return round(1 - confidence, 12)


def _upper_tail(gap: float, error: float, degrees: float) -> float:
    if error == 0:
        return 0.0 if gap > 0 else 1.0
    return float(special.stdtr(degrees, -gap / error))


def _two_sided(gap: float, error: float, degrees: float) -> float:
    return 2 * _upper_tail(abs(gap), error, degrees) if error > 0 or gap else 1.0


def _ratio(mean: float, sd: float) -> float:
    if sd == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / sd
