"""The command `search`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from etils import epath

from experiments.resolve import named_experiment
from experiments.run import prepare_data
from experiments.search.definition import Search, budget, search_name, software
from experiments.search.records import TRIALS, export, write_definition
from experiments.search.space import SearchError, configured, read_space, shorten
from experiments.search.storage import SearchStore, recorded_search, refuse_others
from experiments.search.worker import Training, work
from experiments.study import launch
from experiments.terminal import Column, Line, open_console, print_table
from train.config_io import apply_overrides, flatten
from train.progress import count, duration

RUNS = "runs/searches"


def search(args: argparse.Namespace) -> int:
    """Run a search, or plan it, or write its report. Return 0 once all its trials are done."""
    from experiments.commands import use_compilation_cache

    if args.worker:
        launch.take_cores()
    use_compilation_cache()
    name = search_name(args.subject, args.name)
    if args.worker:
        return _work(args, name)
    launch.leave_accelerators()
    if args.report:
        return _write_report(args, name)
    wanted = _wanted(args, name)
    wanted.validate()
    number, workers = wanted.trials(args.trials), args.workers or launch.default_workers()
    _print_plan(wanted, number, workers)
    if args.dry_run:
        return 0
    if (recorded := recorded_search(args.storage, name)) is not None:
        refuse_others(recorded, wanted)
    write_definition(wanted, _folder(args, name))  # a folder that cannot be written is refused before hours of training
    wanted = replace(wanted, data=prepare_data(configured(wanted.base, wanted.space, {}), _say).identity)
    with SearchStore(args.storage, wanted) as store:
        if args.retry_failed:
            _say(f"{store.retry_failed()} failed trials are queued again")
        store.enqueue(number)
        arguments = ["search", args.subject, "--storage", args.storage, "--trials", str(number)]
        arguments += [] if args.name is None else ["--name", args.name]
        arguments += [] if args.max_minutes is None else ["--max-minutes", str(args.max_minutes)]
        stopped = launch.run_workers(arguments, workers, _status(store, number, workers))
        return stopped or _report(store, number, _folder(args, name))


def _wanted(args: argparse.Namespace, name: str) -> Search:
    """Return the search that the arguments describe, unchecked. Raises SearchError or ConfigError."""
    named = apply_overrides(named_experiment(args.subject), args.overrides)
    steps = budget(named, args.steps)
    return Search(
        name, args.subject, apply_overrides(named, steps), read_space(args.space), (*args.overrides, *steps),
        sampler=args.sampler, pruner=args.pruner, metric=args.metric, seed=args.seed, software=software(),
    )  # fmt: skip


def _work(args: argparse.Namespace, name: str) -> int:
    """Be a worker of a search that is recorded."""
    found = recorded_search(args.storage, name)
    if found is None:
        raise SearchError(f"search {name!r} is not in --storage {args.storage}; start it without --worker")
    seconds = None if args.max_minutes is None else 60.0 * args.max_minutes
    with SearchStore(args.storage, found) as store:
        training = Training(epath.Path(RUNS) / name / "trials", _say)
        return 0 if work(store, args.trials, training, log=_say, seconds=seconds) else 1


def _folder(args: argparse.Namespace, name: str) -> Path:
    """Return the folder of the report."""
    return Path(args.to or Path(RUNS) / name)


def _say(text: str) -> None:
    print(text, flush=True)


def _status(store: SearchStore, number: int, workers: int) -> Callable[[float], str | None]:
    """Return the `status` of `run_workers`: how many trials are done, the best one, and the time that is left."""
    shown, first = 0, store.counts([str(index) for index in range(number)]).done

    def status(seconds: float) -> str | None:
        nonlocal shown
        counts = store.counts([str(index) for index in range(number)])
        if counts.done == shown or counts.done == first:
            return None
        shown = counts.done
        rest = f"; about {duration(seconds / (shown - first) * (number - shown))} left" if shown < number else ""
        return f"[{shown} of {number} trials after {duration(seconds)}{rest}]"

    return status


def _print_plan(search: Search, number: int, workers: int) -> None:
    """Print the space, and what the trials cost."""
    console = open_console()
    base, rows = flatten(search.base), []
    for d in search.space:
        values = d.finite()
        shown = "any" if values is None else str(len(values))
        rows.append(Line((d.field, str(d).partition("=")[2], shown, shorten(base.get(d.field)))))
    console.print(f"search {search.name}: sampler {search.sampler}, pruner {search.pruner}, metric {search.metric}")
    columns = [
        Column("field"),
        Column("space", fold=True),
        Column("values", number=True),
        Column("experiment", fold=True),
    ]
    print_table(console, columns, rows)
    example = configured(search.base, search.space, {})
    flops = launch.trial_flops(example)
    each = f"worker{'s' if workers > 1 else ''}"
    console.print(
        f"{number} trials of {example.train.steps:,} steps ({count(launch.trial_tokens(example))} tokens, {flops:.2g} "
        f"FLOPs each with the experiment's own values); about "
        f"{duration(number * flops / launch.ASSUMED_FLOPS / workers)} with {workers} {each} "
        f"of training if none is pruned (assumed: {launch.ASSUMED_FLOPS / 1e9:.0f} GFLOP/s for each)"
    )


def _write_report(args: argparse.Namespace, name: str) -> int:
    """Write the report again: of what the storage holds, or else of the records in the folder."""
    folder = _folder(args, name)
    local = Path(args.storage.removeprefix("sqlite:///")) if args.storage.startswith("sqlite:///") else None
    found = None if local is not None and not local.exists() else recorded_search(args.storage, name)
    if found is not None:
        with SearchStore(args.storage, found) as store:
            return _report(store, args.trials or 0, folder)
    if not (folder / TRIALS).exists():
        raise SearchError(
            f"--report: search {name!r} is neither in --storage {args.storage} nor in {folder}; run it first, or "
            "give its --name and --storage"
        )
    from experiments.search.report import write_report

    _say(f"report: {write_report(folder)}")
    return 0


def _report(store: SearchStore, number: int, folder: Path) -> int:
    """Write the report of what is recorded, and say what is missing. Return 1 while trials are missing."""
    from experiments.search.report import write_report

    results = store.results()
    counts = store.counts([str(index) for index in range(number)])
    for result in results:
        if result.error:
            _say(f"trial {result.index}: failed: {result.error}; --retry-failed runs it again")
    left = counts.waiting + counts.running
    if left:
        _say(f"{left} trials are left; the same command continues")
    if not any(result.state == "complete" for result in results):
        _say("no trial has finished yet: there is nothing to report")
        return 1
    export(store.search, results, folder)
    _say(f"records: {folder / TRIALS}")
    _say(f"report: {write_report(folder)}")
    return 1 if left or counts.failed else 0
