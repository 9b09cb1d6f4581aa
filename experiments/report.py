"""The report of a run: one HTML file that needs nothing else, made from what the run folder holds.

    path = write_report("runs/NAME")

It works at any time: on a run that has just begun, is unfinished, has no experts or no evaluations, it shows what there
is. The facts of the summary come from the `final` row and, before there is one, from the event "started":
`parameters_total`, `parameters_active`, `tokens`, `wall_seconds`, `tokens_per_second`, `mfu`, `mfu_convention`. The
verdict compares `sets` of the final row, {name: {"bits_per_byte": b, "bytes": n, "compressors": {"gzip -9": b, ...}}}.
"""

import base64
import json
import os
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from experiments.routing import study
from train.config_io import flatten
from train.progress import count, duration
from train.records import RunFolder, RunFolderError, read_metrics

Row = Mapping[str, Any]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #24292f; --faint: #646d76; --rule: #e4e7ea; --tint: #f5f6f8;
  --model: #2563ab; --other: #b6bdc6; --mark: #dcebfa; --alarm: #c62828; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #dfe3e8; --faint: #9099a3; --rule: #2b3036;
  --tint: #1d2126; --model: #6aa5e8; --other: #525a64; --mark: #1f3a57; --alarm: #ff6b6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 48px 28px 80px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1 { margin: 0; font-size: 32px; line-height: 1.2; letter-spacing: -0.01em; }
h2 { margin: 52px 0 14px; font-size: 20px; }
p { margin: 8px 0; max-width: 60em; }
.faint, th, figcaption { color: var(--faint); }
.verdict { margin: 28px 0 8px; font-size: 19px; max-width: none; }
.verdict strong { color: var(--model); }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 7px 14px; margin: 14px 0 0; max-width: 760px;
  align-items: center; font-variant-numeric: tabular-nums; }
.bars div.bar { height: 22px; border-radius: 3px; background: var(--other); min-width: 2px; }
.bars div.model { background: var(--model); }
.bars .cell { display: flex; align-items: center; gap: 9px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(195px, 1fr)); gap: 10px; }
.facts div { background: var(--tint); padding: 12px 16px; border-radius: 6px; }
.facts b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.facts span { color: var(--faint); font-size: 13.5px; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 26px 22px; }
.plots .wide { grid-column: 1 / -1; }
.sample { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 12px; margin: 0 0 30px; }
.sample h3 { grid-column: 1 / -1; margin: 0; font-size: 14px; font-weight: 600; overflow-wrap: anywhere; }
.sample h4 { margin: 0 0 5px; font-size: 13px; font-weight: 500; color: var(--faint); }
pre { margin: 0; padding: 12px 14px; background: var(--tint); border-radius: 6px; overflow: auto; max-height: 27em;
  font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; tab-size: 4; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
table { border-collapse: collapse; font-size: 14px; }
td, th { padding: 4px 18px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule);
  font-weight: 400; overflow-wrap: anywhere; }
td.value { font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
tr.set td { background: var(--mark); }
.alarm { color: var(--alarm); }
summary { cursor: pointer; font-size: 20px; font-weight: 700; margin: 44px 0 12px; }
@media (max-width: 760px) { .sample { grid-template-columns: 1fr; } .plots { grid-template-columns: 1fr; } }
"""

BAD_EVENTS = {"nonfinite", "warning"}


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write RUN/report.html and the PNGs in RUN/plots/; returns the path of the report.

    Raises RunFolderError when `run_dir` holds no config.json.
    """
    from experiments import plot_style, plots

    run = RunFolder(Path(run_dir))
    if not run.config.exists():
        raise RunFolderError(f"{run.path} is not a run folder: it has no config.json; name a folder under runs/")
    config = json.loads(run.config.read_text(encoding="utf-8"))
    rows = read_metrics(run.metrics) if run.metrics.exists() else []
    facts = _facts(rows)
    sets = facts.get("sets", {})
    # Level lines in the plot are fair for one held-out set only: compressors differ from set to set.
    compressors = next(iter(sets.values())).get("compressors", {}) if len(sets) == 1 else {}

    moe = (config.get("model") or {}).get("moe") or {}
    choices = study(run, moe["num_experts"]) if "num_experts" in moe else None
    run.plots.mkdir(exist_ok=True)
    images = {}
    for appearance, theme in (("light", plot_style.LIGHT), ("dark", plot_style.DARK)):
        for name, figure in plots.figures(rows, theme, compressors, choices).items():
            images[name, appearance] = plots.png(figure)
            if appearance == "light":
                (run.plots / f"{name}.png").write_bytes(images[name, appearance])

    name = str(config.get("name") or run.path.resolve().name)
    body = "\n".join(
        (
            f"<h1>{escape(name)}</h1>",
            f"<p>{escape(str(config.get('question', '')))}</p>",
            _verdict(rows, sets),
            _summary(run, rows, facts),
            _plots(images),
            _samples(run),
            _events(rows),
            _environment(run),
            _config(run, config),
        )
    )
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
    temporary = run.report.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(run.report)
    return run.report


def _facts(rows: Sequence[Row]) -> dict[str, Any]:
    """What is known of the run as a whole: the event "started", then the last train row, then the final row."""
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


def _verdict(rows: Sequence[Row], sets: Mapping[str, Row]) -> str:
    if not sets:
        last = {row["set"]: row for row in rows if row["kind"] == "eval"}
        if not last:
            return '<p class="verdict">No held-out figure yet.</p>'
        told = "; ".join(f"{escape(n)} {r['bits_per_byte']:.3f} at step {r['step']}" for n, r in last.items())
        return f'<p class="verdict">Not finished. Held-out bits per byte so far: <strong>{told}</strong>.</p>'
    parts = []
    for name, figures in sets.items():
        ours, others = figures["bits_per_byte"], figures.get("compressors", {})
        size = f" ({count(figures['bytes'])}B)" if "bytes" in figures else ""
        if ours is None:
            parts.append(f'<p class="verdict alarm">{escape(name)}: the held-out loss is not finite.</p>')
            continue
        beaten = [n for n, bits in others.items() if ours < bits]
        missed = [n for n, bits in others.items() if ours >= bits]
        told = f"<strong>{ours:.3f} bits per byte</strong> on held-out {escape(name)}{size}"
        if beaten:
            told += f": better than {escape(_and(beaten))}"
        if missed:
            told += f"{', ' if beaten else ': '}not as good as {escape(_and(missed))}"
        scale = 70 / max([ours, *others.values()])
        bars = "".join(
            f'<span>{escape(n)}</span><div class="cell"><div class="bar{" model" if n == "model" else ""}" '
            f'style="width: {bits * scale:.2f}%"></div>{bits:.3f}</div>'
            for n, bits in sorted({"model": ours, **others}.items(), key=lambda item: item[1])
        )
        parts.append(f'<p class="verdict">{told}.</p><div class="bars">{bars}</div>')
    note = (
        '<p class="faint">Bits per byte, less is better; the compressors take the same bytes, '
        "each held-out file by itself.</p>"
    )
    return "".join(parts) + (note if any(s.get("compressors") for s in sets.values()) else "")


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _summary(run: RunFolder, rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    cells = []

    def cell(key: str, label: str, form) -> None:
        if facts.get(key) is not None:
            cells.append(f"<div><b>{escape(form(facts[key]))}</b><span>{escape(label)}</span></div>")

    cell("parameters_total", "parameters", count)
    cell("parameters_active", "parameters active per token", count)
    cell("step", "steps", lambda n: f"{n:,}")
    cell("tokens", "tokens trained on", count)
    cell("wall_seconds", "wall time", duration)
    cell("tokens_per_second", "tokens per second", count)
    cell("mfu", "model FLOP utilization", "{:.1%}".format)
    if not cells:
        return "<h2>Summary</h2><p class='faint'>No step has been taken yet.</p>"
    convention = facts.get("mfu_convention")
    note = (
        f'<p class="faint">MFU: {escape(str(convention))}.</p>' if convention and facts.get("mfu") is not None else ""
    )
    return f'<h2>Summary</h2><div class="facts">{"".join(cells)}</div>{note}'


def _plots(images: Mapping[tuple[str, str], bytes]) -> str:
    parts = []
    for name in dict.fromkeys(name for name, _ in images):
        light, dark = (base64.b64encode(images[name, appearance]).decode() for appearance in ("light", "dark"))
        wide = ' class="wide"' if name in ("expert_load", "co_activation") else ""
        parts.append(
            f'<figure{wide}><picture><source media="(prefers-color-scheme: dark)" '
            f'srcset="data:image/png;base64,{dark}">'
            f'<img alt="{escape(name.replace("_", " "))}" src="data:image/png;base64,{light}"></picture></figure>'
        )
    return f'<h2>Curves</h2><div class="plots">{"".join(parts)}</div>' if parts else ""


def _samples(run: RunFolder) -> str:
    if not run.samples.exists():
        return ""
    parts = []
    for line in run.samples.read_text(encoding="utf-8").split("\n"):
        if not line:
            continue
        row = json.loads(line)
        completion, reference = row["completion"], row.get("reference", "")
        pairs = zip(completion, reference, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(completion), len(reference)))

        def agreeing(text: str, same: int = same) -> str:
            return (f"<mark>{escape(text[:same])}</mark>" if same else "") + escape(text[same:])

        parts.append(
            f'<div class="sample"><h3>{escape(row.get("file", ""))}</h3>'
            f"<div><h4>prompt</h4><pre>{escape(row['prompt'])}</pre></div>"
            f"<div><h4>the model goes on</h4><pre>{agreeing(completion)}</pre></div>"
            f"<div><h4>what the file says</h4><pre>{agreeing(reference)}</pre></div></div>"
        )
    note = '<p class="faint">From held-out files. Marked: as far as the two agree from the start.</p>'
    return f"<h2>Completions</h2>{note}{''.join(parts)}" if parts else ""


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _events(rows: Sequence[Row]) -> str:
    lines = "".join(
        f"<tr{' class=alarm' if row.get('event') in BAD_EVENTS else ''}><td>{_when(row['time'])}</td>"
        f"<td>{'' if row.get('step') is None else row['step']}</td><td>{escape(str(row.get('event', '')))}</td>"
        f"<td>{escape(str(row.get('message', '')))}</td></tr>"
        for row in rows
        if row["kind"] == "event"
    )
    head = "<tr><th>time</th><th>step</th><th>event</th><th></th></tr>"
    return f"<h2>Events</h2><table>{head}{lines}</table>" if lines else ""


def _environment(run: RunFolder) -> str:
    if not run.environment.exists():
        return ""
    environment = json.loads(run.environment.read_text(encoding="utf-8"))
    commit = environment.get("git_commit") or "none"
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
        "command": " ".join(environment.get("command", [])),
        "started": _when(environment["start_time"]) if "start_time" in environment else "",
        "earlier starts": "; ".join(_when(e["start_time"]) for e in environment.get("earlier", [])),
    }
    lines = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items() if v)
    return f"<h2>Where it ran</h2><table>{lines}</table>"


def _config(run: RunFolder, config: Mapping[str, Any]) -> str:
    overrides = json.loads(run.overrides.read_text(encoding="utf-8")) if run.overrides.exists() else []
    named = [override.partition("=")[0].strip() for override in overrides]
    lines = []
    for dotted, value in flatten(config).items():
        is_set = any(dotted == name or dotted.startswith(f"{name}.") for name in named)
        shown = value if isinstance(value, str) else json.dumps(value)
        lines.append(
            f"<tr{' class=set' if is_set else ''}><td>{escape(dotted)}</td><td class=value>{escape(shown)}</td></tr>"
        )
    note = '<p class="faint">Marked: set on the command line.</p>' if overrides else ""
    return f"<details><summary>Config</summary>{note}<table>{''.join(lines)}</table></details>"
