"""Networks of several sizes at equal FLOPs: the best size, and how counting the head's FLOPs changes its exponent."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from experiments.resolve import fill_vocabulary
from experiments.studies.bases import dense, scales
from experiments.study.definition import Changes, Claim, SeedFigures, Study
from experiments.study.figures import StudyFigure, isoflop_figure
from experiments.study.fits import Parabola, Saturating, compute_optimal, fit_parabola, fit_power_law, fit_saturating
from experiments.study.records import Table
from experiments.study.resampling import bootstrap
from model.cost import train_flops_per_token
from train.config import Experiment
from train.config_io import replace_fields

# Multiples of the least budget, and the widths that are trained with them.
BUDGETS = {"C": (1, (16, 32, 48, 64, 80)), "3 C": (3, (16, 32, 48, 64, 96)), "10 C": (10, (32, 48, 64, 96, 128))}
LEAST_FLOPS = 2e11  # C, with the FLOPs of the head; at scale ci in proportion to train.steps
BASE_STEPS = 500
LAYERS, VOCABULARY = 3, 1024
RESAMPLES = 200


def label(budget: str, width: int) -> str:
    return f"{budget}, width {width}"


def arms(base: Experiment) -> dict[str, Changes]:
    """Each arm trains one width for as many steps as its budget allows."""
    found: dict[str, Changes] = {}
    for budget, (factor, widths) in BUDGETS.items():
        for d in widths:
            size = {"model.embed_dim": d, "model.attention.num_heads": d // 16, "model.attention.head_dim": 16,
                    "model.attention.num_kv_heads": d // 16, "model.mlp.hidden_dim": 3 * d}  # fmt: skip
            model, data = fill_vocabulary(replace_fields(base, size)).model, base.data
            tokens = data.batch_size * data.sequence_length  # of a step
            flops = LEAST_FLOPS * factor * base.train.steps / BASE_STEPS
            steps = max(round(flops / (train_flops_per_token(model, data.sequence_length) * tokens)), 1)
            found[label(budget, d)] = size | {"train.steps": steps, "optimizer.warmup_steps": min(40, steps // 5)}
    return found


def parameters(width: int) -> int:
    """Return the parameters of the layers: attention 4 d^2 and SwiGLU 9 d^2."""
    return 13 * width**2 * LAYERS


def best_size(losses: Mapping[int, float]) -> Parabola:
    """Return the parabola of losses by width, over log10 of the parameters of the layers."""
    return fit_parabola([math.log10(parameters(d)) for d in losses], list(losses.values()))


def seed_size(seed: SeedFigures, budget: str) -> float:
    """Return log10 of the best number of parameters of a seed."""
    return best_size({d: seed[label(budget, d)]["loss"] for d in BUDGETS[budget][1]}).minimum_at


def exponent(seed: SeedFigures) -> float:
    """Return a in N_opt ~ C^a of a seed."""
    factors = np.array([factor for factor, _ in BUDGETS.values()], np.float64)
    return fit_power_law(factors, np.array([10 ** seed_size(seed, budget) for budget in BUDGETS])).exponent


def runs_of(table: Table) -> np.ndarray:
    """Return [runs, 3]: parameters of the layers, tokens, and loss in nats per token."""
    rows = [
        (parameters(d), outcome.figures["tokens"], outcome.figures["loss"])
        for budget, (_, widths) in BUDGETS.items() for d in widths for outcome in table.compared(label(budget, d))
    ]  # fmt: skip
    return np.array(rows, np.float64)


def exponents(runs: np.ndarray, start: Saturating | None = None) -> tuple[float, float]:
    """Return a in N_opt ~ C^a of the law fitted to runs [runs, 3]: without the FLOPs of the head, and with them.

    A head costs 6 V d for each token, where N = 39 d^2.
    """
    fit = fit_saturating(runs[:, 0], runs[:, 1], runs[:, 2], start)
    budgets = np.geomspace(1, 10, 5) * LEAST_FLOPS
    sizes = np.geomspace(1e3, 1e7, 2000)
    for_each_token = 6 * (sizes + VOCABULARY * np.sqrt(sizes / (13 * LAYERS)))
    with_head = [sizes[np.argmin(fit(sizes, flops / for_each_token))] for flops in budgets]
    without = [compute_optimal(fit, flops).n for flops in budgets]
    return fit_power_law(budgets, np.array(without)).exponent, fit_power_law(budgets, np.array(with_head)).exponent


def _exponent(i: int, start: Saturating, runs: np.ndarray) -> float:
    return exponents(runs, start)[i]


def analysis(table: Table) -> Sequence[str]:
    """Return the best sizes, the fitted law, and its exponents with bootstrap intervals over runs."""
    lines = ["| FLOPs | best parameters of the layers | tokens for each, nearest width |", "|---|---|---|"]
    for budget, (factor, widths) in BUDGETS.items():
        runs = {d: table.compared(label(budget, d)) for d in widths}
        best = best_size({d: float(np.mean([o.figures["loss"] for o in runs[d]])) for d in widths})
        size = 10**best.minimum_at
        nearest = min(widths, key=lambda d: abs(math.log10(parameters(d)) - best.minimum_at))
        outside = "" if best.inside else " (outside the sizes tried)"
        tokens = runs[nearest][0].figures["tokens"]
        lines.append(f"| {factor * LEAST_FLOPS:.0e} | {size:,.0f}{outside} | {tokens / parameters(nearest):.0f} |")
    found = runs_of(table)
    fit = fit_saturating(*found.T)
    lines += ["", f"Fit to all {len(found)} runs: loss = {fit.E:.3f} + {fit.A:.4g} / N^{fit.alpha:.3f} + {fit.B:.4g} / "
              f"D^{fit.beta:.3f} nats per token (N: parameters of the layers, D: tokens).", ""]  # fmt: skip
    for i, name in enumerate(("without the head's FLOPs", "with the head's FLOPs")):
        interval = bootstrap(partial(_exponent, i, fit), found, resamples=RESAMPLES)
        lines.append(
            f"- Exponent of the best size {name}: {interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f}, "
            "bootstrap over runs)."
        )
    return lines


STUDY = Study(
    name="isoflop",
    question="How does the best size of a network grow with the FLOPs of its training?",
    source="Hoffmann et al. 2022, approaches 2 and 3; Porian et al. 2024 (head FLOPs)",
    base=dense(),
    arms=arms,
    scales={"ci": scales()["ci"].with_changes({"train.steps": 1, "model.num_layers": LAYERS}),
            "cpu": scales(seeds=3)["cpu"]},
    metric="loss",
    also=("tokens",),
    claims=(
        Claim("the best size grows with the FLOPs", lambda seed: seed_size(seed, "10 C"), "higher",
              lambda seed: seed_size(seed, "C"), metric="log10 of the parameters"),
        Claim("the exponent of the best size is above 0.3", exponent, "higher", 0.3, metric="exponent"),
        Claim("the exponent of the best size is below 0.8", exponent, "lower", 0.8, metric="exponent"),
    ),
    figures=(
        StudyFigure("isoflop", lambda table: isoflop_figure(
            {f"{factor * LEAST_FLOPS:.0e} FLOPs": {
                float(parameters(d)): [o.figures["loss"] for o in table.compared(label(budget, d))] for d in widths
            } for budget, (factor, widths) in BUDGETS.items()}, "parameters of the layers", "nats per token")),
    ),
    analysis=analysis,
    notes="The budgets count the FLOPs of the head and of attention. All sizes share one learning rate and have 3 "
    "layers, so the exponent is not that of the paper.",
)  # fmt: skip
