"""The quantities of studies in experiments/studies find what synthetic results hide."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest

from experiments.studies import isoflop, mup_coordinates, mup_transfer, noise_floor, qk_norm_rates
from experiments.study.definition import Study
from experiments.study.launch import load_study, trial_flops
from experiments.study.records import Table
from experiments.study.trials import Outcome


def recorded(study: Study, seeds: int, figures: Callable[[str, int], Mapping[str, float]]) -> Table:
    """Return a table whose trials have the figures of `figures(arm, seed)`."""
    outcomes = [
        Outcome(arm, seed, "compare", f"{arm}{seed}", {}, figures(arm, seed), {}, {}, False, 1.0)
        for seed in range(seeds) for arm in study.experiments("cpu")
    ]  # fmt: skip
    return Table({}, tuple(outcomes))


@pytest.mark.parametrize("name", [
    "balance_coefficient", "expert_capacity", "expert_choice_leak", "granularity", "loss_free_balancing", "moe_ladder",
    "router_stability", "routers",
])  # fmt: skip
def test_the_experts_of_a_token_are_as_wide_as_the_mlp_at_every_scale(name):
    study = load_study(name)
    for scale in study.scales:
        for arm, experiment in study.experiments(scale).items():
            moe = experiment.model.moe
            if moe is not None and moe.router != "dense":
                assert (moe.top_k + moe.shared_experts) * moe.hidden_dim == experiment.model.mlp.hidden_dim, (
                    scale,
                    arm,
                )


def test_equal_flops_find_the_law_that_made_the_losses():
    alpha, beta = 0.4, 0.35
    tokens = {
        arm: experiment.train.steps * experiment.data.batch_size * experiment.data.sequence_length
        for arm, experiment in isoflop.STUDY.experiments("cpu").items()
    }

    def figures(arm: str, seed: int) -> dict[str, float]:
        n = isoflop.parameters(int(arm.rpartition(" ")[2]))
        return {"tokens": tokens[arm], "loss": 1.5 + 60 / n**alpha + 150 / tokens[arm] ** beta}

    table = recorded(isoflop.STUDY, 2, figures)
    without, with_head = isoflop.exponents(isoflop.runs_of(table))
    assert without == pytest.approx(beta / (alpha + beta), abs=0.01)
    assert 0.4 < with_head < without  # counting the head favours large networks, the more so the smaller the budget
    assert 0.2 < isoflop.exponent(table.of_seed(0)) < 0.9


def test_equal_flops_cost_equal_flops():
    budgets: dict[str, set[float]] = {}
    for arm, experiment in isoflop.STUDY.experiments("cpu").items():
        budgets.setdefault(arm.partition(",")[0], set()).add(trial_flops(experiment))
    for budget, (factor, _) in isoflop.BUDGETS.items():
        np.testing.assert_allclose(list(budgets[budget]), factor * isoflop.LEAST_FLOPS, rtol=0.02)


def test_the_best_rate_of_parabolas_is_their_minimum():
    best = {"standard, 32": -6.0, "standard, 128": -8.0, "muP, 32": -6.5, "muP, 128": -6.3}

    def figures(arm: str, seed: int) -> dict[str, float]:
        network, _, rate = arm.rpartition(", ")
        return {"bits_per_byte": 2 + 0.1 * (math.log2(float(rate)) - best[network]) ** 2}

    seed = recorded(mup_transfer.STUDY, 1, figures).of_seed(0)
    assert mup_transfer.shift("standard")(seed) == pytest.approx(-2.0, abs=1e-2)
    assert mup_transfer.shift("muP")(seed) == pytest.approx(0.2, abs=1e-2)


def test_slopes_are_exponents_of_the_width():
    def figures(arm: str, seed: int) -> dict[str, float]:
        parametrization, _, width = arm.partition(", ")
        return {"logits_change": 3 * int(width) ** (0.8 if parametrization == "standard" else 0.0)}

    seed = recorded(mup_coordinates.STUDY, 1, figures).of_seed(0)
    assert mup_coordinates.slope("standard", "logits_change")(seed) == pytest.approx(0.8)
    assert mup_coordinates.slope("muP", "logits_change")(seed) == pytest.approx(0.0, abs=1e-9)


def test_sensitivity_counts_a_diverged_rate_as_uniform_predictions():
    def figures(arm: str, seed: int) -> dict[str, float]:
        return {"loss": 99.0 if arm.startswith("plain, 0.3") else 4.0}

    seed = recorded(qk_norm_rates.STUDY, 1, figures).of_seed(0)
    excess = (qk_norm_rates.UNIFORM - 4.0) / len(qk_norm_rates.RATES)
    assert qk_norm_rates.sensitivity("plain")(seed) == pytest.approx(excess)
    assert qk_norm_rates.sensitivity("qk-norm")(seed) == 0.0


def test_the_noise_floor_reports_the_spread_of_pairs():
    draw = np.random.default_rng(0)
    shared, own = draw.normal(0, 0.03, 200), {}

    def figures(arm: str, seed: int) -> dict[str, float]:
        own.setdefault(arm, draw.normal(0, 0.01, 200))
        return {"bits_per_byte": 2 + shared[seed] + own[arm][seed]}

    row = noise_floor.analysis(recorded(noise_floor.STUDY, 200, figures))[2]
    _, _, run, paired, part, *detected, _ = (cell.strip() for cell in row.split("|"))
    assert float(run) == pytest.approx(math.hypot(0.03, 0.01), rel=0.2)
    assert float(paired) == pytest.approx(0.01 * math.sqrt(2), rel=0.2)
    assert 85 < float(part.rstrip("%")) < 95 and float(detected[0]) > float(detected[-1]) > float(paired)
