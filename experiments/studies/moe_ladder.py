"""Dense, hash, Switch, top-2 and fine-grained experts at equal active parameters."""

from experiments.studies.bases import dense, scales
from experiments.study.definition import Changes, Claim, Published, Study
from model.moe_config import MoEConfig
from train.config import Experiment

PILE = {"dense": 2.060, "hash": 1.932, "switch": 1.881, "top-2": 1.867, "fine-grained": 1.808}  # table 1


def arms(base: Experiment) -> dict[str, Changes]:
    """Experts of a token have together the width of the dense MLP."""
    width = base.model.mlp.hidden_dim
    return {
        "dense": {},
        "hash": {"model.moe": MoEConfig(num_experts=8, top_k=1, hidden_dim=width, router="hash")},
        "switch": {"model.moe": MoEConfig(num_experts=8, top_k=1, hidden_dim=width, router="switch")},
        "top-2": {"model.moe": MoEConfig(num_experts=16, top_k=2, hidden_dim=width // 2)},
        "fine-grained": {
            "model.moe": MoEConfig(num_experts=31, top_k=3, hidden_dim=width // 4, shared_experts=1)
        },
    }  # fmt: skip


def better(arm: str, than: str) -> Claim:
    return Claim(
        f"{arm} learns better than {than}", arm, "lower", than=than, published=Published(PILE[arm], PILE[than])
    )


STUDY = Study(
    name="moe_ladder",
    question="Which kinds of experts learn better than a dense MLP of equal FLOPs, and in which order?",
    source="Dai et al. 2024 (DeepSeekMoE), table 1; Fedus et al. 2021, table 1",
    base=dense(),
    arms=arms,
    scales=scales(seeds=5, tokens=1_024_000),
    claims=(better("hash", "dense"), better("switch", "dense"), better("top-2", "dense"), better("switch", "hash"),
            better("fine-grained", "top-2")),
    also=("max_violation", "parameters", "active_parameters"),
    notes="The paper's top-2 has twice the FLOPs of Switch; here all arms have equal active parameters.",
)  # fmt: skip
