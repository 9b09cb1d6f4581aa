"""Fits that studies of scaling and of learning rates need: power laws, parabolas, and losses that saturate.

Parameters N, tokens D and floating-point operations C are counts. Losses are in nats per token, or in any other unit
that all runs share. A fit raises ValueError if its points do not determine it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import optimize

from experiments.study.statistics import Values

Numbers = TypeVar("Numbers", float, np.ndarray)

HUBER_DELTA = 1e-3  # on log losses
# The grid of starts of Hoffmann et al. 2022, section D.3
START_EXPONENTS = (0.0, 0.5, 1.0, 1.5, 2.0)  # alpha and beta
START_LOG_FACTORS = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0)  # log A and log B
START_LOG_E = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x ** exponent, for a number or an array x."""

    coefficient: float
    exponent: float
    r_squared: float  # of log y

    def __call__(self, x: Numbers) -> Numbers:
        return self.coefficient * x**self.exponent


@dataclass(frozen=True)
class Parabola:
    """y = minimum + curvature * (log_x - minimum_at) ** 2."""

    minimum_at: float  # log_x
    minimum: float
    curvature: float
    inside: bool  # the minimum lies between the smallest and the largest log_x


@dataclass(frozen=True)
class Saturating:
    """loss = E + A / N ** alpha + B / D ** beta, for numbers or arrays N and D."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float  # the sum of Huber losses

    def __call__(self, n: Numbers, d: Numbers) -> Numbers:
        return self.E + self.A / n**self.alpha + self.B / d**self.beta


@dataclass(frozen=True)
class Optimum:
    """The model and data of the least loss for a number of operations."""

    n: float  # parameters
    d: float  # tokens
    loss: float


def fit_power_law(x: Values, y: Values) -> PowerLaw:
    """Return the least-squares line through (log x, log y) of positive points [points]."""
    log_x, log_y = _logs("x", x), _logs("y", y)
    _check_lengths(x=log_x, y=log_y)
    if len(np.unique(log_x)) < 2:
        raise ValueError(f"x = {x}: a power law needs at least 2 different values")
    gaps_x, gaps_y = log_x - log_x.mean(), log_y - log_y.mean()
    exponent = float(gaps_x @ gaps_y / (gaps_x @ gaps_x))
    residual, total = float(np.sum((gaps_y - exponent * gaps_x) ** 2)), float(np.sum(gaps_y**2))
    r_squared = 1 - residual / total if np.ptp(log_y) else 1.0
    return PowerLaw(math.exp(log_y.mean() - exponent * log_x.mean()), exponent, r_squared)


def fit_parabola(log_x: Values, y: Values) -> Parabola:
    """Return the least-squares parabola through (log_x, y) [points], which must be convex.

    For the loss of models of several sizes at one number of operations, its minimum is the best size (Hoffmann et al.
    2022, approach 2). Raises ValueError if the parabola has no minimum.
    """
    x, values = _finite("log_x", log_x), _finite("y", y)
    _check_lengths(log_x=x, y=values)
    if len(np.unique(x)) < 3:
        raise ValueError(f"log_x = {log_x}: a parabola needs at least 3 different values")
    middle, half = (x.max() + x.min()) / 2, np.ptp(x) / 2
    constant, slope, curvature = np.polynomial.polynomial.polyfit((x - middle) / half, values, 2)
    if curvature <= 1e-12 * np.abs(values).max():  # below that, rounding decides
        raise ValueError(f"the parabola through y = {y} has curvature {curvature:.3g}: it has no minimum")
    at = -slope / (2 * curvature)
    return Parabola(
        minimum_at=float(middle + half * at),
        minimum=float(constant + slope * at / 2),
        curvature=float(curvature / half**2),
        inside=bool(abs(at) <= 1),
    )


def fit_saturating(n: Values, d: Values, loss: Values, start: Saturating | None = None) -> Saturating:
    """Return the fit of E + A / N^alpha + B / D^beta to the final losses of runs [runs] (Hoffmann et al. 2022,
    approach 3).

    It minimises the sum of Huber losses (delta 1e-3) of log losses over log E, log A, log B, alpha and beta. The paper
    starts L-BFGS from each of 4,500 points of a grid. This function starts from the best of them for each pair of
    exponents, 25 in all, and takes log N and log D relative to their means, which has the same minimum and converges
    better. It uses BFGS, because L-BFGS saves nothing with 5 constants, and sums, because means stop the search early
    (Besiroglu et al. 2024). `start` replaces the grid by one point, which suits the bootstrap.

    Raises ValueError if fewer than 5 different runs, 2 values of N or 2 values of D are given.
    """
    log_n, log_d, log_loss = _logs("n", n), _logs("d", d), _logs("loss", loss)
    _check_lengths(n=log_n, d=log_d, loss=log_loss)
    if len({*zip(log_n, log_d, strict=True)}) < 5 or len({*log_n}) < 2 or len({*log_d}) < 2:
        raise ValueError("the fit has 5 constants: it needs runs with 5 different (N, D), and several N and D")
    mean_n, mean_d = float(log_n.mean()), float(log_d.mean())
    data = (log_n - mean_n, log_d - mean_d, log_loss)
    if start is None:
        points = [
            _best_start(alpha, beta, mean_n, mean_d, data) for alpha in START_EXPONENTS for beta in START_EXPONENTS
        ]
    else:
        points = [_point(start, mean_n, mean_d)]
    options = {"maxiter": 1000, "gtol": 1e-6}
    results = [
        optimize.minimize(_objective, point, args=data, jac=True, method="BFGS", options=options) for point in points
    ]
    best = min(results, key=lambda result: result.fun)
    a, b, e, alpha, beta = (float(value) for value in best.x)
    log_a, log_b = a + alpha * mean_n, b + beta * mean_d
    if not max(abs(log_a), abs(log_b), abs(e)) < 700:
        raise ValueError(f"the fit diverges: log A = {log_a:.3g}, log B = {log_b:.3g}, log E = {e:.3g}. Use more runs")
    objective = float(best.fun) * HUBER_DELTA**2
    return Saturating(math.exp(e), math.exp(log_a), math.exp(log_b), alpha, beta, objective)


def compute_optimal(fit: Saturating, flops: float) -> Optimum:
    """Return the N and D of the least loss with 6 N D = `flops` (Hoffmann et al. 2022, equation 4)."""
    if not 0 < flops < math.inf:
        raise ValueError(f"flops = {flops}: use a number above 0")
    if not min(fit.A, fit.B, fit.alpha, fit.beta) > 0:
        raise ValueError(f"{fit} has no optimum: A, B, alpha and beta must be above 0")
    total = fit.alpha + fit.beta
    balance = (fit.alpha * fit.A / (fit.beta * fit.B)) ** (1 / total)
    n = balance * (flops / 6) ** (fit.beta / total)
    d = flops / 6 / n
    return Optimum(n, d, fit(n, d))


def lr_sensitivity(losses: Values, initial_loss: float) -> float:
    """Return the mean over learning rates of min(loss, initial_loss), minus the least loss (Wortsman et al. 2023).

    `losses` [rates] has the final loss of each learning rate, NaN or infinity where training diverged. Both are in the
    unit of the result. Raises ValueError if no rate reduces the loss, because the result would be 0, its best value.
    """
    found = np.asarray(losses, np.float64)
    if found.ndim != 1 or not math.isfinite(initial_loss):
        raise ValueError(
            f"losses = {losses}, initial_loss = {initial_loss}: use a loss for each rate, and a finite one"
        )
    limited = np.where(found < initial_loss, found, initial_loss)
    if not len(found) or limited.min() == initial_loss:
        raise ValueError(f"losses = {losses}: no rate reaches a loss below the initial one, {initial_loss:g}")
    return float(limited.mean() - limited.min())


# ---- parts ----


def _objective(
    point: np.ndarray, log_n: np.ndarray, log_d: np.ndarray, log_loss: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the sum of Huber losses in units of delta squared, and its gradient at [a, b, e, alpha, beta]."""
    a, b, e, alpha, beta = point
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    total = np.logaddexp.reduce(terms)
    error = total - log_loss
    shares = np.exp(terms - total) * np.clip(error, -HUBER_DELTA, HUBER_DELTA) / HUBER_DELTA**2
    by_a, by_b, by_e = shares.sum(axis=1)
    return float(_huber(error).sum()), np.array([by_a, by_b, by_e, -shares[0] @ log_n, -shares[1] @ log_d])


def _huber(error: np.ndarray) -> np.ndarray:
    """Return the Huber loss of each error, in units of delta squared."""
    size = np.abs(error) / HUBER_DELTA
    return np.where(size <= 1, size**2 / 2, size - 0.5)


def _point(fit: Saturating, mean_n: float, mean_d: float) -> np.ndarray:
    """Return the point [a, b, e, alpha, beta] of a fit, for logarithms relative to these means."""
    a, b = math.log(fit.A) - fit.alpha * mean_n, math.log(fit.B) - fit.beta * mean_d
    return np.array([a, b, math.log(fit.E), fit.alpha, fit.beta])


def _best_start(
    alpha: float, beta: float, mean_n: float, mean_d: float, data: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return the point [a, b, e, alpha, beta] of the grid with the least objective for these exponents."""
    log_n, log_d, log_loss = data
    a, b, e = (
        axis.reshape(-1, 1)
        for axis in np.meshgrid(
            np.array(START_LOG_FACTORS) - alpha * mean_n,
            np.array(START_LOG_FACTORS) - beta * mean_d,
            np.array(START_LOG_E),
        )
    )
    total = np.logaddexp(np.logaddexp(a - alpha * log_n, b - beta * log_d), e)
    best = int(np.argmin(_huber(total - log_loss).sum(axis=1)))
    return np.array([a[best, 0], b[best, 0], e[best, 0], alpha, beta])


def _finite(name: str, values: Values) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"{name} = {values}: use a sequence of finite numbers")
    return found


def _logs(name: str, values: Values) -> np.ndarray:
    found = _finite(name, values)
    if not (found > 0).all():
        raise ValueError(f"{name} = {values}: use numbers above 0")
    return np.log(found)


def _check_lengths(**arrays: np.ndarray) -> None:
    if len({len(values) for values in arrays.values()}) > 1:
        raise ValueError(f"lengths differ: {', '.join(f'{name} has {len(a)}' for name, a in arrays.items())}")
