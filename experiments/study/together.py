"""Trials that share a compiled step, trained under one vmap: which may be, and how a group of them runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath

from data.prepare import Prepared
from experiments.run import prepare_data
from experiments.study.definition import Study
from experiments.study.execute import (
    Programs,
    checked_program,
    diverged_outcome,
    finished_outcome,
    opened,
    program_key,
    trial_clock,
)
from experiments.study.storage import Claimed, TrialStore
from experiments.study.trials import Trial
from train.hooks import DivergedError
from train.signals import StopSignal
from train.together import FAULTS, Member, train_together
from train.trainer import Trained

TOGETHER = 4  # trials that a worker with one accelerator trains at a time by default; it was not measured there
Log = Callable[[str], None]


def most_together(study: Study, asked: int | None, devices: int, log: Log) -> int:
    """Return how many trials a worker trains together at most, and log why they are fewer than `asked`.

    None: 1 on a CPU, where vmap did not help (experiments/LOG.md), or with several devices; else `TOGETHER`.
    """
    if asked is None:
        asked = 1 if jax.default_backend() == "cpu" or devices > 1 else TOGETHER
    if asked > 1 and devices > 1:
        log(
            f"--vectorize {asked}: this worker has {devices} devices, and only one device trains several trials "
            "together; they run one after another. Start one command for each device instead, such as with "
            "CUDA_VISIBLE_DEVICES=0: commands that share a --storage share the work"
        )
    return 1 if study.run is not None or devices > 1 else asked


def claim_group(store: TrialStore, trials: Sequence[Trial], most: int) -> list[Claimed]:
    """Claim the next waiting trial and up to `most` - 1 further ones with its program, in order. Return none if no
    trial waits."""
    first = store.claim([trial.id for trial in trials])
    if first is None:
        return []
    claimed = [first]
    key = _group_key(next(trial for trial in trials if trial.id == first.id))
    if most > 1 and key is not None:
        same = [trial.id for trial in trials if _group_key(trial) == key]
        while len(claimed) < most and (further := store.claim(same)) is not None:
            claimed.append(further)
    return claimed


def _group_key(trial: Trial) -> str | None:
    """Return a text that is equal for trials that may train together; None for one that may not."""
    train = trial.experiment.train
    if "wandb" in train.sinks or train.rewind is not None:  # one run in each process reports, or may go back
        return None
    return program_key(trial.experiment)


def run_together(
    study: Study, trials: Sequence[Trial], folders: Sequence[epath.Path], programs: Programs, logs: Sequence[Log],
    stop: StopSignal,
) -> list[dict[str, Any] | Exception | None]:  # fmt: skip
    """Return what `run_trial` returns for each trial, or the exception that ended it.

    The trials share a program and are trained under one vmap. The seconds of each are its share of those of the group.
    An exception says only that the trial did not end in the group: run it alone, from its last checkpoint.
    """
    clock = trial_clock()
    began = clock()
    try:
        members, found = _train(study, trials, folders, programs, logs, stop)
    except FAULTS as error:  # of what is common, such as too little memory for the step
        return [error] * len(trials)
    share = {"seconds": round((clock() - began) / len(trials), 2), "together": members}
    return [outcome | share if isinstance(outcome, dict) else outcome for outcome in found]


def _train(
    study: Study, trials: Sequence[Trial], folders: Sequence[epath.Path], programs: Programs, logs: Sequence[Log],
    stop: StopSignal,
) -> tuple[int, list[dict[str, Any] | Exception | None]]:  # fmt: skip
    """Return how many trials were trained together, and what became of each. Raises what their common step raises."""
    made = [checked_program(trial, programs) for trial in trials]
    prepared = prepare_data(trials[0].experiment, logs[0])  # only the seed of its order may differ
    found: list[dict[str, Any] | Exception | None] = [None] * len(trials)
    with contextlib.ExitStack() as stack:
        members: dict[int, Member] = {}
        for i, (trial, program) in enumerate(zip(trials, made, strict=True)):
            try:
                members[i] = Member(program, stack.enter_context(opened(trial, folders[i], logs[i])), logs[i])
            except FAULTS as error:  # its folder is in use, for example
                found[i] = error
        results = train_together(list(members.values()), prepared, stop=stop) if members else []
        for (i, member), result in zip(members.items(), results, strict=True):
            try:
                found[i] = _outcome(study, member, prepared, result)
            except FAULTS as error:
                found[i] = error
    return len(members), found


def _outcome(
    study: Study, member: Member, prepared: Prepared, result: Trained | Exception
) -> dict[str, Any] | Exception | None:
    program, run, log = member
    if isinstance(result, DivergedError):
        return diverged_outcome(program, prepared, run, 0.0)
    if isinstance(result, Exception):
        return result
    return finished_outcome(study, program, prepared, run, result, log) if result.finished else None
