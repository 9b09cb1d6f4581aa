"""The laws give the allocations and losses of their papers."""

from __future__ import annotations

import itertools
import math

import pytest

from experiments.study.scaling_laws import BESIROGLU, HOFFMANN, HOFFMANN_ROUNDED, KRAJEWSKI, DenseLaw, total_parameters

CHINCHILLA = 5.76e23  # training FLOPs of Chinchilla and Gopher (Hoffmann et al. 2022, table 3)

# Law, FLOPs, optimal parameters, tokens per parameter: computed from the constants in another program.
ALLOCATIONS = [
    (HOFFMANN_ROUNDED, CHINCHILLA, 3.22e10, 92.7),
    (HOFFMANN, CHINCHILLA, 4.03e10, 59.1),
    (BESIROGLU, CHINCHILLA, 7.22e10, 18.4),
    (HOFFMANN_ROUNDED, 1e18, 8.06e7, 25.7),
    (HOFFMANN, 1e18, 9.46e7, 18.6),
    (BESIROGLU, 1e18, 8.05e7, 25.7),
    (HOFFMANN_ROUNDED, 1e15, 3.6e6, 13),
    (HOFFMANN, 1e15, 4.0e6, 10),
    (BESIROGLU, 1e15, 2.3e6, 31),
]


@pytest.mark.parametrize("law, flops, parameters, ratio", ALLOCATIONS)
def test_optimal_allocations(law: DenseLaw, flops: float, parameters: float, ratio: float):
    found, tokens = law.optimal_parameters(flops), law.optimal_tokens(flops)
    # The last printed digit is rounded.
    assert found == pytest.approx(parameters, rel=0.002 if flops > 1e15 else 0.02)
    assert tokens / found == pytest.approx(ratio, rel=0.002 if flops > 1e15 else 0.03)
    assert 6 * found * tokens == pytest.approx(flops, rel=1e-12)


@pytest.mark.parametrize("law", [HOFFMANN_ROUNDED, HOFFMANN, BESIROGLU])
@pytest.mark.parametrize("flops", [1e15, CHINCHILLA])
def test_the_optimal_allocation_has_the_lowest_loss(law: DenseLaw, flops: float):
    """Along 6 N D = C the slope of the loss in log N is zero, and the loss rises on both sides."""
    best = law.optimal_parameters(flops)
    loss = lambda parameters: law.loss(parameters, flops / 6 / parameters)
    at_best = loss(best)
    for step in (0.01, 0.5):
        assert loss(best * math.exp(step)) > at_best and loss(best * math.exp(-step)) > at_best
    slope = (loss(best * math.exp(1e-3)) - loss(best * math.exp(-1e-3))) / 2e-3
    assert abs(slope) < 1e-6


def test_the_rounding_of_exponents_moves_the_optimum_by_a_quarter():
    """Hoffmann et al. 2022, sec. 3.3: 40 B parameters for the budget of Gopher, by their third approach."""
    exact, rounded = (law.optimal_parameters(CHINCHILLA) for law in (HOFFMANN, HOFFMANN_ROUNDED))
    assert round(exact / 1e9) == 40
    assert exact / rounded == pytest.approx(1.25, abs=0.005)


# Krajewski et al. 2024, table 2: active parameters, tokens, granularity, loss of the compute-optimal networks.
TABLE_2 = [
    (100e6, 4.37e9, 8, 3.133),
    (1e9, 28.94e9, 16, 2.491),
    (3e9, 72.90e9, 16, 2.245),
    (7e9, 137.60e9, 32, 2.076),
    (70e9, 941.07e9, 32, 1.694),
    (1e12, 7.94e12, 64, 1.367),
]


@pytest.mark.parametrize("active, tokens, granularity, loss", TABLE_2)
def test_the_granularity_law_gives_the_losses_of_table_2(active, tokens, granularity, loss):
    """Every loss is 0.011 to 0.024 below the table, because the printed coefficients are rounded, so the tolerance is
    0.03."""
    assert KRAJEWSKI.loss(total_parameters(active, 64), tokens, granularity) == pytest.approx(loss, abs=0.03)


def test_n_counts_all_experts_and_attention():
    """N is 43 times the active parameters for an expansion of 64. With 64 times, the first loss would be 0.09 off."""
    assert total_parameters(1.0, 64) == 43
    active, tokens, granularity, loss = TABLE_2[0]
    assert KRAJEWSKI.loss(64 * active, tokens, granularity) == pytest.approx(3.044, abs=5e-4)
    assert abs(3.044 - loss) > 0.03


def test_the_gain_of_granularity_is_a_power_law():
    """Krajewski et al. 2024, eq. 9: at fixed N and D, log(L - L(infinite granularity)) is linear in log G."""
    limit = KRAJEWSKI.loss(1e9, 1e10, math.inf)
    gains = [math.log(KRAJEWSKI.loss(1e9, 1e10, 2**i) - limit) for i in range(6)]
    slopes = [(b - a) / math.log(2) for a, b in itertools.pairwise(gains)]
    assert slopes == pytest.approx([-0.58] * 5, rel=1e-9)
