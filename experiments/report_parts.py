"""The parts of a report's page, each made from one file of the run's folder."""

import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from experiments.html import Html, element, joined, table_row
from train.config_io import flatten
from train.progress import count, duration
from train.records import RunFolder

Row = Mapping[str, Any]

BAD_EVENTS = {"nonfinite", "rewound", "warning"}


class Notes:
    """The parts that a report could not show, and why."""

    def __init__(self, log: Callable[[str], None]):
        self.texts: list[str] = []
        self._log = log

    def add(self, text: str) -> None:
        """Add a note, and log it."""
        self.texts.append(text)
        self._log(f"report: {text}")

    def shown(self, what: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """Return `make(*arguments)`. If the content of a file makes it fail, add a note and return None."""
        try:
            return make(*arguments)
        except Exception as error:  # a damaged or foreign file can hold anything
            reason = (str(error).splitlines() or [""])[0][:200]
            self.add(f"{what} left out: {type(error).__name__}{': ' if reason else ''}{reason}")
            return None

    def read_json(self, path: epath.Path, kind: type) -> Any:
        """Return the value in a JSON file if it is a `kind`, else an empty one, with a note unless it is missing."""

        def read() -> Any:
            value = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(value, kind):
                raise ValueError(f"expected a JSON {'object' if kind is dict else 'array'}")
            return value

        value = self.shown(path.name, read) if path.exists() else None
        return kind() if value is None else value


def facts_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the facts about the whole run, from the event "started", the last train row and the final row; later ones
    win."""
    facts: dict[str, Any] = {}
    for row in rows:
        if row.get("event") == "started":
            facts |= row
    trained = [row for row in rows if row["kind"] == "train"]
    for key in ("step", "tokens_per_second", "mfu"):
        if trained and key in trained[-1]:
            facts[key] = trained[-1][key]
    for row in rows:
        if row["kind"] == "final":
            facts |= row
    return facts


def verdict(rows: Sequence[Row], sets: Mapping[str, Row]) -> Html:
    """Return the held-out figures beside those of compressors; before the end, the figures so far."""
    if not sets:
        last = {row["set"]: row for row in rows if row["kind"] == "eval"}
        if not last:
            return element("p", "No held-out figure yet.", class_="verdict")
        figures = "; ".join(
            f"{name} {'not finite' if r['bits_per_byte'] is None else format(r['bits_per_byte'], '.3f')} at step "
            f"{r['step']}"
            for name, r in last.items()
        )
        return element(
            "p", "Not finished. Held-out bits per byte so far: ", element("strong", figures), ".", class_="verdict"
        )
    note = element(
        "p",
        "Bits per byte; less is better. The compressors compress the same bytes, each held-out file separately.",
        class_="faint",
    )
    parts = [_verdict_on(name, figures) for name, figures in sets.items()]
    return joined([*parts, note] if any(s.get("compressors") for s in sets.values()) else parts)


def _verdict_on(name: str, figures: Row) -> Html:
    """Return the sentence on one held-out set, and its bars."""
    ours, others = figures["bits_per_byte"], figures.get("compressors", {})
    if ours is None:
        return element("p", f"{name}: the held-out loss is not finite.", class_="verdict alarm")
    size = f" ({count(figures['bytes'])}B)" if "bytes" in figures else ""
    beaten = [n for n, bits in others.items() if ours < bits]
    missed = [n for n, bits in others.items() if ours >= bits]
    words = f" on held-out {name}{size}"
    if beaten:
        words += f": better than {_and(beaten)}"
    if missed:
        words += f"{', ' if beaten else ': '}not as good as {_and(missed)}"
    scale = 70 / max([ours, *others.values()])
    bars = (
        joined((
            element("span", n),
            element(
                "div",
                element("div", class_="bar model" if n == "model" else "bar", style=f"width: {bits * scale:.2f}%"),
                f"{bits:.3f}",
                class_="cell",
            ),
        ))
        for n, bits in sorted({"model": ours, **others}.items(), key=lambda item: item[1])
    )  # fmt: skip
    sentence = element("p", element("strong", f"{ours:.3f} bits per byte"), words, ".", class_="verdict")
    return joined((sentence, element("div", *bars, class_="bars")))


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def summary(facts: Row) -> Html:
    """Return the size, length and speed of the run."""
    cells = []

    def cell(key: str, label: str, form: Callable[[Any], str]) -> None:
        if facts.get(key) is not None:
            cells.append(element("div", element("b", form(facts[key])), element("span", label)))

    cell("parameters_total", "parameters", count)
    cell("parameters_active", "parameters active per token", count)
    cell("step", "steps", lambda n: f"{n:,}")
    cell("tokens", "tokens trained on", count)
    cell("wall_seconds", "wall time", duration)
    cell("tokens_per_second", "tokens per second", count)
    cell("mfu", "model FLOP utilization", "{:.1%}".format)
    title = element("h2", "Summary")
    if not cells:
        return joined((title, element("p", "No step has been taken yet.", class_="faint")))
    parts = [title, element("div", *cells, class_="facts")]
    if (convention := facts.get("mfu_convention")) and facts.get("mfu") is not None:
        parts.append(element("p", f"MFU: {convention}.", class_="faint"))
    return joined(parts)


def curves(images: Mapping[tuple[str, str], bytes]) -> Html:
    """Return the figures, PNGs by name and theme, inlined; the browser chooses the theme."""
    parts = []
    for name in dict.fromkeys(name for name, _ in images):
        data = {
            theme: f"data:image/png;base64,{base64.b64encode(images[name, theme]).decode()}"
            for theme in ("light", "dark")
            if (name, theme) in images
        }
        dark = [element("source", media="(prefers-color-scheme: dark)", srcset=data["dark"])] if len(data) > 1 else []
        image = element("img", alt=name.replace("_", " "), src=next(iter(data.values())))
        wide = "wide" if name in ("expert_load", "co_activation") else ""
        parts.append(element("figure", element("picture", *dark, image), class_=wide))
    return joined((element("h2", "Curves"), element("div", *parts, class_="plots"))) if parts else Html()


def completions(run: RunFolder, notes: Notes) -> Html:
    """Return the completions in samples.jsonl, beside the texts that the files continue with."""
    if not run.samples.exists():
        return Html()
    parts = []
    for number, line in enumerate(run.samples.read_bytes().split(b"\n"), start=1):
        if line.strip():
            parts.append(notes.shown(f"samples.jsonl, line {number}", _sample, line))
    found = [part for part in parts if part is not None]
    note = element("p", "From held-out files. Marked: the part that agrees from the start.", class_="faint")
    return joined((element("h2", "Completions"), note, *found)) if found else Html()


def _sample(line: bytes) -> Html:
    row = json.loads(line)
    prompt, completion, reference = (str(row.get(key, "")) for key in ("prompt", "completion", "reference"))
    pairs = zip(completion, reference, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(completion), len(reference)))

    def column(title: str, text: str, agreeing: int) -> Html:
        marked = [element("mark", text[:agreeing])] if agreeing else []
        return element("div", element("h4", title), element("pre", *marked, text[agreeing:]))

    return element(
        "div",
        element("h3", row.get("file", "")),
        column("prompt", prompt, 0),
        column("the model continues", completion, same),
        column("what the file says", reference, same),
        class_="sample",
    )


def _when(seconds: object) -> str:
    """Return a time of the metrics in words, and any other value as text."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return str(seconds)


def events(rows: Sequence[Row]) -> Html:
    """Return the events of the metrics as a table."""
    lines = [
        table_row(
            _when(event.get("time", "")),
            "" if event.get("step") is None else event["step"],
            event.get("event", ""),
            event.get("message", ""),
            class_="alarm" if str(event.get("event")) in BAD_EVENTS else "",
        )
        for event in rows
        if event["kind"] == "event"
    ]
    head = table_row("time", "step", "event", "", head=True)
    return joined((element("h2", "Events"), element("table", head, *lines))) if lines else Html()


def environment(environment: Row) -> Html:
    """Return the machine, versions, commit and command of the latest start."""
    if not environment:
        return Html()
    commit = str(environment.get("git_commit") or "none")
    if environment.get("git_dirty"):
        commit += " with uncommitted changes"
    if environment.get("git_diff_sha256"):
        commit += f" (diff sha256 {environment['git_diff_sha256'][:12]})"
    devices = ", ".join(f"{number} x {kind}" for kind, number in environment.get("devices", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("packages", {}).items())
    facts = {
        "devices": f"{devices} ({environment.get('backend', '')}), {environment.get('process_count', 1)} process(es)",
        "machine": f"{environment.get('cpu_count', '?')} CPU cores, {environment.get('system', '')}",
        "versions": f"Python {environment.get('python', '')}, {versions}",
        "commit": commit,
        "command": " ".join(map(str, environment.get("command", []))),
        "started": _when(environment.get("start_time", "")),
        "restarts": str(restart) if (restart := environment.get("restart")) is not None else "",
        "earlier starts": "; ".join(_when(e.get("start_time", "")) for e in environment.get("earlier", [])),
    }
    lines = (element("tr", element("th", name), element("td", fact)) for name, fact in facts.items() if fact)
    return joined((element("h2", "Where it ran"), element("table", *lines)))


def config_table(config: Row, overrides: Sequence[object]) -> Html:
    """Return every field of the config, folded; those of `overrides` are marked."""
    named = [str(override).partition("=")[0].strip() for override in overrides]
    lines = []
    for dotted, value in flatten(config).items():
        is_set = any(dotted == name or dotted.startswith(f"{name}.") for name in named)
        shown = value if isinstance(value, str) else json.dumps(value)
        cells = element("td", dotted), element("td", shown, class_="value")
        lines.append(element("tr", *cells, class_="set" if is_set else ""))
    note = [element("p", "Marked: set on the command line.", class_="faint")] if overrides else []
    return element("details", element("summary", "Config"), *note, element("table", *lines))
