"""Whether the best learning rate of a narrow network is that of a wide one, with and without muP."""

import math

from experiments.studies.bases import dense, scales
from experiments.studies.mup_coordinates import parametrizations, width
from experiments.study.definition import Claim, SeedFigures, Study, grid, values
from experiments.study.figures import StudyFigure, rates_figure
from experiments.study.fits import fit_parabola
from model.config import InitConfig

WIDTHS = (32, 128)
RATES = tuple(1e-3 * 2**n for n in range(7))
BASE = {"optimizer.name": "adamw", "model.init": InitConfig(embedding_std=1.0), "model.tied_embeddings": False,
        "data.batch_size": 4, "optimizer.warmup_steps": 40}  # fmt: skip


def arm(parametrization: str, d: int, rate: float) -> str:
    return f"{parametrization}, {d}, {rate:g}"


def best_rate(seed: SeedFigures, parametrization: str, d: int) -> float:
    """Return log2 of the best rate: the minimum of the parabola through the best rate and its neighbours."""
    losses = [seed[arm(parametrization, d, rate)]["bits_per_byte"] for rate in RATES]
    at = min(range(len(RATES)), key=losses.__getitem__)
    if at in (0, len(RATES) - 1):
        return math.log2(RATES[at])
    near = slice(at - 1, at + 2)
    return fit_parabola([math.log2(rate) for rate in RATES[near]], losses[near]).minimum_at


def shift(parametrization: str):
    """Return how many doublings the best rate moves from the narrow to the wide network."""
    narrow, wide = WIDTHS
    return lambda seed: best_rate(seed, parametrization, wide) - best_rate(seed, parametrization, narrow)


STUDY = Study(
    name="mup_transfer",
    question="Does the best learning rate of a narrow network hold for one four times as wide under muP?",
    source="Yang et al. 2022, figure 1",
    base=dense(),
    arms=grid(
        parametrization={label: BASE | changes for label, changes in parametrizations().items()},
        width={str(d): width(d) for d in WIDTHS},
        rate=values("optimizer.learning_rate", *RATES),
    ),
    scales=scales(seeds=3, tokens=256_000),
    claims=(
        Claim("under muP, the best rate stays within a factor of 2", shift("muP"), "equal", 0.0, margin=1.0,
              metric="doublings"),
        Claim("in the standard parametrization, the best rate falls", shift("standard"), "lower", 0.0, margin=0.5,
              metric="doublings"),
        Claim("muP moves the best rate less than the standard parametrization",
              lambda seed: abs(shift("muP")(seed)), "lower", lambda seed: abs(shift("standard")(seed)),
              metric="doublings"),
    ),
    figures=(
        StudyFigure("rates", lambda table: rates_figure(
            table, {f"{p}, width {d}": {rate: arm(p, d, rate) for rate in RATES}
                    for p in parametrizations() for d in WIDTHS}, "bits_per_byte")),
    ),
    notes="Each width is trained with AdamW at 7 rates, a factor of 2 apart. The best rate is the minimum of the "
    "parabola through the best one and its neighbours.",
)  # fmt: skip
