"""The precision of a paired t test: its interval, its power, and the number of seeds that an effect needs.

`sd` is the standard deviation of the differences between the arms, one difference for each seed, in the unit of the
values. `n` is the number of seeds.
"""

from __future__ import annotations

import math
from functools import lru_cache

from scipy import optimize, special


def half_width(sd: float, n: int, confidence: float = 0.95) -> float:
    """Return half the width of the t interval of a mean of `n` differences with standard deviation `sd`."""
    check_fraction("confidence", confidence)
    check_runs(sd, n)
    return quantile(n - 1, 0.5 + confidence / 2) * sd / math.sqrt(n)


def power(sd: float, n: int, effect: float, alpha: float = 0.05) -> float:
    """Return the probability that the two-sided paired t test of `n` pairs finds a true difference `effect`.

    The square of a noncentral t variable is a noncentral F variable, which covers both tails at once. SciPy computes
    it for every n and alpha that a study needs; its noncentral t gives NaN for some of them.
    """
    check_fraction("alpha", alpha)
    check_runs(sd, n)
    if sd == 0:
        return float(effect != 0)
    return _power(n, effect / sd * math.sqrt(n), alpha)


def detectable_effect(sd: float, n: int, power: float = 0.8, alpha: float = 0.05) -> float:
    """Return the least true difference that the two-sided paired t test of `n` pairs finds with probability `power`.

    `sd` is the standard deviation of the differences.
    """
    check_fraction("alpha", alpha)
    check_fraction("power", power, least=alpha)
    check_runs(sd, n)
    return _noncentrality(n, power, alpha) * sd / math.sqrt(n)


def seeds_needed(sd: float, effect: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Return the least number of seeds with which `detectable_effect` is at most `effect`."""
    check_fraction("alpha", alpha)
    check_fraction("power", power, least=alpha)
    check_runs(sd, 2)
    if not 0 < effect < math.inf:
        raise ValueError(f"effect = {effect}: use a difference above 0, in the unit of the values")
    if sd == 0:
        return 2
    # The search starts from the number for a known standard deviation, which is a little too low for most arguments.
    known = ((special.ndtri(1 - alpha / 2) + special.ndtri(power)) * sd / effect) ** 2
    if known > 1e6:
        raise ValueError(f"effect = {effect} with sd = {sd}: more than a million seeds; choose a larger effect")
    n = max(2, math.floor(known) - 1)
    while n > 2 and _power(n - 1, effect / sd * math.sqrt(n - 1), alpha) >= power:
        n -= 1
    while not _power(n, effect / sd * math.sqrt(n), alpha) >= power:  # also where it is NaN
        n += 1
    return n


# ---- parts ----


def quantile(degrees: float, probability: float) -> float:
    """Return the value below which the t distribution has `probability`."""
    return float(special.stdtrit(degrees, probability))


def _power(n: int, noncentrality: float, alpha: float) -> float:
    critical = quantile(n - 1, alpha / 2) ** 2
    return 1 - float(special.ncfdtr(1, n - 1, noncentrality**2, critical))


@lru_cache(maxsize=1024)
def _noncentrality(n: int, power: float, alpha: float) -> float:
    """Return the noncentrality of the t test of `n` values at which its power is `power`."""
    high = 1.0
    while (reached := _power(n, high, alpha)) < power:
        high *= 2
    if math.isnan(reached):
        raise ValueError(f"n = {n}, power = {power}, alpha = {alpha}: out of the range of SciPy. Run more seeds")
    return float(optimize.brentq(lambda value: _power(n, value, alpha) - power, 0.0, high, xtol=1e-10))


def check_fraction(name: str, value: float, least: float = 0.0) -> None:
    if not least < value < 1:
        raise ValueError(f"{name} = {value}: use a number above {least:g} and below 1")


def check_runs(sd: float, n: int) -> None:
    if n < 2:
        raise ValueError(f"n = {n}: a test needs at least 2 seeds. Run more seeds")
    if not 0 <= sd < math.inf:
        raise ValueError(f"sd = {sd}: use a finite number of 0 or more")
