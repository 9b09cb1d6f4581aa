"""The bootstrap covers as theory says and counts failures; the test of an order keeps its error rate."""

from __future__ import annotations

import math
from itertools import permutations, product

import numpy as np
import pytest
from scipy import stats

from experiments.study.fits import fit_power_law
from experiments.study.resampling import bootstrap, rank_order
from tests.experiments.study.test_statistics import calibration


def mean(runs: np.ndarray) -> float:
    return runs.mean()


@calibration
def test_bootstrap_interval_of_a_mean_covers_as_often_as_theory_says():
    """Resampled means of n normal values have the deviation s sqrt((n - 1) / n) / sqrt(n), so the interval covers the
    true mean if |t| with n - 1 degrees of freedom is at most z sqrt((n - 1) / n)."""
    n, experiments = 20, 300
    rng = np.random.default_rng(0)
    found = [bootstrap(mean, rng.normal(2, 3, (n, 1)), 300, seed=i) for i in range(experiments)]
    covered = sum(each.low <= 2 <= each.high for each in found) / experiments
    theory = 1 - 2 * stats.t.sf(stats.norm.isf(0.025) * math.sqrt((n - 1) / n), n - 1)
    assert abs(covered - theory) <= 4 * math.sqrt(theory * (1 - theory) / experiments)
    assert all(each.failed == 0 for each in found)


def size_of_mean(runs: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.abs(np.mean(runs, axis=axis))


@pytest.mark.parametrize("statistic", [np.var, size_of_mean])
@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_agrees_with_scipy(method, statistic):
    """Values are skewed, and both statistics are biased, the second strongly. Two sets of 5,000 resamples differ by the
    error of a quantile, a few percent of the width."""
    runs = np.random.default_rng(1).exponential(size=25)
    runs -= 0.9 * runs.mean() * (statistic is size_of_mean)
    found = bootstrap(statistic, runs, 5000, 0.9, method=method)
    reference = stats.bootstrap(
        (runs,), statistic, n_resamples=5000, confidence_level=0.9, method=method, rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.estimate == statistic(runs) and found.resamples == 5000
    width = reference.high - reference.low
    assert abs(found.low - reference.low) < 0.05 * width and abs(found.high - reference.high) < 0.05 * width


def test_bca_shifts_the_interval_of_skewed_values_up():
    runs = np.random.default_rng(1).exponential(size=25) ** 2
    plain, corrected = (bootstrap(mean, runs, 2000, method=method) for method in ("percentile", "bca"))
    assert corrected.low > plain.low and corrected.high > plain.high


def test_bootstrap_of_a_fitted_exponent_resamples_whole_runs():
    rng = np.random.default_rng(3)
    x = np.logspace(5, 8, 30)
    runs = np.stack([x, 12 * x**-0.08 * np.exp(rng.normal(0, 0.01, 30))], axis=1)
    found = bootstrap(lambda rows: fit_power_law(rows[:, 0], rows[:, 1]).exponent, runs, 500)
    assert found.low < -0.08 < found.high and found.high - found.low < 0.01 and found.failed == 0
    assert found == bootstrap(lambda rows: fit_power_law(rows[:, 0], rows[:, 1]).exponent, runs, 500)


@pytest.mark.parametrize("failure", ["raises", "nan", "infinite"])
def test_failed_resamples_are_counted(failure):
    """2 runs: a quarter of the resamples holds the second one twice."""

    def statistic(runs: np.ndarray) -> float:
        if (runs == 1).all():
            if failure == "raises":
                raise ValueError("no variance")
            return math.nan if failure == "nan" else math.inf
        return runs.mean()

    found = bootstrap(statistic, np.array([0.0, 1.0]), 2000)
    assert abs(found.failed / 2000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000)
    assert (found.low, found.high, found.resamples) == (0.0, 0.5, 2000)


def test_a_bootstrap_without_values_is_refused():
    def only_all(runs: np.ndarray) -> float:
        return 1.0 if len(np.unique(runs)) == len(runs) else math.nan

    runs = np.arange(12.0)
    with pytest.raises(ValueError, match="fails on all 50 resamples"):
        bootstrap(only_all, runs, 50)
    with pytest.raises(ValueError, match="no finite value on all runs"):
        bootstrap(lambda rows: math.nan, runs, 50)
    with pytest.raises(ValueError, match="at least 2 runs"):
        bootstrap(mean, np.ones((1, 3)), 50)
    with pytest.raises(ValueError, match="on one side of the estimate"):
        bootstrap(lambda rows: 1.0 - 0.1 * (len(np.unique(rows)) < 12), runs, 50, method="bca")
    with pytest.raises(ValueError, match="without one of the runs"):
        bootstrap(lambda rows: rows.mean() if len(rows) == 12 else math.nan, runs, 50, method="bca")
    with pytest.raises(ValueError, match="resamples = 0"):
        bootstrap(mean, runs, 0)


# ---- order of arms ----


def test_tau_is_that_of_scipy():
    rng = np.random.default_rng(4)
    values, expected = rng.normal(size=(6, 3)), rng.permutation(6)
    found = rank_order(values, expected, 100)
    assert found.tau == pytest.approx(stats.kendalltau(values.mean(axis=1), expected).statistic)
    assert found.mean_tau == pytest.approx(np.mean([stats.kendalltau(seed, expected).statistic for seed in values.T]))


def test_p_of_an_order_is_that_of_all_permutations():
    """3 arms and 2 seeds have 36 permutations. 0.04 is 8 standard deviations of the smallest p value, 1/36."""
    expected = [0, 1, 2]
    values = np.array([[1.0, 1.2], [2.0, 3.4], [3.0, 2.9]])

    def mean_tau(table: np.ndarray) -> float:
        return np.mean([stats.kendalltau(seed, expected).statistic for seed in table.T])

    orders = [np.array(order) for order in permutations(range(3))]
    tables = [np.stack([values[a, 0], values[b, 1]], axis=1) for a, b in product(orders, orders)]
    exact = np.mean([mean_tau(table) >= mean_tau(values) - 1e-9 for table in tables])
    assert rank_order(values, expected).p == pytest.approx(exact, abs=4 * math.sqrt(exact / 10_000))


def test_orders_that_agree_disagree_or_are_partly_open():
    values = np.arange(4.0)[:, None] + np.zeros((4, 5))
    same, reverse = rank_order(values, [1, 2, 3, 4]), rank_order(values, [4, 3, 2, 1])
    assert (same.tau, same.mean_tau, same.p) == (1, 1, 1 / 10_001)
    assert (reverse.tau, reverse.mean_tau, reverse.p) == (-1, -1, 1)
    assert rank_order(values[[0, 2, 1, 3]], [0, 1, 1, 2]).tau == 1  # arms expected to be equal are not compared
    assert rank_order(np.ones((3, 4)), [0, 1, 2]).tau == 0


@calibration
def test_the_test_of_an_order_errs_in_5_percent_without_an_effect():
    """Seeds differ more than arms. The discrete p value errs in at most 5 %, and with 15 pairs in almost as many."""
    experiments = 500
    rng = np.random.default_rng(5)
    tables = rng.normal(size=(experiments, 6, 4)) + 10 * rng.normal(size=(experiments, 1, 4))
    rate = np.mean([rank_order(table, range(6), 200, seed=i).p <= 0.05 for i, table in enumerate(tables)])
    assert abs(rate - 0.05) <= 4 * math.sqrt(0.05 * 0.95 / experiments)


def test_orders_without_a_meaning_are_refused():
    with pytest.raises(ValueError, match="expects no order"):
        rank_order(np.ones((2, 3)), [1, 1])
    with pytest.raises(ValueError, match="one finite number for each of the 2 arms"):
        rank_order(np.ones((2, 3)), [1, 2, 3])
    with pytest.raises(ValueError, match="values of shape"):
        rank_order(np.ones(3), [1, 2, 3])
    with pytest.raises(ValueError, match="permutations = 0"):
        rank_order(np.ones((2, 3)), [1, 2], 0)
