"""The command `study`: plan the trials, start workers, and write the report."""

from __future__ import annotations

import glob
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType

from rich.console import Console

from experiments import ACCELERATORS
from experiments.cpu_devices import cores
from experiments.study.definition import Study, StudyError
from experiments.study.storage import TrialStore
from experiments.study.trials import Trial, plan
from experiments.study.worker import Fingerprints, Job
from experiments.terminal import Column, Line, print_table
from model.cost import count_parameters, train_flops_per_token
from train.config import Experiment
from train.progress import count, duration

STUDIES = Path(__file__).resolve().parent.parent / "studies"
NOT_STUDIES = ("__init__", "bases")
RUNS = "runs/studies"
RESTARTS = 3  # of a worker that dies
STATUS_SECONDS = 5.0  # between looks at the trials, which are read from the storage
ASSUMED_FLOPS = 15e9  # per second and core, where no trial was measured; of a small network's whole step


def study_names() -> list[str]:
    """Return the names of the studies in experiments/studies."""
    return sorted(path.stem for path in STUDIES.glob("*.py") if path.stem not in NOT_STUDIES)


def load_study(name: str) -> Study:
    """Return the study of a name, or of the path of a Python file that defines `STUDY`. Raises StudyError."""
    path = Path(name) if name.endswith(".py") else STUDIES / f"{name}.py"
    if not path.is_file() or path.stem in NOT_STUDIES:
        names = study_names()
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise StudyError(f"study {name!r} is unknown; {hint}the studies are {', '.join(names)}, or give a file.py")
    study = getattr(_module(path), "STUDY", None)
    if not isinstance(study, Study):
        raise StudyError(f"{path}: it does not define STUDY = Study(...); see python -m experiments new-study --help")
    if study.name != path.stem:
        raise StudyError(f"{path}: STUDY.name = {study.name!r}; give it the name of the file, {path.stem!r}")
    return study


def _module(path: Path) -> ModuleType:
    if path.parent.resolve() == STUDIES:
        return importlib.import_module(f"experiments.studies.{path.stem}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, "the file ends in .py"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_workers() -> int:
    """Return one worker for each core of a CPU machine, and one for an accelerator machine.

    Workers of one core train as many steps as one run on all cores, and compile, evaluate and save beside each other
    (experiments/LOG.md, 2026-11-27).
    """
    chosen = os.environ.get("JAX_PLATFORMS")
    cpu = chosen == "cpu" if chosen else not any(map(glob.glob, ACCELERATORS))
    return cores() if cpu else 1


def run_workers(arguments: Sequence[str], number: int, status: Callable[[float], str | None]) -> int | None:
    """Start `number` workers, each on its own cores, restart those that die, and wait for all.

    Return the exit code of a command that a signal stopped (130 for Ctrl-C, 143 for SIGTERM), or None.

    `arguments`: of the command line, beginning with the command. `status` returns a line to print about the trials,
    given the seconds since the start, or None if nothing has changed.

    Ctrl-C and SIGTERM are passed on: every worker stops at its next step and saves.
    """
    began = time.monotonic()
    running = {index: _start_worker(arguments, index, number) for index in range(number)}
    restarts, stopped = 0, 0
    looked = -STATUS_SECONDS

    def stop(signum: int, _: object) -> None:
        nonlocal stopped
        stopped = signum
        for process in running.values():
            process.send_signal(signal.SIGTERM)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running:
            time.sleep(1.0)
            for index, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[index]
                if code < 0 and not stopped and restarts < RESTARTS * number:
                    restarts += 1
                    print(f"worker {index} died ({signal.Signals(-code).name}); starting another", flush=True)
                    running[index] = _start_worker(arguments, index, number)
            if not running or time.monotonic() - looked > STATUS_SECONDS:
                looked = time.monotonic()
                if (line := status(looked - began)) is not None:
                    print(line, flush=True)
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
        for process in running.values():
            process.terminate()
    return 128 + stopped if stopped else None


def study_status(store: TrialStore, queue: Queue, workers: int) -> Callable[[float], str | None]:
    """Return the `status` of `run_workers`: how many trials of a study are done, and the time that is left."""
    shown = 0

    def status(seconds: float) -> str | None:
        nonlocal shown
        counts = store.counts([trial.id for trial in queue.trials()])
        if counts.done == shown:
            return None
        shown, left = counts.done, sum(counts) - counts.done
        took = [outcome.seconds for outcome in store.outcomes()]
        rest = f"; about {duration(sum(took) / max(len(took), 1) * left / workers)} left" if left else ""
        return f"[{shown} of {sum(counts)} trials after {duration(seconds)}{rest}]"

    return status


def _start_worker(arguments: Sequence[str], index: int, number: int) -> subprocess.Popen:
    """Start a worker. `take_cores` reads its number."""
    environment = os.environ | {"MESHWORK_WORKER": f"{index}/{number}"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments, "--worker"], env=environment,
        start_new_session=True,  # Ctrl-C reaches the workers once, from `run_workers`
    )  # fmt: skip


def leave_accelerators() -> None:
    """Keep this process, which only plans and reports, off the accelerators that its workers need."""
    import jax

    jax.config.update("jax_platforms", "cpu")


def take_cores() -> None:
    """Keep this worker on its share of the cores, before JAX starts its threads."""
    index, _, number = os.environ.get("MESHWORK_WORKER", "0/1").partition("/")
    if not hasattr(os, "sched_setaffinity") or not hasattr(os, "sched_getaffinity") or int(number) < 2:
        return
    own = sorted(os.sched_getaffinity(0))
    share = own[int(index) :: int(number)]
    if share:
        os.sched_setaffinity(0, share)


def print_plan(job: Job, store: TrialStore | None, workers: int, console: Console) -> None:
    """Print the trials of a study with their size and time."""
    arms = job.study.experiments(job.scale)
    scale = job.study.scale(job.scale)
    took = {} if store is None else {o.arm: o.seconds for o in store.outcomes()}
    rows, total = [], 0.0
    tunings = 1
    for factors in job.study.tune.values():
        tunings *= len(factors)
    trials = scale.seeds + (scale.tune_seeds * tunings if job.study.tune else 0)
    for label, experiment in arms.items():
        flops = trial_flops(experiment)
        seconds = took.get(label, flops / ASSUMED_FLOPS)
        total += seconds * trials
        rows.append(Line((label, str(trials), count(count_parameters(experiment.model).total), f"{flops:.2g}",
                          duration(seconds) + ("" if label in took else " (assumed)"))))  # fmt: skip
    console.print(f"{job.study.name}: {job.study.question}")
    columns = [Column("arm", fold=True), Column("trials", number=True), Column("parameters", number=True),
               Column("FLOPs a trial", number=True), Column("time a trial", number=True)]  # fmt: skip
    print_table(console, columns, rows)
    budgets = sorted({trial_tokens(experiment) for experiment in arms.values()})
    tokens = " to ".join(count(n) for n in dict.fromkeys((budgets[0], budgets[-1])))
    console.print(
        f"{len(arms) * trials} trials of {tokens} tokens at scale {job.scale}; about "
        f"{duration(total / workers)} with {workers} worker{'s' if workers > 1 else ''}"
    )
    for claim in job.study.claims:
        console.print(f"claim: {claim.text}")


def trial_flops(experiment: Experiment) -> float:
    """Return the FLOPs of the training of one trial."""
    return train_flops_per_token(experiment.model, experiment.data.sequence_length) * trial_tokens(experiment)


def trial_tokens(experiment: Experiment) -> int:
    """Return the tokens on which a trial trains."""
    return experiment.train.steps * experiment.data.batch_size * experiment.data.sequence_length


class Queue:
    """The trials that can be planned with what is recorded; planned again when more is recorded."""

    def __init__(self, job: Job, store: TrialStore, log: Callable[[str], None]):
        self._job, self._store, self._fingerprint = job, store, Fingerprints(job.study, log)
        self._known: tuple[int, list[Trial]] = (-1, [])

    def trials(self) -> list[Trial]:
        """Return the trials, in order."""
        outcomes = self._store.outcomes()
        if self._known[0] != len(outcomes):
            self._known = len(outcomes), plan(self._job.study, self._job.scale, self._fingerprint, outcomes)[0]
        return self._known[1]
