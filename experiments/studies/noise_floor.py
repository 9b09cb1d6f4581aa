"""How much do seeds move a result? Everything else is measured against this."""

from experiments.studies.bases import dense, scales
from experiments.study.definition import Study

STUDY = Study(
    name="noise_floor",
    question="How far do the seeds of weights and data move the held-out bits per byte of equal networks?",
    source="Choshen et al. 2024; the record rules of modded-nanogpt (sd 0.0013 nats at 124 M parameters)",
    base=dense(),
    # A wider MLP and a lower rate stand for small real changes.
    arms={"base": {}, "mlp 208": {"model.mlp.hidden_dim": 208}, "rate x 0.9": {"optimizer.learning_rate": 3.6e-3}},
    scales=scales(seeds=8),
    claims=(),
)
