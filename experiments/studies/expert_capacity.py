"""Bounded experts drop tokens: the capacity factor against drops and quality."""

from experiments.studies.bases import moe, moe_scales
from experiments.study.definition import Changes, Claim, Study, chain, grid
from train.config import Experiment

FACTORS = (1.0, 1.25, 2.0, None)


def factors() -> dict:
    return {"no limit" if f is None else f"{f:g}": {"model.moe.capacity_factor": f} for f in FACTORS}


def arms(base: Experiment) -> dict[str, Changes]:
    """The one expert of Switch has the width of the dense MLP, and the two of top-2 half of it."""
    one = {"model.moe.router": "switch", "model.moe.top_k": 1, "model.moe.hidden_dim": base.model.mlp.hidden_dim}
    return chain(grid(router={"switch": one}, factor=factors()), grid(router={"top-2": {}}, factor=factors()))


STUDY = Study(
    name="expert_capacity",
    question="How many tokens do bounded experts drop, and what do the drops cost?",
    source="Fedus et al. 2021, table 1; Gale et al. 2022 (MegaBlocks)",
    base=moe(),
    arms=arms,
    scales=moe_scales(seeds=3),
    also=("dropped_fraction", "max_violation"),
    claims=(
        *(
            Claim(f"{router}: a factor of {more} drops fewer tokens than {less}", f"{router}, {more}", "lower",
                  than=f"{router}, {less}", metric="dropped_fraction")
            for router in ("switch", "top-2") for less, more in (("1", "1.25"), ("1.25", "2"))
        ),
        Claim("switch: a factor of 1 costs quality", "switch, 1", "higher", than="switch, no limit"),
        Claim("switch: a factor of 2 costs none", "switch, 2", "not_higher", than="switch, no limit", margin=0.02),
    ),
)  # fmt: skip
