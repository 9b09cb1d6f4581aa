"""The commands `study` and `new-study`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from etils import epath

from experiments.study import launch
from experiments.study.definition import StudyError
from experiments.study.storage import TrialStore
from experiments.study.worker import Job, run_smoke, work
from experiments.terminal import open_console

SMOKE_STEPS = 5
SKELETON = '''"""{question}"""

from experiments.studies.bases import dense, scales
from experiments.study.definition import Claim, Study

STUDY = Study(
    name="{name}",
    question="{question}",
    source="",  # paper and table
    base=dense(),
    arms={{
        "baseline": {{}},
        "changed": {{"model.mlp.kind": "relu"}},  # dotted fields of the base experiment and their values
    }},
    scales=scales(seeds=5),
    claims=(Claim("the change helps", arm="changed", expected="lower", than="baseline"),),
)
'''


def study(args: argparse.Namespace) -> int:
    """Run a study, or plan it, or write its report. Return 0 once it is complete."""
    if args.subject is None:
        return _list()
    found = launch.load_study(args.subject)
    job = Job(found, args.scale, args.storage, epath.Path(launch.RUNS), vectorize=args.vectorize)
    found.experiments(args.scale)  # all checks, before anything starts
    if args.worker:
        launch.take_cores()
    from experiments.commands import join_processes, use_compilation_cache

    if args.distributed:
        join_processes()
    use_compilation_cache()
    seconds = None if args.max_minutes is None else 60.0 * args.max_minutes
    if args.worker or args.distributed:
        return 0 if work(job, log=_say, seconds=seconds) else 1
    if args.smoke:
        run_smoke(job, SMOKE_STEPS, _say)
        return 0
    workers = args.workers or launch.default_workers()
    launch.leave_accelerators()
    with TrialStore(args.storage, job.name) as store:
        if args.dry_run:
            launch.print_plan(job, store, workers, open_console())
            return 0
        stopped = None if args.report else _run(args, job, store, workers)
        return stopped or _report(job, store, Path(args.to))


def _say(text: str) -> None:
    print(text, flush=True)


def _run(args: argparse.Namespace, job: Job, store: TrialStore, workers: int) -> int | None:
    """Start workers and wait. Return the exit code if a signal stopped them."""
    if args.retry_failed:
        _say(f"{store.retry_failed()} failed trials are queued again")
    launch.print_plan(job, store, workers, open_console())
    arguments = ["study", args.subject, "--scale", args.scale, "--storage", args.storage]
    if args.max_minutes is not None:
        arguments += ["--max-minutes", str(args.max_minutes)]
    if args.vectorize is not None:
        arguments += ["--vectorize", str(args.vectorize)]
    queue = launch.Queue(job, store, _say)
    store.enqueue(queue.trials())  # also prepares the data once
    return launch.run_workers(arguments, workers, launch.study_status(store, queue, workers))


def _report(job: Job, store: TrialStore, folder: Path) -> int:
    """Write the report of what is recorded, and say what is missing. Return 1 while trials are missing."""
    from experiments.study.records import export
    from experiments.study.report import write_report

    trials = launch.Queue(job, store, _say).trials()
    counts, failures = store.counts([trial.id for trial in trials]), store.failures()
    for trial in trials:
        if trial.id in failures:
            _say(f"{trial.label}: failed: {failures[trial.id]}; --retry-failed runs it again")
    if not counts.done:
        _say("no trial is finished yet: there is nothing to report")
        return 1
    path = export(job, store, trials, folder)
    _say(f"records: {path}")
    _say(f"report: {write_report(job.study, path)}")
    left = counts.waiting + counts.running
    if left:
        _say(f"{left} trials are left; the same command continues")
    return 1 if left or counts.failed else 0


def _list() -> int:
    from experiments.terminal import Column, Line, print_table

    studies = [launch.load_study(name) for name in launch.study_names()]
    columns = [Column("study", style="bold"), Column("question", fold=True), Column("source", fold=True, drop=1)]
    print_table(open_console(), columns, [Line((s.name, s.question, s.source)) for s in studies])
    return 0


def new_study(args: argparse.Namespace) -> int:
    """Write the skeleton of a study."""
    name = args.subject
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise StudyError(f"new-study {name}: it names a Python file; use lower-case letters, digits and '_'")
    path = launch.STUDIES / f"{name}.py"
    if path.exists() or name in launch.NOT_STUDIES:
        raise StudyError(f"{path}: exists; choose another name")
    path.write_text(SKELETON.format(name=name, question=args.question), encoding="utf-8")
    shown = os.path.relpath(path)
    _say(f"wrote {shown}. Change its arms and claims, then:\n  python -m experiments study {name} --dry-run")
    return 0
