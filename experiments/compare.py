"""The comparison of several runs: one self-contained HTML page that overlays their curves.

path = write_comparison([RunFolder("runs/a"), RunFolder("runs/b")], Path("runs/comparison.html"))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.paths import is_local, write_whole
from experiments import report_parts as parts
from experiments.differences import written
from experiments.html import LINES, Html, element, joined, page, table_row
from experiments.lifetime import Lifetime, lifetime
from experiments.report import folder_name, noted, read_starts, usable_rows
from experiments.report_account import run_link
from experiments.report_parts import Notes, Row
from train.config_io import flatten
from train.progress import count, duration
from train.records import RunFolder, RunFolderError

ABOUT = ("name", "question", "source", "cost")  # fields of a config that describe a run and change nothing


class Compared(NamedTuple):
    """A run of the comparison."""

    label: str
    run: RunFolder
    config: Row
    rows: Sequence[Row]
    facts: Row
    tokenizer: str  # equal for equal tokenizers
    life: Lifetime


def write_comparison(
    runs: Sequence[RunFolder],
    path: Path,
    *,
    log: Callable[[str], None] = lambda text: None,
    themes: Sequence[str] = ("light", "dark"),
) -> Path:
    """Write the page that compares the runs, and return its path.

    `log` receives a line for each part that a damaged file costs; the page has these lines, too. `themes` are the
    appearances for which figures are drawn. Raises RunFolderError if a run is given twice or has no rows of training
    or evaluation, if its metrics cannot be read, or if the page cannot be written.
    """
    notes = Notes(log)
    compared = _read(runs, notes)
    remarks = notes.shown("the remarks", _remarks, compared) or []
    images = notes.shown("the figures", _figures, compared, themes) or {}
    made = [
        *(element("p", text) for text in remarks),
        notes.shown("the final figures", _figures_table, compared, path),
        parts.curves(images),
        notes.shown("the configs", _config_table, compared),
    ]
    title = " and ".join(each.label for each in compared) if len(compared) == 2 else f"{len(compared)} runs"
    head = [element("h1", f"Comparison of {title}"), noted(notes.texts)]
    content = page(f"Comparison of {title}", joined(part for part in head + made if part is not None))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise RunFolderError(f"--to {path}: cannot be written ({error}); choose another file") from error
    return path


def _read(runs: Sequence[RunFolder], notes: Notes) -> list[Compared]:
    """Return what the folders of the runs hold. Raises RunFolderError."""
    places = [str(run.path.resolve() if is_local(run.path) else run.path) for run in runs]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise RunFolderError(f"run {twice} is given twice; give each run once")
    names = [folder_name(run) for run in runs]
    found = []
    for run, place, name in zip(runs, places, names, strict=True):
        rows = usable_rows(run, notes)
        if not any(row["kind"] in ("train", "eval") for row in rows):
            raise RunFolderError(
                f"run {run.path} has no rows of training or evaluation to compare; train it first, or leave it out"
            )
        config = notes.read_json(run.config, dict)
        label = name if names.count(name) == 1 else place
        life = lifetime(notes.shown(f"goodput of {label}", read_starts, run) or [])
        found.append(Compared(label, run, config, rows, parts.facts_of(rows), _tokenizer(run, config), life))
    if any(not each.tokenizer.startswith("identity ") for each in found):  # compare the same evidence of all
        found = [each._replace(tokenizer=_configured_tokenizer(each.config)) for each in found]
    return found


def _tokenizer(run: RunFolder, config: Row) -> str:
    try:
        return f"identity {json.loads((run.tokenizer / 'tokenizer.json').read_text())['identity']}"
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
        return _configured_tokenizer(config)


def _configured_tokenizer(config: Row) -> str:
    return json.dumps({name: value for name, value in flatten(config).items() if name.startswith("data.tokenizer.")})


def _remarks(compared: Sequence[Compared]) -> list[str]:
    """Return what a reader must know before comparing the figures."""
    remarks = []
    if _tokenizers_differ(compared):
        remarks.append(
            "The runs have different tokenizers. Their losses per token do not compare, so the training curve shows "
            "bits per byte, which do."
        )
    objectives = {flatten(each.config).get("train.objective") for each in compared}
    if len(objectives) > 1:
        remarks.append("The runs have different training objectives, so their training losses do not compare.")
    for name in _set_names(compared):
        sizes = {sets[name]["bytes"] for each in compared if name in (sets := _sets(each)) and "bytes" in sets[name]}
        if len(sizes) > 1:
            remarks.append(f"The held-out set {name} is not the same text in every run, so its figures do not compare.")
    unfinished = [each.label for each in compared if not _finished(each)]
    if unfinished:
        remarks.append(
            f"Not finished: {', '.join(unfinished)}. The held-out figures of such a run are those of its last "
            "evaluation, which may cover less text."
        )
    return remarks


def _tokenizers_differ(compared: Sequence[Compared]) -> bool:
    return len({each.tokenizer for each in compared}) > 1


def _finished(each: Compared) -> bool:
    return any(row["kind"] == "final" for row in each.rows)


def _sets(each: Compared) -> dict[str, Row]:
    """Return the newest figures of each held-out set: the final ones, else those of the last evaluation."""
    last = {str(row["set"]): row for row in each.rows if row["kind"] == "eval"}
    final = each.facts.get("sets")
    return {**last, **final} if isinstance(final, dict) else last


def _set_names(compared: Sequence[Compared]) -> list[str]:
    return list(dict.fromkeys(name for each in compared for name in _sets(each)))


# ---- tables ----


def _figures_table(compared: Sequence[Compared], path: Path) -> Html:
    """Return a table of the runs with their final figures; where all runs are finished, the least bits per byte
    of each set are bold."""
    columns: list[tuple[str, Callable[[Compared], Any], Callable[[Any], str]]] = [
        ("steps", lambda each: each.facts.get("step"), lambda n: f"{n:,}"),
        ("parameters", lambda each: each.facts.get("parameters_total"), count),
        ("active", lambda each: each.facts.get("parameters_active"), count),
        ("tokens", lambda each: each.facts.get("tokens"), count),
        ("wall time", lambda each: each.facts.get("wall_seconds"), duration),
        ("tokens/s", lambda each: each.facts.get("tokens_per_second"), count),
        ("goodput", lambda each: each.life.goodput, "{:.1%}".format),
        ("restarts", lambda each: each.life.restarts or None, "{:,}".format),
        ("repeated steps", lambda each: each.life.repeated_steps or None, "{:,}".format),
    ]
    measure = "bits_per_byte" if _tokenizers_differ(compared) else "loss"
    columns.append(
        ("train bits/byte" if measure != "loss" else "train loss", lambda each: _last(each, measure), "{:.4f}".format)
    )
    for name in _set_names(compared):
        columns.append((f"{name} bits/byte", _bits_on(name), "{:.4f}".format))
    columns = [column for column in columns if any(column[1](each) is not None for each in compared)]

    finished = all(_finished(each) for each in compared)

    def best(of: Callable[[Compared], Any]) -> Any:
        values = [value for each in compared if (value := of(each)) is not None]
        return min(values, default=None) if finished else None

    lines = []
    for i, each in enumerate(compared):
        href = run_link(str(each.run.path), path.parent)
        name = element("a", each.label, href=href) if href else each.label
        cells = [element("td", element("span", class_="swatch", style=f"background: {_colour(i)}"), name)]
        for title, of, form in columns:
            value = of(each)
            shown = "" if value is None else form(value)
            bold = title.endswith("bits/byte") and value is not None and value == best(of)
            cells.append(element("td", element("b", shown) if bold else shown, class_="number"))
        lines.append(element("tr", *cells))
    head = element("tr", element("th", "run"), *(element("th", title, class_="number") for title, _, _ in columns))
    table = element("div", element("table", head, *lines), class_="scroll")
    return joined((element("h2", "Final figures"), table))


def _bits_on(name: str) -> Callable[[Compared], float | None]:
    return lambda each: _sets(each).get(name, {}).get("bits_per_byte")


def _last(each: Compared, key: str) -> float | None:
    """Return the smoothed last value of a train row's key."""
    from experiments.plot_style import series, smooth

    values = series([row for row in each.rows if row["kind"] == "train"], key)[1]
    averaged = smooth(values, len(values) / 100)
    return float(averaged[-1]) if len(averaged) and averaged[-1] == averaged[-1] else None


def _colour(i: int) -> str:
    return f"var(--line{i % len(LINES['light'])})"


def _config_table(compared: Sequence[Compared]) -> Html:
    """Return a table of the config fields in which the runs differ."""
    configs = [flatten(each.config) for each in compared]
    names = [name for name in dict.fromkeys(name for config in configs for name in config) if name not in ABOUT]
    absent = object()
    differing = [name for name in names if any(c.get(name, absent) != configs[0].get(name, absent) for c in configs)]
    title = element("h2", "Config fields in which the runs differ")
    if not differing:
        return joined((title, element("p", "None: the runs have the same config.", class_="faint")))
    head = table_row("field", *(each.label for each in compared), head=True)
    lines = [
        element(
            "tr",
            element("td", name),
            *(element("td", written(c[name]) if name in c else "", class_="value") for c in configs),
        )
        for name in differing
    ]
    return joined((title, element("div", element("table", head, *lines), class_="scroll")))


# ---- figures ----


def _figures(compared: Sequence[Compared], themes: Sequence[str]) -> dict[tuple[str, str], bytes]:
    """Return the overlaid curves as PNG by name and theme."""
    if not themes:
        return {}
    from experiments import plot_style, plots

    palettes = {"light": plot_style.LIGHT, "dark": plot_style.DARK}
    by_token = "bits_per_byte" if _tokenizers_differ(compared) else "loss"
    training = [[row for row in each.rows if row["kind"] == "train"] for each in compared]
    evaluations = [_evaluations(each, several=len(_set_names(compared)) > 1) for each in compared]
    axis, per_step = _axis(compared)

    def curves(lines: Sequence[Mapping[str, Sequence[Row]]], key: str, smoothed: bool):
        drawn = []
        for i, (each, named, factor) in enumerate(zip(compared, lines, per_step, strict=True)):
            for j, (suffix, rows) in enumerate(named.items()):
                steps, values = plot_style.series(rows, key)
                if smoothed:
                    values = plot_style.smooth(values, len(values) / 100)
                drawn.append(plots.Curve(f"{each.label}{suffix}", i, j, steps * factor, values))
        return drawn

    alone = [{"": rows} for rows in training]
    specified = {
        "training_loss": (
            "Training loss, smoothed" if by_token == "loss" else "Training bits per byte, smoothed",
            "nats per token" if by_token == "loss" else "bits per byte",
            curves(alone, by_token, True),
        ),
        "bits_per_byte": ("Held-out bits per byte", "bits per byte", curves(evaluations, "bits_per_byte", False)),
        "learning_rate": ("Learning rate", "", curves(alone, "learning_rate", False)),
        "tokens_per_second": ("Throughput, smoothed", "tokens per second", curves(alone, "tokens_per_second", True)),
    }
    images = {}
    for name, (title, unit, drawn) in specified.items():
        for theme in themes:
            figure = plots.overlay(palettes[theme], title, unit, axis, drawn, from_zero=name == "tokens_per_second")
            if figure is not None:
                images[name, theme] = plots.png(figure)
    return images


def _evaluations(each: Compared, *, several: bool) -> dict[str, list[Row]]:
    """Return the eval rows by the end of their label: the held-out set, if there are several."""
    found: dict[str, list[Row]] = {}
    for row in each.rows:
        if row["kind"] == "eval":
            found.setdefault(f", {row['set']}" if several else "", []).append(row)
    return found


def _axis(compared: Sequence[Compared]) -> tuple[str, list[float]]:
    """Return the label of the x axis and each run's factor from steps: tokens, if steps differ in tokens."""
    per_step = []
    for each in compared:
        fields = flatten(each.config)
        rows, length = fields.get("data.batch_size"), fields.get("data.sequence_length")
        if type(rows) is not int or type(length) is not int or rows < 1 or length < 1:
            return "step", [1.0] * len(compared)
        per_step.append(float(rows * length))
    return ("step", [1.0] * len(compared)) if len(set(per_step)) == 1 else ("tokens trained on", per_step)
