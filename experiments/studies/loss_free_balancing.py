"""Balancing with a bias instead of a loss, beside the auxiliary loss over batches and over sequences."""

from experiments.studies.bases import moe, moe_scales
from experiments.study.definition import Claim, Published, Study

STUDY = Study(
    name="loss_free_balancing",
    question="Does a bias on the choice of experts balance them better than an auxiliary loss, at no cost in quality?",
    source="Wang et al. 2024, table 2; DeepSeek-V3, sec. 4.5.3",
    base=moe(experts=16),
    arms={
        "no balancing": {"model.moe.load_balance": 0.0},
        "loss 0.001, sequence": {"model.moe.load_balance": 0.001, "model.moe.balance_scope": "sequence"},
        "loss 0.001, batch": {"model.moe.load_balance": 0.001},
        "loss 0.01, batch": {"model.moe.load_balance": 0.01},
        "bias 0.001": {"model.moe.load_balance": 0.0, "model.moe.bias_rate": 0.001},
        "bias 0.01": {"model.moe.load_balance": 0.0, "model.moe.bias_rate": 0.01},
    },
    scales={
        name: scale.with_changes({"model.moe.weights": "sigmoid_renormalized"})
        for name, scale in moe_scales(seeds=4).items()
    },
    claims=(
        Claim(
            "the bias leaves at most half the violation of the loss 0.001",
            arm=lambda seed: seed["bias 0.01"]["max_violation"] / seed["loss 0.001, batch"]["max_violation"],
            expected="lower", than=0.5, metric="ratio of max_violation", published=Published(0.04, 0.72, unit="MaxVio"),
        ),
        Claim("the bias costs no quality", "bias 0.01", "not_higher", than="loss 0.001, batch", margin=0.02,
              published=Published(2.2513, 2.2576)),
        Claim("without balancing, the load is worse than with the bias", "no balancing", "higher", than="bias 0.01",
              metric="max_violation"),
    ),
    also=("max_violation", "router_entropy"),
    notes="Trials are hundreds of steps, not tens of thousands, so the rate of the bias is 0.01 as well as 0.001.",
)  # fmt: skip
