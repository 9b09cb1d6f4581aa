"""The parts of a report's page on where a run came from, where its time went, and what its train step holds."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data.paths import is_local
from experiments.differences import differing_json, written
from experiments.html import LINES, Html, element, joined, table_row
from experiments.lifetime import PHASES, Lifetime, Start, summary
from train.config_io import ABSENT
from train.progress import duration
from train.records import RunFolder

Row = Mapping[str, Any]

ORIGINS = {
    "imported_from": "Imported from",
    "copied_from": "Copied from the run",
    "upcycled_from": "Upcycled from the run",
    "fine_tuned_from": "Fine-tuned from the run",
    "study": "Part of the study",
}
HEAD_FIELDS = ("name", "question")  # of the config, which the head of the page shows


def goodput(life: Lifetime) -> Html:
    """Return the share of each phase in the run's wall time, as a bar and a table."""
    if not life.wall > 0:
        return Html()
    shares = [(_colour(i), name, s / life.wall) for i, (name, s) in enumerate(life.seconds.items()) if s > 0]
    bar = (
        element("div", style=f"width: {share:.4%}; {colour}", title=f"{PHASES[name]} {share:.1%}")
        for colour, name, share in shares
    )
    lines = (
        element(
            "tr",
            element("td", element("span", class_="swatch", style=colour), PHASES[name]),
            element("td", duration(life.seconds[name]), class_="number"),
            element("td", f"{share:.1%}", class_="number"),
        )
        for colour, name, share in shares
    )
    return joined((
        element("h2", "Where the time went"), element("p", summary(life)), element("div", *bar, class_="stack"),
        element("table", *lines),
    ))  # fmt: skip


def _colour(i: int) -> str:
    """Return the style of phase `i`: a colour of the runs, and beyond these a paler one."""
    colours = len(LINES["light"])
    return f"background: var(--line{i % colours})" + ("; opacity: 0.45" if i >= colours else "")


def memory(starts: Sequence[Start]) -> Html:
    """Return the memory of the train step on each device, as the compiler of the last start planned it."""
    held = next((start.memory for start in reversed(starts) if start.memory), {})
    if not held:
        return Html()
    labels = {
        "arguments": "arguments (state and batch)",
        "updated in place": "updated in place, of the arguments",
        "temporaries": "temporaries",
    }
    figures = {labels.get(name, name): size for name, size in held.items()}
    figures["arguments and temporaries"] = held.get("arguments", 0) + held.get("temporaries", 0)
    lines = (
        element("tr", element("td", name), element("td", f"{size / 1e6:,.1f} MB", class_="number"))
        for name, size in figures.items()
    )
    note = element("p", "Per device, by the compiler's plan.", class_="faint")
    return joined((element("h2", "Memory of the train step"), note, element("table", *lines)))


def origins(run: RunFolder, config: Row, rows: Sequence[Row]) -> Html:
    """Return what the run's weights came from, with links to the reports of parent runs, and its study."""
    found = {
        (label, str(origin.get("run") or origin.get("name") or "")): origin
        for row in rows
        for key, label in ORIGINS.items()
        if row["kind"] == "event" and (origin := _origin(row.get(key)))
    }
    lines = [_origin_line(run, label, text, origin.get("step")) for (label, text), origin in found.items() if text]
    train = config.get("train")
    teacher = train.get("teacher") if isinstance(train, dict) else None
    if teacher:
        lines.append(_origin_line(run, "Learns from the teacher", str(teacher), None))
    return joined(lines)


def _origin(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"run": value} if isinstance(value, str) else {}


def _origin_line(run: RunFolder, label: str, text: str, step: object) -> Html:
    href = run_link(text, run.path)
    name = element("a", text, href=href) if href else element("strong", text)
    at = "" if step is None else f" at step {step}"
    return element("p", f"{label} ", name, f"{at}.", class_="faint")


def run_link(text: str, folder: os.PathLike) -> str | None:
    """Return a link from a page in `folder` to the report of the run at the path `text`, or to its folder where it has
    no report; None where it is not found here. The link is relative, and holds no character that a browser could take
    for a scheme."""
    if not is_local(folder) or not is_local(text):
        return None
    here = Path(folder).resolve()
    for place in (Path(text), here.parent / Path(text).name):
        try:
            if (place / "overrides.json").exists() and place.resolve() != here:
                target = place.resolve() / "report.html" if (place / "report.html").exists() else place.resolve()
                return quote(os.path.relpath(target, here))
        except (OSError, ValueError):  # a text that no file system takes
            continue
    return None


def changed_fields(config: Row) -> Html:
    """Return the fields of the config that differ from the defaults, as a table."""
    found = {name: each for name, each in differing_json(config).items() if name not in HEAD_FIELDS}
    if not found:
        return Html()
    lines = [
        element(
            "tr",
            element("td", name),
            element("td", written(each.value), class_="value"),
            element("td", "" if each.default is ABSENT else written(each.default), class_="value faint"),
        )
        for name, each in found.items()
    ]
    head = table_row("field", "value", "default", head=True)
    return joined((element("h2", "What differs from the defaults"), element("table", head, *lines)))
