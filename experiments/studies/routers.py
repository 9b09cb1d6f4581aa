"""All ten routers side by side, scored token by token, because two of them read later tokens."""

from experiments.studies.bases import moe, moe_scales
from experiments.study.definition import Changes, Claim, Study
from experiments.study.measures import HeldOutUnder
from train.config import Experiment

TOKENS = 2048  # scored one at a time
LEAKS = {"model.moe.allow_leak": True, "model.moe.load_balance": 0.0}


def arms(base: Experiment) -> dict[str, Changes]:
    """The experts that a token uses have together the width of the dense MLP, except in `dense`, which uses all."""
    width = base.model.mlp.hidden_dim
    one: Changes = {"model.moe.top_k": 1, "model.moe.hidden_dim": width}
    return {
        "top_k": {},
        "switch": {"model.moe.router": "switch", **one},
        "gshard": {"model.moe.router": "gshard"},
        "noisy_top_k": {"model.moe.router": "noisy_top_k"},
        "sinkhorn": {"model.moe.router": "sinkhorn", "model.moe.load_balance": 0.0},
        "hash": {"model.moe.router": "hash", **one, "model.moe.load_balance": 0.0},
        "random": {"model.moe.router": "random", **one, "model.moe.load_balance": 0.0},
        "expert_choice": {"model.moe.router": "expert_choice", **LEAKS},
        "soft": {"model.moe.router": "soft", **LEAKS},
        "dense": {"model.moe.router": "dense", "model.moe.top_k": 8, "model.moe.load_balance": 0.0},
    }


def ranked(text: str, arm: str, than: str) -> Claim:
    return Claim(text, arm, "lower", than=than, metric="one_at_a_time")


STUDY = Study(
    name="routers",
    question="How do ten ways to choose experts compare in quality and balance?",
    source="the papers cited in model/routers.py; Dai et al. 2024, table 1",
    base=moe(),
    arms=arms,
    scales=moe_scales(seeds=3),
    measures={"one_at_a_time": HeldOutUnder("one_at_a_time", {"train.eval_stride": 1, "data.batch_size": 64},
                                            windows=TOKENS)},
    also=("one_at_a_time", "max_violation", "router_entropy", "flops_per_token"),
    claims=(
        ranked("top-2 learns better than a random choice", "top_k", "random"),
        ranked("a hash of the token learns better than a random choice", "hash", "random"),
        ranked("top-2 learns better than expert choice, token by token", "top_k", "expert_choice"),
    ),
    notes="one_at_a_time: bits per byte of 2,048 tokens, each the last of a separate window. bits_per_byte of "
    "expert_choice and soft counts what they read of later tokens.",
)  # fmt: skip
