"""Tests of differences agree with scipy.stats and textbooks, and keep their error rates on data with a known truth.

The calibration tests make 2,000 experiments with a fixed seed. A rate may differ from the stated one by four standard
deviations of a binomial. `calibration` disables the checks of annotations, which take several times as long as what
these tests repeat.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from experiments.study.power import detectable_effect, half_width, power, seeds_needed
from experiments.study.statistics import (
    equivalence,
    holm,
    noninferiority,
    p_above,
    p_below,
    paired,
    unpaired,
    variance_components,
)
from tests.closeness import assert_close

EXPERIMENTS = 2000
calibration = pytest.mark.unchecked
# Student's sleep data, hours gained with two drugs (Student 1908): t = 4.0621, 9 degrees of freedom, p = 0.00283
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def experiments(seed: int, n: int = 5, effect: float = 0.0, sd: float = 1.0):
    """Return EXPERIMENTS pairs (baseline [n], arm [n]) whose differences are normal with mean `effect` and deviation
    `sd`. Values of one seed share a term that is larger than their difference."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(3, 5, (EXPERIMENTS, n))
    noise = rng.normal(0, sd / math.sqrt(2), (2, EXPERIMENTS, n))
    return list(zip(shared + noise[0], shared + noise[1] + effect, strict=True))


def assert_rate(found: int, rate: float) -> None:
    assert abs(found / EXPERIMENTS - rate) <= 4 * math.sqrt(rate * (1 - rate) / EXPERIMENTS)


# ---- paired and unpaired ----


def test_paired_gives_the_published_numbers_of_students_sleep_data():
    found = paired(FIRST, SECOND)
    assert found.n == 10 and round(found.mean, 2) == 1.58 and round(found.p, 5) == 0.00283
    assert (round(found.low, 4), round(found.high, 4)) == (0.7001, 2.4599)
    assert round(found.cohen_dz * math.sqrt(10), 4) == 4.0621


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_paired_agrees_with_scipy(confidence):
    for baseline, arm in experiments(0, n=7, effect=0.5)[:20]:
        found, reference = paired(baseline, arm, confidence), stats.ttest_rel(arm, baseline)
        interval = reference.confidence_interval(confidence)
        assert_close([found.p, found.low, found.high], [reference.pvalue, *interval], 1e-9, scale=1)
        assert_close(found.cohen_dz, found.mean / np.std(arm - baseline, ddof=1), 1e-9)
        assert found.sd == pytest.approx(np.std(arm - baseline, ddof=1))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.999])
def test_unpaired_agrees_with_welch_of_scipy(confidence):
    rng = np.random.default_rng(1)
    for sizes in ((5, 5), (3, 8), (9, 2)):
        baseline, arm = rng.normal(0, 1, sizes[0]), rng.normal(0.5, 4, sizes[1])
        found, reference = unpaired(baseline, arm, confidence), stats.ttest_ind(arm, baseline, equal_var=False)
        interval = reference.confidence_interval(confidence)
        assert_close([found.p, found.low, found.high], [reference.pvalue, *interval], 1e-9)
        assert found.n == min(sizes) and found.sd == pytest.approx(math.hypot(baseline.std(ddof=1), arm.std(ddof=1)))
        assert found.cohen_dz == pytest.approx(found.mean / found.sd)


@pytest.mark.parametrize("test", [paired, unpaired])
def test_results_without_spread_have_no_nan(test):
    same, constant = test([2.0, 2.0, 2.0], [2.0, 2.0, 2.0]), test([1.7, 1.7, 1.7], [1.6, 1.6, 1.6])
    assert (same.p, same.mean, same.low, same.high, same.sd, same.cohen_dz) == (1, 0, 0, 0, 0, 0)
    assert constant.p == 0 and constant.low == constant.mean == constant.high < 0 == constant.sd
    assert constant.cohen_dz == -math.inf


def test_equal_differences_of_unequal_runs_have_p_0():
    found = paired([1.0, 2.0, 4.0], [1.5, 2.5, 4.5])
    assert (found.mean, found.sd, found.p, found.low, found.high) == (0.5, 0, 0, 0.5, 0.5)


@pytest.mark.parametrize(
    "test", [paired, unpaired, lambda a, b: noninferiority(a, b, 0.1), lambda a, b: equivalence(a, b, 0.1)]
)
def test_values_that_allow_no_test_are_refused(test):
    with pytest.raises(ValueError, match=r"n = 1: a test needs at least 2 seeds. Run more seeds"):
        test([1.0], [2.0])
    with pytest.raises(ValueError, match=r"arm = .*not finite.*diverged"):
        test([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(ValueError, match="baseline has shape"):
        test(np.ones((2, 2)), [1.0, 1.0])
    if test is not unpaired:
        with pytest.raises(ValueError, match=r"baseline has 2 values and arm has 3: .*same seeds"):
            test([1.0, 2.0], [1.0, 2.0, 3.0])
    if test in (paired, unpaired):
        with pytest.raises(ValueError, match=r"confidence = 95: use a number above 0 and below 1"):
            test([1.0, 2.0], [1.0, 3.0], 95)


@calibration
def test_paired_and_its_interval_err_in_5_percent_without_an_effect():
    found = [paired(*pair) for pair in experiments(2)]
    assert_rate(sum(each.p <= 0.05 for each in found), 0.05)
    assert_rate(sum(each.low > 0 or each.high < 0 for each in found), 0.05)
    shifted = [paired(*pair) for pair in experiments(3, effect=0.7)]
    assert_rate(sum(not each.low <= 0.7 <= each.high for each in shifted), 0.05)


@calibration
def test_unpaired_errs_in_5_percent_without_an_effect():
    rng = np.random.default_rng(4)
    groups = zip(rng.normal(0, 1, (EXPERIMENTS, 8)), rng.normal(0, 1, (EXPERIMENTS, 8)), strict=True)
    assert_rate(sum(unpaired(*pair).p <= 0.05 for pair in groups), 0.05)


# ---- several tests ----


def test_holm_gives_textbook_numbers_in_the_given_order():
    assert_close(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02], 1e-12)  # R: p.adjust(p, "holm")
    assert_close(holm([0.9, 0.5, 0.8]), [1.0, 1.0, 1.0], 1e-12)
    assert holm([]).shape == (0,) and holm([0.3]) == [0.3]
    with pytest.raises(ValueError, match=r"numbers in \[0, 1\]"):
        holm([0.1, math.nan])


def test_holm_rejects_as_its_definition_says():
    rng = np.random.default_rng(5)
    for p in rng.uniform(0, 0.1, (50, 6)):
        rejected, order = set(), np.argsort(p)
        for step, test in enumerate(order):
            if p[test] > 0.05 / (6 - step):
                break
            rejected.add(int(test))
        assert {i for i, value in enumerate(holm(p)) if value <= 0.05} == rejected


@calibration
def test_holm_keeps_the_family_wise_error_rate():
    """4 independent tests without an effect err in 1 - (1 - 0.05 / 4)^4, and arms that share a baseline in at most
    5 %."""
    rng = np.random.default_rng(6)
    independent = np.array([paired(*pair).p for seed in range(4) for pair in experiments(100 + seed)]).reshape(4, -1).T
    assert_rate(sum(holm(p).min() <= 0.05 for p in independent), 1 - (1 - 0.05 / 4) ** 4)
    runs = rng.normal(size=(EXPERIMENTS, 5, 5))
    errors = sum(holm([paired(arms[0], arm).p for arm in arms[1:]]).min() <= 0.05 for arms in runs)
    assert errors / EXPERIMENTS <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)


# ---- equivalence and noninferiority ----


def test_one_sided_p_values_agree_with_scipy():
    for baseline, arm in experiments(7, effect=0.3)[:20]:
        found = paired(baseline, arm)
        for bound in (-0.4, 0.0, 0.7):
            above = stats.ttest_rel(arm, baseline + bound, alternative="greater").pvalue
            assert_close([p_above(found, bound), p_below(found, bound)], [above, 1 - above], 1e-9)


def test_equivalence_is_two_one_sided_tests_and_an_interval():
    for baseline, arm in experiments(8, n=6, effect=0.4, sd=0.5)[:200]:
        found, interval = equivalence(baseline, arm, 0.8), paired(baseline, arm, 0.9)
        one_sided = [
            stats.ttest_rel(arm, baseline - 0.8, alternative="greater").pvalue,
            stats.ttest_rel(arm, baseline + 0.8, alternative="less").pvalue,
        ]
        assert_close(found.p, max(one_sided), 1e-9)
        assert_close([found.low, found.high], [interval.low, interval.high], 1e-9)
        assert found.equivalent == (found.p <= 0.05) == (-0.8 < found.low and found.high < 0.8)


def test_equivalence_without_spread():
    assert equivalence([1.0, 2.0], [1.5, 2.5], 0.6).equivalent
    at_margin = equivalence([1.0, 2.0], [1.5, 2.5], 0.5)
    assert not at_margin.equivalent and at_margin.p == 1
    with pytest.raises(ValueError, match=r"margin = 0: .*above 0"):
        equivalence([1.0, 2.0], [1.0, 2.0], 0)


@calibration
@pytest.mark.parametrize("side", [-1, 1])
def test_equivalence_errs_in_5_percent_at_the_margin(side):
    found = [equivalence(*pair, margin=10.0) for pair in experiments(9, effect=side * 10.0)]
    assert_rate(sum(each.equivalent for each in found), 0.05)


@calibration
def test_noninferiority_errs_in_5_percent_at_the_margin_and_accepts_improvements():
    found = [noninferiority(*pair, margin=0.5) for pair in experiments(10, effect=0.5)]
    assert_rate(sum(each.noninferior for each in found), 0.05)
    assert_rate(sum(each.high < 0.5 for each in found), 0.05)
    better = [noninferiority(*pair, margin=0.5) for pair in experiments(11, effect=-3.0)]
    assert sum(each.noninferior for each in better) / EXPERIMENTS > 0.99
    with pytest.raises(ValueError, match="margin = -1"):
        noninferiority([1.0, 2.0], [1.0, 3.0], -1)


# ---- power ----


def test_half_width_is_that_of_the_table_of_t():
    for n, factor in ((3, 2.48), (5, 1.24), (8, 0.84)):
        assert round(half_width(1.0, n), 2) == factor  # 4.303 / sqrt(3), 2.776 / sqrt(5), 2.365 / sqrt(8)
    found = paired(FIRST, SECOND)
    assert half_width(found.sd, 10) == pytest.approx((found.high - found.low) / 2)
    assert half_width(3.0, 5, 0.99) == pytest.approx(3 * 4.604095 / math.sqrt(5), rel=1e-6)


def test_detectable_effect_agrees_with_the_noncentral_t_distribution():
    assert round(detectable_effect(1.0, 5), 2) == 1.68
    assert seeds_needed(1.0, 0.5) == 34 and seeds_needed(1.0, 0.8) == 15  # G*Power 3.1, paired t test
    for n in (3, 5, 8, 20):
        for alpha in (0.2, 0.05, 0.01):
            effect = detectable_effect(2.0, n, 0.8, alpha)
            noncentral = stats.nct(n - 1, effect / 2 * math.sqrt(n))
            critical = stats.t.isf(alpha / 2, n - 1)
            other = 0 if alpha == 0.01 else noncentral.cdf(-critical)  # below 1e-6; SciPy has NaN for some
            assert noncentral.sf(critical) + other == pytest.approx(0.8, abs=1e-6)
            assert power(2.0, n, effect, alpha) == pytest.approx(power(2.0, n, -effect, alpha)) == pytest.approx(0.8)


def test_power_is_finite_for_small_n_and_strict_levels():
    """By its definition: the probability, averaged over the sample mean, that the sample deviation is small enough."""
    z = np.linspace(-10, 10, 20001)
    weights = stats.norm.pdf(z) * (z[1] - z[0])
    for n in (2, 3, 5):
        for alpha in (0.05, 0.005, 0.0005):
            effect = detectable_effect(1.0, n, 0.9, alpha)
            critical = stats.t.isf(alpha / 2, n - 1)
            chi2 = (n - 1) * (z + effect * math.sqrt(n)) ** 2 / critical**2
            assert np.sum(weights * stats.chi2.cdf(chi2, n - 1)) == pytest.approx(0.9, abs=1e-6)


@calibration
def test_power_at_the_detectable_effect_is_80_percent():
    effect = detectable_effect(1.0, 5)
    assert_rate(sum(paired(*pair).p <= 0.05 for pair in experiments(12, effect=effect)), 0.8)


def test_seeds_needed_is_the_least_number_that_suffices():
    for sd, effect, wanted in (
        (0.005, 0.01, 0.8),
        (1.0, 0.1, 0.9),
        (1.0, 9.0, 0.8),
        (0.2, 0.4, 0.99),
        (1.0, 0.02, 0.06),
    ):
        n = seeds_needed(sd, effect, wanted)
        assert detectable_effect(sd, n, wanted) <= effect
        assert n == 2 or detectable_effect(sd, n - 1, wanted) > effect
    assert seeds_needed(0.0, 0.1) == 2


def test_power_without_spread_and_wrong_arguments():
    assert power(0.0, 3, 0.1) == 1 and power(0.0, 3, 0.0) == 0 and detectable_effect(0.0, 3) == 0
    assert power(1.0, 6, 0.0) == pytest.approx(0.05)
    for wrong in (dict(n=1), dict(sd=-1.0), dict(power=0.04), dict(power=1.0), dict(alpha=0.0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
            detectable_effect(**{"sd": 1.0, "n": 5, **wrong})
    with pytest.raises(ValueError, match=r"effect = 0\.0: use a difference above 0"):
        seeds_needed(1.0, 0.0)
    with pytest.raises(ValueError, match="more than a million seeds"):
        seeds_needed(1.0, 1e-5)


# ---- variance components ----


def test_variance_components_of_a_worked_table():
    """Mean squares: arms 16, seeds 4, residual 0.25; for 2 arms and 3 seeds."""
    arms, seeds, rest = np.array([[-1.0], [1.0]]), np.array([[-1.0, 0.0, 1.0]]), np.array([[1, -2, 1], [-1, 2, -1]])
    values = 5 + arms * math.sqrt(16 / 6) + seeds * math.sqrt(4 / 2) + rest * math.sqrt(0.5 / 12)
    found = variance_components(values)
    assert_close([found.arm, found.seed, found.residual], [(16 - 0.25) / 3, (4 - 0.25) / 2, 0.25], 1e-12)
    assert_close([found.paired_sd, found.unpaired_sd], [math.sqrt(0.5), math.sqrt(2 * (1.875 + 0.25))], 1e-12)


def test_variance_components_recover_a_simulation():
    rng = np.random.default_rng(13)
    arms, seeds = 300, 300
    values = rng.normal(0, 3, (arms, 1)) + rng.normal(0, 2, (1, seeds)) + rng.normal(0, 1, (arms, seeds))
    found = variance_components(values)
    for estimate, truth, n in ((found.arm, 9, arms), (found.seed, 4, seeds), (found.residual, 1, arms * seeds)):
        assert abs(estimate / truth - 1) < 4 * math.sqrt(2 / n)
    differences = values[0] - values[1]
    assert abs(found.paired_sd / differences.std(ddof=1) - 1) < 4 / math.sqrt(2 * seeds)


def test_negative_variances_are_0_and_too_few_values_are_refused():
    found = variance_components(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    assert (found.arm, found.seed, found.residual) == (0, 0, 4)
    for values in (np.ones((1, 5)), np.ones((5, 1)), np.ones(5), np.array([[1.0, math.inf], [1.0, 2.0]])):
        with pytest.raises(ValueError, match="at least 2 of each"):
            variance_components(values)
