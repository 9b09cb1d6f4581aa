"""Experts that choose their tokens read later tokens: held-out text scored whole, and token by token."""

from experiments.studies.bases import moe, moe_scales
from experiments.study.definition import Claim, Study
from experiments.study.measures import HeldOutUnder

TOKENS = 2048  # scored one at a time


def leak(arm: str):
    """Return how much better a network looks when whole windows are scored, in bits per byte.

    The tokens and their contexts differ between the two scores, which the causal router shows as well.
    """
    return lambda seed: seed[arm]["one_at_a_time"] - seed[arm]["bits_per_byte"]


STUDY = Study(
    name="expert_choice_leak",
    question="How much of expert choice's quality comes from reading the tokens it must predict?",
    source="Wang et al. 2024, sec. 5.2 (50 bits per token may leak); Zhou et al. 2022",
    base=moe(experts=16),
    arms={
        "top-2": {},
        "expert choice": {"model.moe.router": "expert_choice", "model.moe.allow_leak": True,
                          "model.moe.load_balance": 0.0},
        "soft": {"model.moe.router": "soft", "model.moe.allow_leak": True, "model.moe.load_balance": 0.0},
    },
    scales=moe_scales(seeds=3),
    measures={"one_at_a_time": HeldOutUnder("one_at_a_time", {"train.eval_stride": 1, "data.batch_size": 64},
                                            windows=TOKENS)},
    also=("one_at_a_time", "train_max_violation"),
    claims=(
        Claim("scored whole, expert choice looks better than top-2", "expert choice", "lower", than="top-2"),
        Claim("token by token, expert choice is worse than top-2", "expert choice", "higher", than="top-2",
              metric="one_at_a_time"),
        Claim("expert choice loses more than top-2 when scored token by token", leak("expert choice"), "higher",
              leak("top-2"), margin=0.1, metric="leak"),
    ),
    notes="one_at_a_time: bits per byte of 2,048 tokens, each the last of a separate window, so that no later token is "
    "there to be read, as in generation.",
)  # fmt: skip
