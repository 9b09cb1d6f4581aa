"""AdamW, Lion and Muon, each with its own tuned learning rate."""

from experiments.studies.bases import dense, scales
from experiments.study.definition import Claim, Study

STUDY = Study(
    name="optimizers",
    question="Do Muon and Lion learn more from the same tokens than a tuned AdamW?",
    source="Jordan et al. 2024; modded-nanogpt track 3; Chen et al. 2023; Wen et al. 2025",
    base=dense(),
    arms={
        "adamw": {"optimizer.name": "adamw", "optimizer.learning_rate": 8e-3},
        "muon": {},
        "lion": {"optimizer.name": "lion", "optimizer.learning_rate": 3e-3, "optimizer.weight_decay": 0.5},
    },
    tune={"optimizer.learning_rate": (0.25, 0.5, 1.0, 2.0)},
    scales=scales(seeds=5),
    claims=(
        Claim("Muon learns more than AdamW", "muon", "lower", than="adamw"),
        Claim("Lion learns as much as AdamW", "lion", "equal", than="adamw", margin=0.03),
    ),
)
