"""How much do seeds move a result? Everything else is measured against this."""

from collections.abc import Sequence

import numpy as np

from experiments.studies.bases import ADAMW, dense, scales
from experiments.study.definition import Study
from experiments.study.power import detectable_effect
from experiments.study.records import Table
from experiments.study.statistics import variance_components

SEEDS = (3, 5, 8)
# Pairs of arms that hardly differ. Their trials share the seeds of data and, where shapes agree, the initial weights.
PAIRS = (("1,000 steps", "rate x 0.9"), ("1,000 steps", "MLP 208"), ("500 steps", "500 steps, rate x 0.9"),
         ("AdamW, batch 4", "AdamW, batch 4, rate x 0.9"))  # fmt: skip
SLOWER = {"optimizer.learning_rate": 1.44e-2}
SMALL_BATCH = {**ADAMW, "data.batch_size": 4, "train.steps": 2000, "optimizer.warmup_steps": 80}


def analysis(table: Table) -> Sequence[str]:
    """Return the spread of each pair of arms, and the difference that a number of seeds detects."""
    figures = [table.of_seed(seed) for seed in table.seeds()]
    if len(figures) < 2:
        return ["Two seeds are needed."]
    head = ["pair", "sd of a run", "sd of a paired difference", "shared by a seed", *(f"{n} seeds" for n in SEEDS)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for pair in PAIRS:
        values = np.array([[seed[arm]["bits_per_byte"] for seed in figures] for arm in pair])
        found = variance_components(values)
        paired = float(np.std(values[1] - values[0], ddof=1))
        shared = found.seed / (found.seed + found.residual)
        cells = [" and ".join(pair), f"{np.std(values[0], ddof=1):.4f}", f"{paired:.4f}", f"{shared:.0%}"]
        cells += [f"{detectable_effect(paired, n):.4f}" for n in SEEDS]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines, "",
        "The last columns: the difference, in bits per byte, that 3, 5 or 8 pairs detect (two-sided test at 5 %, power "
        "80 %). Shared by a seed: the part of a run's variance that both runs of a seed have in common.",
    ]  # fmt: skip


STUDY = Study(
    name="noise_floor",
    question="How far do the seeds of weights and data move the held-out bits per byte of equal networks?",
    source="Choshen et al. 2024; the record rules of modded-nanogpt (sd 0.0013 nats at 124 M parameters)",
    base=dense(),
    arms={
        "1,000 steps": {},
        "rate x 0.9": SLOWER,
        "MLP 208": {"model.mlp.hidden_dim": 208},
        "500 steps": {"train.steps": 500},
        "500 steps, rate x 0.9": {"train.steps": 500, **SLOWER},
        "AdamW": ADAMW,
        "AdamW, batch 4": SMALL_BATCH,
        "AdamW, batch 4, rate x 0.9": {**SMALL_BATCH, "optimizer.learning_rate": 3.6e-3},
    },
    data_differs=True,  # a batch of 4
    scales=scales(seeds=8, tokens=1_024_000),
    claims=(),
    analysis=analysis,
)  # fmt: skip
