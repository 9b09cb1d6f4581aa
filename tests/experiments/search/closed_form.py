"""A search whose objective is a formula, and a worker process for it:

python -m tests.experiments.search.closed_form URL TRIALS
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.search.definition import Search
from experiments.search.space import read_space
from experiments.search.storage import SearchStore
from experiments.search.worker import Attempt
from experiments.search.worker import work as work_on
from experiments.studies.bases import dense
from train.signals import StopSignal

LOG = "TRIAL_LOG"  # environment variable: file to which each trial appends a line when it ends
SECONDS = "TRIAL_SECONDS"
SPACE = (
    "optimizer.learning_rate=log:1e-4:1e-1",
    "optimizer.weight_decay=uniform:0:0.3",
    "model.mlp.kind=swiglu,relu,silu",
)
BEST_RATE, BEST_DECAY = 3e-3, 0.2
STEPS = (100, 200, 300, 400)  # of the evaluations before the end


def loss(attempt: Attempt) -> float:
    """Return a loss whose optimum is 1 at the best rate, decay and MLP."""
    optimizer = attempt.experiment.optimizer
    rate = math.log10(optimizer.learning_rate / BEST_RATE)
    decay = (optimizer.weight_decay - BEST_DECAY) / 0.1
    return 1 + rate**2 + 0.3 * decay**2 + 0.5 * (attempt.experiment.model.mlp.kind != "swiglu")


def objective(attempt: Attempt, stop: StopSignal) -> Mapping[str, Any] | None:
    """Return the outcome of a trial whose curve falls to its loss; a rate above 0.09 diverges."""
    time.sleep(float(os.environ.get(SECONDS, "0")))
    value = loss(attempt)
    for step in STEPS:
        attempt.report(step, value + 400 / step)
    if LOG in os.environ:
        with Path(os.environ[LOG]).open("a") as log:
            log.write(f"{attempt.index} {value!r}\n")
    diverged = attempt.experiment.optimizer.learning_rate > 0.09
    figures = {"bits_per_byte": 8.0 if diverged else value, "parameters": 1000}
    return {"figures": figures, "diverged": diverged, "seconds": 1.0, "device": "a formula"}


def search(*space: str, **changes: Any) -> Search:
    """Return the search over the formula; no trial is pruned."""
    made = Search("formula", "dense", dense(), read_space(space or SPACE), pruner="none", software="jax 1, optuna 2")
    return replace(made, **changes)


def url(folder: Path) -> str:
    """Return the storage in a folder."""
    return f"sqlite:///{folder}/trials.db"


def store(folder: Path, made: Search | None = None) -> SearchStore:
    """Open the storage in a folder, with heartbeats every second."""
    return SearchStore(url(folder), search() if made is None else made, heartbeat_seconds=1)


def work(kept: SearchStore, number: int, **more: Any) -> bool:
    """Run the trials in this process, quietly."""
    return work_on(kept, number, more.pop("objective", objective), log=lambda text: None, **more)


if __name__ == "__main__":
    with SearchStore(sys.argv[1], search(), heartbeat_seconds=1) as opened:
        sys.exit(0 if work_on(opened, int(sys.argv[2]), objective, log=print) else 1)
