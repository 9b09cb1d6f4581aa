"""The report of a run: one self-contained HTML file, made from the files of the run's folder.

    path = write_report("runs/NAME")

It works at any time. A run that has just begun, is unfinished, or lacks experts, evaluations or the records of newer
code gets a page of the parts that it has. A damaged file costs its part of the page, and a note at the top names it.
The summary shows the `final` row and, before there is one, the event "started": `parameters_total`,
`parameters_active`, `tokens`, `wall_seconds`, `tokens_per_second`, `mfu`, `mfu_convention`. The verdict compares `sets`
of the final row, {name: {"bits_per_byte": b, "bytes": n, "compressors": {"gzip -9": b, ...}}}.
"""

import os
from collections.abc import Callable, Sequence

from etils import epath

from data.paths import is_local, write_whole
from experiments import report_account as account
from experiments import report_parts as parts
from experiments.html import Html, element, joined, page
from experiments.lifetime import Start, lifetime, starts_of
from experiments.report_parts import Notes, Row
from experiments.routing import study
from train.records import RunFolder, RunFolderError, read_metrics

MOST_EXPERTS = 4096  # for which co-activation is counted; more take too much memory


def write_report(
    run_dir: str | os.PathLike,
    *,
    log: Callable[[str], None] = lambda text: None,
    themes: Sequence[str] = ("light", "dark"),
) -> epath.Path:
    """Write RUN/report.html and the PNGs in RUN/plots/, and return the path of the report.

    `log` receives a line for each part that a damaged file costs; the report has these lines, too. `themes` are the
    appearances for which figures are drawn: with one of them the page has only that one, with none it has no figures.
    Raises RunFolderError if `run_dir` holds no config.json, its metrics cannot be read, or the report cannot be
    written.
    """
    run, notes = RunFolder(run_dir), Notes(log)
    if not run.config.exists():
        raise RunFolderError(f"{run.path} is not a run folder: it has no config.json; name a folder under runs/")
    config, rows = notes.read_json(run.config, dict), usable_rows(run, notes)
    facts = parts.facts_of(rows)
    sets = facts.get("sets")
    sets = sets if isinstance(sets, dict) else {}
    images = _figures(run, config, rows, sets, themes, notes)
    starts = notes.shown("goodput", read_starts, run) or []
    name = str(config.get("name") or folder_name(run))
    made = [
        notes.shown("the verdict", parts.verdict, rows, sets),
        notes.shown("the summary", parts.summary, facts),
        parts.curves(images),
        notes.shown("goodput", account.goodput, lifetime(starts)),
        notes.shown("memory", account.memory, starts),
        notes.shown("completions", parts.completions, run, notes),
        notes.shown("events", parts.events, rows),
        notes.shown("environment.json", parts.environment, notes.read_json(run.environment, dict)),
        notes.shown("changed fields", account.changed_fields, config),
        notes.shown("the config", parts.config_table, config, notes.read_json(run.overrides, list)),
    ]
    origins = notes.shown("the origin", account.origins, run, config, rows)
    head = [element("h1", name), element("p", config.get("question", "")), origins, noted(notes.texts)]
    content = page(name, joined(part for part in head + made if part is not None))
    try:
        if images:
            run.plots.mkdir(exist_ok=True)
        for (figure, appearance), image in images.items():
            if appearance == themes[0]:
                (run.plots / f"{figure}.png").write_bytes(image)
        write_whole(run.report, content)
    except OSError as error:
        raise RunFolderError(
            f"{run.report} cannot be written ({error}); free the disk, or fix the permissions of the run folder"
        ) from error
    return run.report


def read_starts(run: RunFolder) -> list[Start]:
    """Return the starts of a run, whose records may be missing. Raises RunFolderError."""
    return starts_of(read_metrics(run.metrics, superseded=True)) if run.metrics.exists() else []


def folder_name(run: RunFolder) -> str:
    """Return the name of a run's folder."""
    return (run.path.resolve() if is_local(run.path) else run.path).name


def usable_rows(run: RunFolder, notes: Notes) -> Sequence[Row]:
    """Return the rows of metrics.jsonl that have a step, and all events. Raises RunFolderError."""
    if not run.metrics.exists():
        return []
    try:
        rows = read_metrics(run.metrics)
    except RunFolderError:
        raise
    except Exception as error:  # rows that are JSON, but not a run's
        raise RunFolderError(
            f"{run.metrics}: cannot be read ({error!r}); remove the lines that are not metrics rows"
        ) from error

    def usable(row: Row) -> bool:
        step = row.get("step")
        return row["kind"] == "event" or (isinstance(step, int | float) and 0 <= step < 2**53)

    kept = [row for row in rows if usable(row)]
    if len(kept) < len(rows):
        notes.add(f"{len(rows) - len(kept)} rows of metrics.jsonl left out: they have no step")
    return kept


def _figures(
    run: RunFolder, config: Row, rows: Sequence[Row], sets: Row, themes: Sequence[str], notes: Notes
) -> dict[tuple[str, str], bytes]:
    """Return the figures as PNG by name and theme."""
    if not themes:
        return {}
    from experiments import plot_style, plots

    def experts() -> int:
        number = config["model"]["moe"]["num_experts"]
        if type(number) is not int or not 1 <= number <= MOST_EXPERTS:
            raise ValueError(f"model.moe.num_experts = {number}: between 1 and {MOST_EXPERTS}")
        return number

    def compressors() -> dict[str, float]:
        # Level lines in the plot are fair for one held-out set only: compressors differ from set to set.
        only = next(iter(sets.values())).get("compressors", {}) if len(sets) == 1 else {}
        return {str(name): float(bits) for name, bits in only.items()}

    choices = None
    if run.routing.is_dir():
        number = notes.shown("routing/", experts)
        choices = number and notes.shown("routing/", study, run, number, notes.add)
    levels = notes.shown("compressors", compressors) or {}
    palettes = {"light": plot_style.LIGHT, "dark": plot_style.DARK}

    def drawn(draw: Callable) -> dict[str, bytes]:
        figures = {theme: draw(palettes[theme]) for theme in themes}
        return {theme: plots.png(figure) for theme, figure in figures.items() if figure is not None}

    images = {}
    for name, draw in plots.drawings(rows, levels, choices).items():
        for theme, image in (notes.shown(f"figure {name}", drawn, draw) or {}).items():
            images[name, theme] = image
    return images


def noted(texts: Sequence[str]) -> Html:
    return joined(element("p", f"Note: {text}", class_="alarm") for text in texts)
