"""The coefficient of the load-balancing loss over five powers of ten."""

from experiments.studies.bases import moe, moe_scales
from experiments.study.definition import Claim, Study, values

COEFFICIENTS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

STUDY = Study(
    name="balance_coefficient",
    question="How does the coefficient of the load-balancing loss trade balance against quality?",
    source="Fedus et al. 2021, sec. 2.2 (0.01 chosen from a sweep)",
    base=moe(),
    arms=values("model.moe.load_balance", *COEFFICIENTS),
    scales=moe_scales(seeds=4),
    claims=(
        *(
            Claim(f"coefficient {high:g} balances better than {low:g}", f"{high:g}", "lower", than=f"{low:g}",
                  metric="max_violation")
            for low, high in ((0.0, 1e-2), (1e-3, 1e-1), (1e-2, 1.0))
        ),
        Claim("0.01 costs no quality beside none", "0.01", "not_higher", than="0", margin=0.02),
    ),
    also=("max_violation", "router_entropy", "load_balance_loss"),
)  # fmt: skip
