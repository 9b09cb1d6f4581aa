"""Normalised queries and keys over learning rates of two decades: Wortsman's sensitivity."""

import math

from experiments.studies.bases import dense, scales
from experiments.study.definition import Claim, SeedFigures, Study, grid, values
from experiments.study.figures import StudyFigure, rates_figure
from experiments.study.fits import lr_sensitivity

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
NORMS = {"plain": "none", "qk-norm": "head"}
VOCABULARY = 1024  # at every scale
UNIFORM = math.log(VOCABULARY)  # nats per token of a network that has learned nothing


def arm(norm: str, rate: float) -> str:
    return f"{norm}, {rate:g}"


def sensitivity(norm: str):
    """Return the mean excess of the loss over its least one, in nats per token, as a function of a seed's figures."""
    return lambda seed: lr_sensitivity([seed[arm(norm, rate)]["loss"] for rate in RATES], UNIFORM)


def best(norm: str):
    return lambda seed: min(seed[arm(norm, rate)]["loss"] for rate in RATES)


def loss_at(norm: str, rate: float):
    def found(seed: SeedFigures) -> float:
        return min(seed[arm(norm, rate)]["loss"], UNIFORM)

    return found


STUDY = Study(
    name="qk_norm_rates",
    question="Does normalising queries and keys make training less sensitive to the learning rate?",
    source="Wortsman et al. 2023, sec. 3.1 and figure 1",
    base=dense(),
    arms=grid(
        norm={label: {"optimizer.name": "adamw", "model.attention.qk_norm": kind} for label, kind in NORMS.items()},
        rate=values("optimizer.learning_rate", *RATES),
    ),
    scales={name: scale.with_changes({"data.tokenizer.vocab_size": VOCABULARY})
            for name, scale in scales(seeds=3, tokens=256_000).items()},
    metric="loss",
    also=("grad_norm",),
    claims=(
        Claim("qk-norm lowers the sensitivity to the rate", sensitivity("qk-norm"), "lower", sensitivity("plain"),
              metric="sensitivity"),
        Claim("qk-norm lowers the loss at a rate of 0.1", loss_at("qk-norm", 0.1), "lower", loss_at("plain", 0.1)),
        Claim("qk-norm changes the best loss little", best("qk-norm"), "equal", best("plain"), margin=0.1),
    ),
    figures=(StudyFigure("rates", lambda table: rates_figure(table, {norm: {r: arm(norm, r) for r in RATES}
                                                                     for norm in NORMS}, "loss")),),
)  # fmt: skip
