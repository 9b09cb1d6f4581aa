"""A study whose trials compute in a moment, and a worker process for it:

python -m tests.experiments.study.small_study URL FOLDER [ADDRESS RANK]

With an address, two processes of jax.distributed are one worker. With TRAIN_IN=FOLDER in the environment, the trials
train a tiny network on the text in that folder (tests/experiments/study/tiny.py).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
from etils import epath

from experiments.studies.bases import dense
from experiments.study.definition import Claim, Scale, Study
from experiments.study.worker import Job, work
from tests.experiments.study.tiny import tiny_study
from train.config import Experiment

LOG = "TRIAL_LOG"  # environment variable: file to which each trial appends a line when it ends
SECONDS = "TRIAL_SECONDS"
TRAIN_IN = "TRAIN_IN"


def figures(experiment: Experiment) -> Mapping[str, float]:
    """Return a loss of 2 plus the rate, and an offset for each seed that all arms share."""
    time.sleep(float(os.environ.get(SECONDS, "0")))
    rate, seed = experiment.optimizer.learning_rate, experiment.train.seed
    if LOG in os.environ:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{rate:g} {seed} {os.getpid()}\n")
    return {"bits_per_byte": 2.0 + rate + 0.1 * (seed % 7) + 1e-4 * ((seed * 7 + int(1000 * rate)) % 5)}


STUDY = Study(
    name="small_study",
    question="Is a rate of 0.1 better than one of 0.2?",
    source="none",
    base=dense(),
    arms={"low": {"optimizer.learning_rate": 0.1}, "high": {"optimizer.learning_rate": 0.2},
          "same": {"optimizer.learning_rate": 0.1, "optimizer.epsilon": 1e-7}},
    scales={"cpu": Scale(tokens=1000, seeds=4)},
    claims=(
        Claim("low is better", "low", "lower", than="high"),
        Claim("high is better", "high", "lower", than="low"),
        Claim("epsilon does not matter", "same", "equal", than="low", margin=0.01),
    ),
    run=figures,
)  # fmt: skip


def job(url: str, folder: Path, study: Study = STUDY, vectorize: int | None = None) -> Job:
    """Return the job of the study with heartbeats every second."""
    return Job(study, "cpu", url, epath.Path(folder), heartbeat_seconds=1, vectorize=vectorize)


def with_arms(**changes: Mapping[str, object]) -> Study:
    """Return the study with further arms."""
    return replace(STUDY, arms={**STUDY.arms, **changes})  # type: ignore[dict-item]


if __name__ == "__main__":
    if len(sys.argv) > 3:
        jax.distributed.initialize(sys.argv[3], num_processes=2, process_id=int(sys.argv[4]))
    study = tiny_study(Path(os.environ[TRAIN_IN]), seeds=1) if TRAIN_IN in os.environ else STUDY
    sys.exit(0 if work(job(sys.argv[1], Path(sys.argv[2]), study), log=print) else 1)
