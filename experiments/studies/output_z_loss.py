"""A loss on the logarithm of the softmax's denominator, at a high learning rate and without weight decay."""

from experiments.studies.bases import ADAMW, dense, scales
from experiments.study.definition import Claim, Study
from experiments.study.measures import LogPartition

HIGH = {**ADAMW, "optimizer.learning_rate": 1e-2, "optimizer.weight_decay": 0.0}

STUDY = Study(
    name="output_z_loss",
    question="Does the z-loss keep the softmax's denominator near 1, at no cost in quality?",
    source="Chowdhery et al. 2022, sec. 5; Wortsman et al. 2023, sec. 3.1.2",
    base=dense(),
    arms={
        "none": HIGH,
        "0.0001": {**HIGH, "train.z_loss": 1e-4},
        "0.01": {**HIGH, "train.z_loss": 1e-2},
    },
    scales=scales(seeds=5),
    measures={"log_z": LogPartition()},
    also=("log_z", "grad_norm"),
    claims=(
        Claim("a z-loss of 0.0001 brings log Z nearer to 0", "0.0001", "lower", than="none", metric="log_z"),
        Claim("a z-loss of 0.01 brings it nearer still", "0.01", "lower", than="0.0001", metric="log_z"),
        Claim("a z-loss of 0.0001 costs no quality", "0.0001", "not_higher", than="none", margin=0.03),
    ),
)
