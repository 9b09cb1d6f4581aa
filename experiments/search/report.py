"""The report of a search: a Markdown page with the best trial, tables and figures, made from its records alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from data.paths import write_whole
from experiments.search.definition import METRICS, Search
from experiments.search.figures import (
    curves_figure,
    history_figure,
    importance_figure,
    metric_name,
    parallel_figure,
    positions,
    slices_figure,
)
from experiments.search.importance import FEWEST, importances
from experiments.search.records import TRIALS, Result, Table, read
from experiments.search.samplers import REDUCTION, STARTUP_TRIALS, UNPRUNED_TRIALS
from experiments.search.space import Dimension, SearchError, shorten
from experiments.study.figures import save
from train.config_io import flatten
from train.progress import count, duration

SHOWN = 10  # trials of the table
NEAR_END = 0.05  # of a dimension's length: where the best value suggests a wider range


def write_report(folder: Path) -> Path:
    """Write report.md and its figures from the records in a folder. Return the page's path. Raises SearchError."""
    table = read(folder)
    best = table.best()
    if best is None:
        raise SearchError(
            f"{folder / TRIALS}: no trial has finished with a finite {metric_name(table)}; run the search further, or "
            "lower the learning rate if all diverged"
        )
    found, method = importances(table)
    figures = {
        "history": history_figure(table), "slices": slices_figure(table), "parallel": parallel_figure(table),
        "importance": importance_figure(found), "curves": curves_figure(table),
    }  # fmt: skip
    page = folder / "report.md"
    try:
        for name, figure in figures.items():
            path = folder / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)
            else:
                save(figure, path)
        drawn = [name for name, figure in figures.items() if figure is not None]
        write_whole(page, "\n".join(_page(table, best, drawn, found, method)))
    except OSError as error:
        raise SearchError(
            f"--to {folder}: the report cannot be written ({error}); free the disk, fix the permissions, or choose "
            "another folder with --to"
        ) from error
    return page


def _page(table: Table, best: Result, drawn: Sequence[str], found: Mapping[str, float], method: str) -> list[str]:
    search, name = table.search, metric_name(table)
    states = {state: len(table.ended(state)) for state in ("complete", "pruned", "diverged", "failed")}
    words = {"complete": "finished"}
    counts = ", ".join(f"{number} {words.get(state, state)}" for state, number in states.items() if number)
    lines = [
        f"# Search {search.name}", "",
        f"**Trial {best.index} has the lowest {name}, {best.value:.4f}.** {len(table.results)} trials: {counts}.", "",
        "| field | best | of experiment " + f"`{search.experiment}`" + " | space | note |", "|---|---|---|---|---|",
    ]  # fmt: skip
    base = flatten(search.base)
    for d in search.space:
        own = base.get(d.field)
        spec = str(d).partition("=")[2]
        note = "at the end of the range: a wider one may be better" if _at_the_end(d, best) else ""
        lines.append(f"| `{d.field}` | {shorten(best.values[d.field])} | {shorten(own)} | `{spec}` | {note} |")
    lines += [
        "", f"Chance helps to choose the best of many trials, so its {name} is optimistic. Train it with other seeds "
        "(`--set train.seed=1`) before you trust a small difference:", "",
        "```bash", _command(search, best), "```", "",
    ]  # fmt: skip
    lines += [f"![{figure}]({figure}.png)" for figure in drawn]
    if found:
        lines += ["", f"Importance by {method}; finished trials alone.", "", "| field | importance |", "|---|---|"]
        lines += [f"| `{field}` | {value:.2f} |" for field, value in found.items()]
    elif len(search.space) > 1:
        lines += ["", f"No importance of the fields is stated: that needs at least {FEWEST} finished trials."]
    lines += [
        "",
        "## Best trials",
        "",
        *_trials_table(table),
        *_failed(table),
        "",
        "## Protocol",
        "",
        *_protocol(table),
    ]
    return [*lines, ""]


def _at_the_end(d: Dimension, best: Result) -> bool:
    if d.kind == "choice":
        return False
    place = float(positions(d, [best.values[d.field]])[0])
    return min(place, 1 - place) < NEAR_END


def _command(search: Search, best: Result) -> str:
    """Return the command that trains the best trial again."""
    overrides = [*search.overrides, *(d.override(best.values[d.field]) for d in search.space)]
    changes = " ".join(f"--set {shlex.quote(override)}" for override in overrides)
    return f"python -m experiments train {search.experiment} --run {search.name}-best {changes}"


def _trials_table(table: Table) -> list[str]:
    search = table.search
    shown = sorted(table.ended("complete"), key=lambda r: (r.value or 0.0, r.index))[:SHOWN]
    head = ["trial", metric_name(table), *(f"`{d.short}`" for d in search.space), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in shown:
        values = [shorten(r.values[d.field]) for d in search.space]
        lines.append(f"| {r.index} | {r.value:.4f} | " + " | ".join([*values, f"{r.seconds:.0f}"]) + " |")
    return lines


def _failed(table: Table) -> list[str]:
    failed = table.ended("failed")
    if not failed:
        return []
    lines = ["", "## Failed trials", "", "`--retry-failed` runs them once more.", ""]
    for r in failed:
        values = ", ".join(f"{field} = {shorten(value)}" for field, value in r.values.items())
        lines.append(f"- trial {r.index} ({values}): {r.error}")
    return lines


def _protocol(table: Table) -> list[str]:
    search = table.search
    train, data = search.base.train, search.base.data
    tokens = train.steps * data.batch_size * data.sequence_length
    samplers = {
        "tpe": f"a tree-structured Parzen estimator (multivariate; the first {STARTUP_TRIALS} trials are random)",
        "cmaes": "CMA-ES", "random": "random values", "grid": f"a grid of {search.grid_size()} points in random order",
    }  # fmt: skip
    pruners = {
        "none": "No trial is pruned",
        "median": f"A trial is pruned at an evaluation at which it is worse than the median of the finished ones, "
        f"after a quarter of the steps and once {UNPRUNED_TRIALS} have finished",
        "hyperband": f"Hyperband prunes trials at evaluations, reduction factor {REDUCTION}",
    }
    spent = sum(r.seconds for r in table.results)
    devices = ", ".join(sorted({r.device for r in table.results if r.device}))
    dates = sorted(r.date for r in table.results if r.date)
    suffix = search.name.removeprefix(search.experiment).removeprefix("-")
    name = f" --name {suffix}" if suffix else ""
    return [
        f"- Experiment `{search.experiment}`; {train.steps:,} steps of {data.batch_size} x {data.sequence_length} "
        f"tokens ({count(tokens)}) for each trial, except where the space changes them; seed {train.seed} of the "
        "weights in every trial.",
        f"- The metric is `{search.metric}` ({METRICS[search.metric]}) on the whole first held-out set at the end of a "
        "trial. Pruning, and all but the last point of a curve, use the evaluations during training, of "
        "`train.eval_windows` windows.",
        f"- Proposals: {samplers[search.sampler]}, seed {search.seed}. {pruners[search.pruner]}. A trial that diverges "
        "counts as uniform predictions.",
        f"- {duration(spent)} of training in all (processor time on a CPU, one core each). {devices}. "
        f"{search.software}. {dates[0] if dates else ''}"
        + (f" to {dates[-1]}." if dates and dates[0] != dates[-1] else "."),
        f"- Records: [{TRIALS}]({TRIALS}), [search.json](search.json). Page and figures are made from them: `python -m "
        f"experiments search {search.experiment}{name} --report`.",
    ]
