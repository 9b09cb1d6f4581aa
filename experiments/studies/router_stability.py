"""The router's z-loss and jitter: the size of its logits, and quality."""

from experiments.studies.bases import moe, moe_scales
from experiments.study.definition import Claim, Study

STUDY = Study(
    name="router_stability",
    question="Does the router's z-loss keep its logits small without a cost, and does jitter cost quality?",
    source="Zoph et al. 2022 (ST-MoE), tables 3 and 4",
    base=moe(),
    arms={
        "plain": {"model.moe.z_loss": 0.0},
        "z-loss 0.001": {"model.moe.z_loss": 1e-3},
        "z-loss 0.1": {"model.moe.z_loss": 0.1},
        "jitter 0.01": {"model.moe.z_loss": 0.0, "model.moe.jitter": 0.01},
        "jitter 0.3": {"model.moe.z_loss": 0.0, "model.moe.jitter": 0.3},
    },
    scales=moe_scales(seeds=4),
    also=("router_z_loss", "router_entropy", "max_violation"),
    claims=(
        Claim("a z-loss of 0.001 makes the router's logits smaller", "z-loss 0.001", "lower", than="plain",
              metric="router_z_loss"),
        Claim("a z-loss of 0.1 makes them smaller still", "z-loss 0.1", "lower", than="z-loss 0.001",
              metric="router_z_loss"),
        Claim("a z-loss of 0.001 costs no quality", "z-loss 0.001", "not_higher", than="plain", margin=0.02),
        Claim("a jitter of 0.01 costs quality", "jitter 0.01", "higher", than="plain"),
    ),
    notes="router_z_loss: mean of logsumexp(logits)^2 over the last tenth of training; zero logits of 8 experts give "
    "4.32.",
)  # fmt: skip
