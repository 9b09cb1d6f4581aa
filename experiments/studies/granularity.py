"""More and smaller experts at equal parameters and equal FLOPs."""

from experiments.studies.bases import moe, moe_scales
from experiments.study.definition import Changes, Claim, Study
from train.config import Experiment

SIZES = (1, 2, 4, 8)  # granularity: active experts per token; 4 times as many in all


def arms(base: Experiment) -> dict[str, Changes]:
    """`G` active experts have together the width of the dense MLP."""
    width = base.model.mlp.hidden_dim
    return {
        f"{4 * g} experts, {g} active": {
            "model.moe.num_experts": 4 * g, "model.moe.top_k": g, "model.moe.hidden_dim": width // g,
            "model.moe.weights": "softmax" if g == 1 else "renormalized",
        }
        for g in SIZES
    }  # fmt: skip


STUDY = Study(
    name="granularity",
    question="Do more and smaller experts learn better at equal parameters and FLOPs?",
    source="Krajewski et al. 2024, eq. 9; Muennighoff et al. 2024 (OLMoE), figure 5",
    base=moe(),
    arms=arms,
    scales=moe_scales(seeds=4, tokens=1_024_000),
    also=("max_violation", "active_parameters"),
    claims=(
        Claim("16 experts, 4 active, learn better than 4 experts, 1 active", "16 experts, 4 active", "lower",
              than="4 experts, 1 active"),
        Claim("8 active learn better than 2 active", "32 experts, 8 active", "lower", than="8 experts, 2 active"),
    ),
)  # fmt: skip
