"""The queue and the record of a study's trials (experiments/study/trial_queue.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import TrialState

from experiments.study.trial_queue import HEARTBEAT_SECONDS, Claimed, TrialQueue
from experiments.study.trials import RECIPE, Outcome, Trial


class TrialStore(TrialQueue):
    """The trials of one study at one scale. Every method may raise StudyError if the storage fails."""

    def __init__(self, url: str, name: str, heartbeat_seconds: int = HEARTBEAT_SECONDS):
        super().__init__(url, name, RECIPE, heartbeat_seconds)

    def enqueue(self, trials: Sequence[Trial]) -> int:
        """Queue the trials that are not recorded yet, in order. Return how many were queued."""
        attributes = [{"arm": t.arm, "seed": t.seed, "stage": t.stage, "tuned": dict(t.tuned)} for t in trials]
        return self.add([(trial.id, each, {}) for trial, each in zip(trials, attributes, strict=True)])

    def finish(self, claimed: Claimed, outcome: Mapping[str, Any], value: float) -> None:
        """Record the outcome of a trial. Nothing changes if another worker finished it first."""
        curves = outcome["curves"]
        curve = dict(zip(map(int, curves.get("step", ())), curves.get("bits_per_byte", ()), strict=False))
        self.record(claimed, TrialState.COMPLETE, value, {"outcome": outcome}, curve)

    def outcomes(self) -> list[Outcome]:
        """Return what is recorded of the finished trials, by number."""
        with self._failures():
            found = [t for t in self._trials() if t.state == TrialState.COMPLETE and "outcome" in t.user_attrs]
            return [
                Outcome(
                    arm=t.user_attrs["arm"],
                    seed=t.user_attrs["seed"],
                    stage=t.user_attrs["stage"],
                    id=t.user_attrs["id"],
                    tuned=t.user_attrs["tuned"],
                    **t.user_attrs["outcome"],
                )
                for t in found
            ]
