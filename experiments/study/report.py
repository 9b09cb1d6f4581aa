"""The report of a study: a Markdown page with verdicts, tables and figures, made from its CSV file alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.paths import write_whole
from experiments.study.definition import Claim, Quantity, Scale, Study, StudyError
from experiments.study.figures import Judged, claims_figure, curves_figure, load_figure, save, tuning_figure
from experiments.study.records import Table, read
from experiments.study.statistics import paired
from experiments.study.verdicts import ClaimData, Verdict, decide_all
from train.progress import count, duration

SYMBOLS = {"reproduced": "**reproduced**", "contradicted": "**contradicted**", "inconclusive": "inconclusive"}
UNITS = {"bits_per_byte": "bits per byte", "loss": "nats per token"}


def write_report(study: Study, path: Path) -> Path:
    """Write PATH's page and figures beside it, and the index of the folder. Return the page's path. Raises StudyError.

    `path`: the CSV file of the study (experiments/study/records.py).
    """
    table = read(path)
    if not table.arms():
        raise StudyError(f"{path}: no trial of the comparison is finished yet; run the study further")
    judged = judge(study, table)
    figures = [
        save(figure, path.with_name(f"{path.stem}-{name}.png"))
        for name, figure in (
            ("curves", curves_figure(study, table)),
            ("claims", claims_figure(judged)),
            ("tuning", tuning_figure(study, table)),
            ("load", load_figure(table)),
            *((each.name, each.draw(table)) for each in study.figures),
        )
        if figure is not None
    ]
    page = path.with_suffix(".md")
    write_whole(page, "\n".join(_page(study, table, judged, figures, path)))
    write_index(path.parent)
    return page


def judge(study: Study, table: Table) -> list[Judged]:
    """Return every claim with its verdict, over the seeds that all arms have."""
    seeds = table.seeds()
    data, references = [], []
    for claim in study.claims:
        arm, than = (_values(study, table, claim, side, seeds) for side in (claim.arm, claim.than))
        both = np.isfinite(arm) & np.isfinite(than)
        data.append(
            ClaimData(claim.text, claim.expected, baseline=than[both], arm=arm[both], margin=claim.margin,
                      unit=UNITS.get(claim.metric or study.metric, ""))
        )  # fmt: skip
        references.append(float(than[both].mean()) if both.any() else math.nan)
    verdicts = decide_all(data, study.confidence) if data else []
    return [Judged(*each) for each in zip(study.claims, verdicts, references, strict=True)]


def _values(study: Study, table: Table, claim: Claim, side: Quantity | float, seeds: Sequence[int]) -> np.ndarray:
    """Return a side of a claim for each seed; NaN where its figures are missing."""

    def value(seed: int) -> float:
        figures = table.of_seed(seed)
        try:
            if callable(side):
                return float(side(figures))
            if isinstance(side, str):
                return float(figures[side][claim.metric or study.metric])
        except (KeyError, ZeroDivisionError):
            return math.nan
        return float(side)

    return np.array([value(seed) for seed in seeds], np.float64)


def _page(
    study: Study, table: Table, judged: Sequence[Judged], figures: Sequence[Path], path: Path
) -> list[str]:  # fmt: skip
    lines = [f"# {study.name}", "", f"**{study.question}** {study.source}.", ""]
    planned, done = int(table.meta["planned"]), len(table.outcomes)
    if done < planned:
        lines += [f"{done} of {planned} trials are finished; the figures are preliminary.", ""]
    if judged:
        lines += ["| claim | expected | published | measured | verdict |", "|---|---|---|---|---|"]
        lines += [
            f"| {claim.text} | {_expected(claim)} | {_published(claim)} | {_interval(v)} | {SYMBOLS[v.outcome]} |"
            for claim, v, _ in judged
        ]
        lines += ["", *(f"- {claim.text}: {v.reason}" for claim, v, _ in judged), ""]
    lines += [f"![{figure.stem}]({figure.name})" for figure in figures]
    lines += ["", "## Arms", "", *_arms_table(study, table)]
    if study.analysis is not None:
        lines += ["", "## Analysis", "", *study.analysis(table)]
    lines += ["", "## Protocol", "", *_protocol(study, table, path)]
    return [*lines, ""]


def _expected(claim: Claim) -> str:
    words = claim.expected.replace("_", " ")
    return f"{words} by more than {claim.margin:g}" if claim.margin and claim.expected in ("lower", "higher") else (
        f"{words} within {claim.margin:g}" if claim.margin else words
    )  # fmt: skip


def _published(claim: Claim) -> str:
    if claim.published is None:
        return "no number"
    p = claim.published
    return f"{p.arm:g} beside {p.than:g} {p.unit}"


def _interval(v: Verdict) -> str:
    if not math.isfinite(v.low):
        return f"{v.mean:+.4f} (n = {v.n})"
    return f"{v.mean:+.4f} ({v.low:+.4f} to {v.high:+.4f}, n = {v.n})"


def _arms_table(study: Study, table: Table) -> list[str]:
    """Return a row for each arm: mean and standard deviation, and the paired difference to the first arm."""
    metrics = [study.metric, *study.also]
    first = table.arms()[0]
    head = ["arm", "seeds", *(m.replace("_", " ") for m in metrics), f"{study.metric.replace('_', ' ')} minus {first}",
            "tuned", "seconds", "diverged"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm in table.arms():
        outcomes = table.compared(arm)
        cells = [arm, str(len(outcomes))]
        for metric in metrics:
            values = [o.figures[metric] for o in outcomes if metric in o.figures]
            cells.append(_mean_sd(values))
        cells.append("" if arm == first else _difference(study, table, arm, first))
        cells.append(", ".join(f"{n.rpartition('.')[2]} {v:g}" for n, v in outcomes[0].tuned.items()))
        cells += [f"{np.mean([o.seconds for o in outcomes]):.0f}", str(sum(o.diverged for o in outcomes) or "")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _mean_sd(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(set(values)) == 1 and float(values[0]).is_integer():  # a count, such as of parameters
        return f"{values[0]:,.0f}"
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def _difference(study: Study, table: Table, arm: str, first: str) -> str:
    seeds = table.seeds()
    figures = [table.of_seed(seed) for seed in seeds]
    name = study.metric
    both = [f for f in figures if all(name in f.get(each, {}) for each in (first, arm))]
    ours, theirs = (np.array([f[each][name] for f in both]) for each in (arm, first))
    if len(both) < 2:
        return f"{ours[0] - theirs[0]:+.4f}" if both else ""
    found = paired(theirs, ours, study.confidence)
    return f"{found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _protocol(study: Study, table: Table, path: Path) -> list[str]:
    scale = study.scales[table.meta["scale"]]
    spent = sum(o.seconds for o in table.outcomes)
    tuned = [o for o in table.outcomes if o.stage == "tune"]
    lines = [
        f"- Scale `{table.meta['scale']}`: {_tokens(table, scale)} tokens and {scale.seeds} seeds for each arm. Equal "
        "seeds have equal initial weights (where shapes agree), data order and held-out text in every arm.",
        f"- Differences are paired by seed. Intervals hold {100 * study.confidence:g} % (90 % for claims of equality "
        "and of no harm); Holm's method adjusts the verdicts over the claims.",
    ]
    if tuned:
        factors = "; ".join(f"`{name}` times {', '.join(f'{f:g}' for f in fs)}" for name, fs in study.tune.items())
        lines.append(f"- Tuned for each arm, with other seeds ({len(tuned)} trials): {factors}.")
        lines += [f"- Note: {arm} chose {text}, the end of its range." for arm, text in _at_the_ends(study, table)]
    if study.notes:
        lines.append(f"- {study.notes}")
    if most := max((o.together for o in table.outcomes if o.together > 1), default=0):
        number = sum(o.together > 1 for o in table.outcomes)
        lines.append(
            f"- {number} of the trials were trained up to {most} at a time under one vmap (`--vectorize`); the seconds "
            "of each are its share of theirs."
        )
    lines += [
        f"- {len(table.outcomes)} trials, {duration(spent)} in all (processor time on a CPU, one core each). "
        f"{table.meta['device']}, "
        f"Python {table.meta['python']}, jax {table.meta['jax']}, {table.meta['date']}.",
        f"- Records: [{path.name}]({path.name}). Again: `python -m experiments study {study.name}"
        f"{'' if table.meta['scale'] == 'cpu' else ' --scale ' + table.meta['scale']}`",
    ]
    return lines


def _tokens(table: Table, scale: Scale) -> str:
    """Return the tokens of a trial, or their range where arms set their own steps."""
    found = sorted({o.figures.get("tokens", scale.tokens) for o in table.outcomes})
    return " to ".join(count(int(n)) for n in dict.fromkeys((found[0], found[-1])))


def _at_the_ends(study: Study, table: Table) -> list[tuple[str, str]]:
    """Return the arms whose best tuned value is the smallest or the largest that was tried."""
    found = []
    for arm in table.arms():
        for name, value in table.compared(arm)[0].tuned.items():
            tried = sorted({o.tuned[name] for o in table.outcomes if o.arm == arm and o.stage == "tune"})
            if len(tried) > 1 and value in (tried[0], tried[-1]):
                found.append((arm, f"{name} = {value:g}"))
    return found


def write_index(folder: Path) -> Path:
    """Write the page that lists the claims of all studies recorded in a folder."""
    from experiments.study.launch import load_study

    lines = [
        "# Studies", "",
        "Each study asks one question; its claims were written down before its trials ran. Written by `python -m "
        "experiments study NAME`.", "",
        "| study | claim | source | published | measured | verdict | cost |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for path in sorted(folder.glob("*.csv")):
        table = read(path)
        try:
            study = load_study(table.meta["study"])
        except StudyError:
            continue  # of a file that a user keeps elsewhere
        if not table.arms():
            continue
        spent = duration(sum(o.seconds for o in table.outcomes))
        link = f"[{path.stem}]({path.stem}.md)"
        if not study.claims:
            lines.append(f"| {link} | {study.question} | {study.source} | | | measured | {spent} |")
        for claim, v, _ in judge(study, table):
            lines.append(
                f"| {link} | {claim.text} | {study.source} | {_published(claim)} | {_interval(v)} | "
                f"{SYMBOLS[v.outcome]} | {spent} |"
            )
            link = spent = ""
    page = folder / "README.md"
    write_whole(page, "\n".join([*lines, ""]))
    return page
