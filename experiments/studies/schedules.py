"""Warm-up, stable, decay beside cosine, linear and constant learning rates."""

from experiments.studies.bases import dense, scales
from experiments.study.definition import Claim, Study

WSD = {"optimizer.schedule": "wsd"}

STUDY = Study(
    name="schedules",
    question="Does a short decay after a constant rate match the cosine schedule?",
    source="Hu et al. 2024 (MiniCPM); Hägele et al. 2024",
    base=dense(),
    arms={
        "cosine": {},
        "linear": {"optimizer.schedule": "linear"},
        "wsd 10%": WSD | {"optimizer.decay_fraction": 0.1},
        "wsd 20%": WSD | {"optimizer.decay_fraction": 0.2},
        "wsd 40%": WSD | {"optimizer.decay_fraction": 0.4},
        "constant": {"optimizer.schedule": "constant"},
    },
    tune={"optimizer.learning_rate": (0.25, 0.5, 1.0, 2.0)},
    scales=scales(seeds=5),
    claims=(
        Claim("wsd with 20 % of decay matches cosine", "wsd 20%", "equal", than="cosine", margin=0.03),
        Claim("a constant rate is worse than cosine", "constant", "higher", than="cosine", margin=0.02),
    ),
)
