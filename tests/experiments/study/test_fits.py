"""Fits recover known constants, published optima follow from published constants, and open fits are refused."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy import optimize

from experiments.study import fits
from experiments.study.fits import Saturating, compute_optimal, fit_parabola, fit_power_law, fit_saturating
from experiments.study.resampling import bootstrap
from tests.closeness import assert_close
from tests.experiments.study.test_statistics import calibration

ROUNDED = Saturating(1.69, 406.4, 410.7, 0.34, 0.28, 0.0)  # Hoffmann et al. 2022, section 3.3
PRECISE = Saturating(1.69, 406.4, 410.7, 0.3392, 0.2849, 0.0)  # the exponents of its TeX source
REFIT = Saturating(1.8172, 482.01, 2085.43, 0.3478, 0.3658, 0.0)  # Besiroglu et al. 2024


def grid(points: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return N and D of points^2 runs: 1e6 to 1e10 parameters and 1e8 to 1e12 tokens."""
    n, d = np.meshgrid(np.logspace(6, 10, points), np.logspace(8, 12, points))
    return n.ravel(), d.ravel()


def constants(fit: Saturating) -> np.ndarray:
    """Return what is fitted: log E, log A, log B, alpha, beta."""
    return np.array([math.log(fit.E), math.log(fit.A), math.log(fit.B), fit.alpha, fit.beta])


# ---- power law and parabola ----


def test_a_power_law_is_recovered():
    x = np.logspace(4, 9, 7)
    found = fit_power_law(x, 8.8 * x**-0.076)
    assert_close([found.coefficient, found.exponent, found.r_squared], [8.8, -0.076, 1.0], 1e-10)
    assert found(1e6) == pytest.approx(8.8 * 1e6**-0.076)
    noisy = 8.8 * x**-0.076 * np.exp(np.random.default_rng(0).normal(0, 0.1, 7))
    found = fit_power_law(x, noisy)
    slope, _ = np.polyfit(np.log(x), np.log(noisy), 1)
    assert found.exponent == pytest.approx(slope)
    assert found.r_squared == pytest.approx(np.corrcoef(np.log(x), np.log(noisy))[0, 1] ** 2)
    assert fit_power_law([1, 2], [3, 3]).exponent == 0 and fit_power_law([1, 2], [3, 3]).r_squared == 1


def test_a_parabola_is_recovered_with_its_minimum_inside_or_outside():
    x = np.linspace(10, 14, 6)
    found = fit_parabola(x, 3.2 + 0.05 * (x - 12.3) ** 2)
    assert_close([found.minimum_at, found.minimum, found.curvature], [12.3, 3.2, 0.05], 1e-9)
    assert found.inside
    outside = fit_parabola(x, 3.2 + 0.05 * (x - 15.0) ** 2)
    assert not outside.inside and outside.minimum_at == pytest.approx(15.0)


def test_curves_without_a_minimum_are_refused():
    x = np.linspace(10, 14, 6)
    for y in (3 - 0.1 * (x - 12) ** 2, 3 - 0.1 * x, np.full(6, 2.5)):
        with pytest.raises(ValueError, match="it has no minimum"):
            fit_parabola(x, y)
    with pytest.raises(ValueError, match="at least 3 different values"):
        fit_parabola([1, 1, 2, 2], [1, 1, 2, 3])


def test_points_that_are_not_numbers_above_0_are_refused():
    with pytest.raises(ValueError, match=r"x = \[0, 1\]: use numbers above 0"):
        fit_power_law([0, 1], [1, 2])
    with pytest.raises(ValueError, match="at least 2 different values"):
        fit_power_law([2, 2], [1, 2])
    with pytest.raises(ValueError, match="lengths differ: x has 2, y has 3"):
        fit_power_law([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"loss = .*finite"):
        fit_saturating([1, 2], [1, 2], [1, math.nan])


# ---- Chinchilla, approach 3 ----


@pytest.mark.parametrize("truth", [ROUNDED, REFIT])
def test_the_constants_are_recovered_from_losses_without_noise(truth):
    n, d = grid()
    found = fit_saturating(n, d, truth(n, d))
    assert_close(constants(found), constants(truth), 1e-5)
    assert found.objective < 1e-12


@calibration
def test_the_constants_are_recovered_from_losses_with_noise():
    """With noise of 1 %, ten times the delta of Huber, the estimate is nearly that of least absolute errors, whose
    covariance for normal noise is pi / 2 times that of least squares."""
    n, d = grid(16)
    rng = np.random.default_rng(1)
    found = fit_saturating(n, d, ROUNDED(n, d) * np.exp(rng.normal(0, 0.01, n.shape)))
    shares = np.stack([np.full_like(n, ROUNDED.E), ROUNDED.A / n**0.34, ROUNDED.B / d**0.28]) / ROUNDED(n, d)
    jacobian = np.stack([*shares, -shares[1] * np.log(n), -shares[2] * np.log(d)])
    deviations = np.sqrt(np.diag(np.pi / 2 * 0.01**2 * np.linalg.inv(jacobian @ jacobian.T)))
    assert (np.abs(constants(found) - constants(ROUNDED)) < 4 * deviations).all()
    assert deviations[3:].max() < 0.02  # so that the check means something
    assert abs(found(1e9, 2e10) / ROUNDED(1e9, 2e10) - 1) < 0.005


def test_outliers_barely_move_the_fit():
    n, d = grid()
    loss = ROUNDED(n, d)
    loss[[5, 30]] *= 1.5
    assert_close(constants(fit_saturating(n, d, loss)), constants(ROUNDED), 1e-2)


def test_the_objective_is_the_sum_of_huber_losses_of_log_losses():
    n, d = grid(5)
    loss = ROUNDED(n, d) * np.exp(np.random.default_rng(4).normal(0, 0.001, n.shape))
    found = fit_saturating(n, d, loss)
    error = np.abs(np.log(found(n, d)) - np.log(loss))
    by_hand = sum(e**2 / 2 if e <= 1e-3 else 1e-3 * (e - 0.5e-3) for e in error)
    assert found.objective == pytest.approx(by_hand, rel=1e-6)
    mean_n, mean_d = np.log(n).mean(), np.log(d).mean()
    point = fits._point(found, mean_n, mean_d)
    assert fits._objective(point, np.log(n) - mean_n, np.log(d) - mean_d, np.log(loss))[0] * 1e-6 == pytest.approx(
        by_hand, rel=1e-6
    )


def test_a_start_is_the_best_point_of_the_grid_for_its_exponents():
    n, d = grid(3)
    mean_n, mean_d = float(np.log(n).mean()), float(np.log(d).mean())
    data = (np.log(n) - mean_n, np.log(d) - mean_d, np.log(REFIT(n, d)))
    objectives = [
        fits._objective(fits._point(Saturating(*np.exp([e, a, b]), 0.5, 0.0, 0.0), mean_n, mean_d), *data)[0]
        for e, a, b in product(fits.START_LOG_E, fits.START_LOG_FACTORS, fits.START_LOG_FACTORS)
    ]
    start = fits._best_start(0.5, 0.0, mean_n, mean_d, data)
    assert tuple(start[3:]) == (0.5, 0.0)
    assert fits._objective(start, *data)[0] == pytest.approx(min(objectives))


def test_the_gradient_of_the_objective_is_that_of_finite_differences():
    n, d = grid(4)
    data = (np.log(n) - np.log(n).mean(), np.log(d) - np.log(d).mean(), np.log(ROUNDED(n, d)))
    for point in (np.array([0.1, -0.2, 0.4, 0.3, 0.5]), np.array([-1.0, -1.2, 0.52, 0.34, 0.28])):
        numeric = optimize.approx_fprime(point, lambda p: fits._objective(p, *data)[0], 1e-7)
        assert_close(fits._objective(point, *data)[1], numeric, 1e-4)


@calibration
def test_25_starts_reach_the_minimum_of_the_whole_grid():
    """From 20 random points of the paper's grid, the search reaches no lower objective."""
    n, d = grid(5)
    rng = np.random.default_rng(2)
    loss = REFIT(n, d) * np.exp(rng.normal(0, 0.02, n.shape))
    found = fit_saturating(n, d, loss)
    for _ in range(20):
        e, alpha, beta = rng.choice(fits.START_LOG_E), *rng.choice(fits.START_EXPONENTS, 2)
        a, b = rng.choice(fits.START_LOG_FACTORS, 2)
        start = Saturating(math.exp(e), math.exp(a), math.exp(b), alpha, beta, 0.0)
        try:
            other = fit_saturating(n, d, loss, start)
        except ValueError:  # diverged
            continue
        assert found.objective <= other.objective * (1 + 1e-6)


@calibration
def test_a_start_serves_the_bootstrap():
    n, d = grid(5)
    loss = ROUNDED(n, d) * np.exp(np.random.default_rng(3).normal(0, 0.002, n.shape))
    whole = fit_saturating(n, d, loss)

    def exponent(runs: np.ndarray) -> float:
        fit = fit_saturating(*runs.T, start=whole)
        return fit.beta / (fit.alpha + fit.beta)

    found = bootstrap(exponent, np.stack([n, d, loss], axis=1), 40)
    assert found.low < 0.28 / 0.62 < found.high and found.failed == 0
    assert found.estimate == pytest.approx(whole.beta / (whole.alpha + whole.beta), rel=1e-3)


def test_runs_that_leave_constants_open_are_refused():
    n, d = grid(5)
    with pytest.raises(ValueError, match="5 constants"):
        fit_saturating(n[:4], d[:4], [2.0, 2.1, 2.2, 2.3])
    with pytest.raises(ValueError, match="several N and D"):
        fit_saturating([1e6] * 25, d, ROUNDED(n, d))


@pytest.mark.parametrize(
    ("fit", "n", "ratio"), [(ROUNDED, "3.22e+10", 92.6), (PRECISE, "4.03e+10", 59.1), (REFIT, "7.22e+10", 18.4)]
)
def test_the_optimum_at_gophers_budget(fit, n, ratio):
    """At 5.76e23 operations, three published sets of constants have these optima; the paper says 40 billion."""
    found = compute_optimal(fit, 5.76e23)
    assert f"{found.n:.2e}" == n and round(found.d / found.n, 1) == ratio
    assert 6 * found.n * found.d == pytest.approx(5.76e23)


def test_the_optimum_is_the_least_loss_of_all_sizes_at_its_budget():
    found = compute_optimal(ROUNDED, 1e20)
    n = found.n * np.exp(np.linspace(-1, 1, 201))
    losses = ROUNDED(n, 1e20 / 6 / n)
    assert np.argmin(losses) == 100 and found.loss == losses[100]
    parabola = fit_parabola(np.log(n[90:111]), losses[90:111])
    assert parabola.minimum_at == pytest.approx(math.log(found.n), abs=1e-2) and parabola.inside


def test_a_fit_without_an_optimum_is_refused():
    with pytest.raises(ValueError, match="has no optimum"):
        compute_optimal(Saturating(1.0, 1.0, 1.0, -0.1, 0.3, 0.0), 1e20)
    with pytest.raises(ValueError, match="flops = 0"):
        compute_optimal(ROUNDED, 0)


# ---- learning rates ----


def test_sensitivity_to_the_learning_rate():
    assert fits.lr_sensitivity([3.0, 2.0, 2.5], 10.0) == pytest.approx(0.5)
    assert fits.lr_sensitivity([2.0, 2.0], 10.0) == 0
    assert fits.lr_sensitivity([2.0, 15.0], 10.0) == pytest.approx(4.0)  # no loss counts more than the initial one
    assert (
        fits.lr_sensitivity([2.0, math.nan], 10.0) == fits.lr_sensitivity([2.0, math.inf], 10.0) == pytest.approx(4.0)
    )
    for losses in ([11.0, math.nan], []):
        with pytest.raises(ValueError, match="no rate reaches a loss below the initial one"):
            fits.lr_sensitivity(losses, 10.0)
    with pytest.raises(ValueError, match="initial_loss = nan"):
        fits.lr_sensitivity([2.0, 3.0], math.nan)
