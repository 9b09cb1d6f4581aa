"""A worker: claims trials, one or several at a time, and runs them, until none is left or it is stopped."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from etils import epath

from experiments.processes import ask_first
from experiments.run import prepare_data
from experiments.study.definition import Study, StudyError, data_identity
from experiments.study.execute import Programs, run_trial, trial_folder
from experiments.study.storage import HEARTBEAT_SECONDS, Claimed, TrialStore
from experiments.study.together import claim_group, most_together, run_together
from experiments.study.trials import Outcome, Trial, plan
from train.config import Experiment
from train.progress import duration
from train.signals import StopSignal

POLL_SECONDS = 5.0  # between looks at the queue while other workers run the last trials


@dataclass(frozen=True)
class Job:
    """A study at one scale, with the storage of its trials and the folder of their runs."""

    study: Study
    scale: str
    url: str
    root: epath.Path  # of run folders
    heartbeat_seconds: int = HEARTBEAT_SECONDS
    vectorize: int | None = (
        None  # trials that a worker trains together at most; None: TOGETHER on one accelerator, else 1
    )

    @property
    def name(self) -> str:
        """The name of the trials in the storage."""
        return f"{self.study.name}/{self.scale}"


class Fingerprints:
    """The identities of prepared data, by the fields of a config that decide them. Data is prepared at first use."""

    def __init__(self, study: Study, log: Callable[[str], None]):
        self._study, self._log = study, log
        self._found: dict[str, str] = {}

    def __call__(self, experiment: Experiment) -> str:
        if self._study.run is not None:
            return ""  # such trials read no data
        # The seed orders the windows and does not change them.
        fields = {name: value for name, value in data_identity(experiment).items() if name != "data.seed"}
        key = str(fields)
        if key not in self._found:
            self._found[key] = prepare_data(experiment, self._log).identity
        return self._found[key]


class Deadline(StopSignal):
    """A stop request by signal, or once `seconds` have passed."""

    def __init__(self, seconds: float | None):
        super().__init__()
        self._end = None if seconds is None else time.monotonic() + seconds
        self._asked = 0

    def agreed(self, step: int) -> bool:
        """Return whether to stop. Steps are counted over all trials, because several processes need them ascending."""
        self.expire()
        self._asked += 1
        return super().agreed(self._asked)

    def expire(self) -> None:
        """Request a stop if the time is over."""
        if self._end is not None and time.monotonic() > self._end:
            self.requested = True


def work(
    job: Job, *, log: Callable[[str], None], seconds: float | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> bool:  # fmt: skip
    """Run trials until none is left or `seconds` have passed. Return whether the study is complete.

    Every process of a multi-host job calls it; process 0 claims and records. Trials of dead workers are queued again.
    `devices`: those to train on (default: all). Raises StudyError if the storage fails.
    """
    programs, first = Programs(devices), jax.process_index() == 0
    most = most_together(job.study, job.vectorize, len(programs.devices), log)
    fingerprint = Fingerprints(job.study, log)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(TrialStore(job.url, job.name, job.heartbeat_seconds)) if first else None
        stop = stack.enter_context(Deadline(seconds))
        trials, more = plan(job.study, job.scale, fingerprint, [])
        while True:
            stop.expire()
            found = ask_first(lambda: _next(store, trials, more, stop, most))  # noqa: B023 # called at once
            if found["outcomes"]:
                outcomes = [Outcome(**fields) for fields in found["outcomes"]]
                trials, more = plan(job.study, job.scale, fingerprint, outcomes)
                continue
            if not found["claimed"]:
                return found["complete"]
            claimed = [Claimed(*each) for each in found["claimed"]]
            group = [next(trial for trial in trials if trial.id == each.id) for each in claimed]
            if not _run_group(job, store, group, claimed, programs, log, stop):
                return False


def _next(
    store: TrialStore | None, trials: Sequence[Trial], more: bool, stop: Deadline, most: int
) -> dict[str, Any]:  # fmt: skip
    """Return what the processes do next: run the trials in `claimed`, plan again with `outcomes`, or end."""
    assert store is not None, "process 0 has the storage"
    answer: dict[str, Any] = {"claimed": [], "outcomes": None, "complete": False}
    ids = [trial.id for trial in trials]
    store.enqueue(trials)
    while not stop.requested:
        store.recover()
        if claimed := claim_group(store, trials, most):
            return answer | {"claimed": claimed}
        counts = store.counts(ids)
        if not counts.running and not counts.waiting:
            if more and not counts.failed:
                return answer | {"outcomes": [outcome.__dict__ for outcome in store.outcomes()]}
            return answer | {"complete": not counts.failed and not more}
        time.sleep(POLL_SECONDS)
        stop.expire()
    return answer


def _run_group(
    job: Job, store: TrialStore | None, trials: Sequence[Trial], claimed: Sequence[Claimed], programs: Programs,
    log: Callable[[str], None], stop: StopSignal,
) -> bool:  # fmt: skip
    """Run trials, together if they are several, and record each. Return False if they were stopped.

    A fault in a group may be that of another trial or of the group. The trials that it ended are run again alone, and
    fail only if they fail there.
    """
    if len(trials) == 1:
        return _run(job, store, trials[0], claimed[0], programs, log, stop)
    assert store is not None, "one process trains trials together"
    began = time.monotonic()
    with contextlib.ExitStack() as heartbeats:
        for each in claimed:
            heartbeats.enter_context(store.heartbeat(each))
        results = run_together(
            job.study, trials, [_folder(job, trial) for trial in trials], programs,
            [_quiet(log, trial) for trial in trials], stop,
        )  # fmt: skip
        seconds = time.monotonic() - began
        faults = {i: result for i, result in enumerate(results) if isinstance(result, Exception)}
        for i, result in enumerate(results):
            if not isinstance(result, Exception):
                _record(job, store, trials[i], claimed[i], result, seconds, log)
    if (full := next((i for i in faults if disk_is_full(faults[i])), None)) is not None:
        for i in faults:
            store.release(claimed[i])
        raise full_disk(trials[full], faults[full]) from faults[full]
    for i, fault in faults.items():
        if stop.requested:
            _record(job, store, trials[i], claimed[i], None, seconds, log)
            continue
        log(f"{trials[i].label}: did not end in a group of {len(trials)} ({_one_line(fault)}); it continues alone")
        _run(job, store, trials[i], claimed[i], programs, log, stop)
    return None not in results and not (faults and stop.requested)


def _run(
    job: Job, store: TrialStore | None, trial: Trial, claimed: Claimed, programs: Programs,
    log: Callable[[str], None], stop: StopSignal,
) -> bool:  # fmt: skip
    """Run one trial and record it. Return False if it was stopped."""
    quiet, folder = _quiet(log, trial), _folder(job, trial)
    began = time.monotonic()
    try:
        if store is None:
            return run_trial(job.study, trial, folder, programs, log=quiet, stop=stop) is not None
        with store.heartbeat(claimed):
            outcome = run_trial(job.study, trial, folder, programs, log=quiet, stop=stop)
    except (ValueError, RuntimeError, OSError) as error:
        if disk_is_full(error):  # the other trials would fail as well
            if store is not None:
                store.release(claimed)
            raise full_disk(trial, error) from error
        # A fault of the trial: the others run, and the report names it.
        if store is not None:
            store.fail(claimed, f"{type(error).__name__}: {error}")
        log(f"{trial.label}: failed: {error}")
        return True
    return _record(job, store, trial, claimed, outcome, time.monotonic() - began, log)


def _record(
    job: Job, store: TrialStore, trial: Trial, claimed: Claimed, outcome: Mapping[str, Any] | None, seconds: float,
    log: Callable[[str], None],
) -> bool:  # fmt: skip
    """Record the outcome of a trial, or queue it again if there is none. Return whether there is one."""
    if outcome is None:
        store.release(claimed)
        log(f"{trial.label}: stopped; the same command continues it")
        return False
    value = outcome["figures"].get(job.study.metric, float("inf"))
    store.finish(claimed, outcome, value)
    log(line(trial, outcome, job.study.metric, seconds))
    return True


def _folder(job: Job, trial: Trial) -> epath.Path:
    return trial_folder(job.root, job.study.name, job.scale, trial)


def _quiet(log: Callable[[str], None], trial: Trial) -> Callable[[str], None]:
    return functools.partial(_ignore_all_but_warnings, log, trial.label)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def full_disk(trial: Trial, error: Exception) -> StudyError:
    """Return the error that ends a worker whose disk is full."""
    return StudyError(
        f"{trial.label}: the disk is full ({error}); free some space, then repeat the command: finished trials "
        "are kept, and this one continues from its checkpoint"
    )


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, says that the disk or the user's share of it is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):  # of a library that raises another class
            return True
        error = error.__cause__ or error.__context__
    return False


def line(trial: Trial, outcome: Mapping[str, Any], metric: str, seconds: float) -> str:
    """Return the line about a finished trial."""
    value = outcome["figures"].get(metric)
    shown = "diverged" if outcome["diverged"] else "no value" if value is None else f"{value:.4f}"
    return f"{trial.label}: {metric.replace('_', ' ')} {shown}  ({duration(seconds)})"


def _ignore_all_but_warnings(log: Callable[[str], None], label: str, text: str) -> None:
    if text.startswith("warning"):
        log(f"{label}: {text}")


def run_smoke(job: Job, steps: int, log: Callable[[str], None]) -> None:
    """Run the first steps of every arm with seed 0 in a temporary folder, and record nothing."""
    import dataclasses
    import tempfile

    programs = Programs()
    with tempfile.TemporaryDirectory() as folder, StopSignal() as stop:
        for arm, experiment in job.study.experiments(job.scale).items():
            changed = dataclasses.replace(
                experiment,
                train=dataclasses.replace(experiment.train, steps=steps, eval_every=0, eval_windows=2),
                optimizer=dataclasses.replace(experiment.optimizer, warmup_steps=min(steps, 1)),
            )
            trial = Trial(arm, 0, "compare", (), changed, json.dumps(arm)[:16])
            began = time.monotonic()
            outcome = run_trial(
                job.study, trial, epath.Path(folder) / str(len(arm)) / arm[:40], programs, log=_silent, stop=stop
            )
            if outcome is None:
                return
            log(line(trial, outcome, job.study.metric, time.monotonic() - began))


def _silent(text: str) -> None:
    """Log nothing."""
