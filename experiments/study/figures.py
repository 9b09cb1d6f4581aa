"""The figures of a study's report."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.plot_style import LIGHT, legend, single, style
from experiments.study.definition import Claim, Study
from experiments.study.records import Table
from experiments.study.verdicts import Verdict

COLOURS = {"reproduced": "#2e7d4f", "contradicted": "#c62828", "inconclusive": "#6e7781"}
DPI = 110
LABEL_WIDTH = 48  # characters of a line of a label beside a row


@dataclass(frozen=True)
class StudyFigure:
    """A figure of one study: `draw` returns it, or None where the records do not suffice."""

    name: str  # of its file
    draw: Callable[[Table], Figure | None]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, without the time and the versions that would make it differ in every run."""
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def colour(index: int) -> str:
    """Return the colour of an arm."""
    return LIGHT.lines[index % len(LIGHT.lines)]


def curves_figure(study: Study, table: Table, key: str = "bits_per_byte") -> Figure | None:
    """Return held-out curves: a thin line for each seed, a bold one for the mean of the arm."""
    arms = [arm for arm in table.arms() if any(key in o.curves for o in table.compared(arm))]
    if not arms:
        return None
    figure, axes = single(LIGHT, "Held-out text", key.replace("_", " "))
    lows, highs = [], []
    for i, arm in enumerate(arms):
        outcomes = [o for o in table.compared(arm) if key in o.curves]
        for o in outcomes:
            axes.plot(o.curves["step"], o.curves[key], color=colour(i), linewidth=0.6, alpha=0.35)
        steps = outcomes[0].curves["step"]
        same = [o.curves[key] for o in outcomes if list(o.curves["step"]) == list(steps)]
        mean = np.mean(same, axis=0)
        dashed = "--" if i >= len(LIGHT.lines) else "-"
        axes.plot(steps, mean, color=colour(i), linewidth=2, label=arm, linestyle=dashed)
        lows.append(mean.min())
        highs.append(mean[min(1, len(mean) - 1)])
    gap = (max(highs) - min(lows)) or 1.0
    axes.set_ylim(min(lows) - 0.08 * gap, max(highs) + 0.1 * gap)  # the first evaluation would flatten the rest
    legend(axes, LIGHT)
    return figure


class Judged(NamedTuple):
    """A claim, the verdict on it, and the mean of what its arm is compared with."""

    claim: Claim
    verdict: Verdict
    reference: float


def claims_figure(judged: Sequence[Judged]) -> Figure | None:
    """Return a forest plot of the claims that compare two measured figures, in percent, beside the published ones."""
    shown = [
        j for j in judged
        if math.isfinite(j.verdict.low) and not isinstance(j.claim.than, int | float) and j.reference > 0
    ]  # fmt: skip
    if not shown:
        return None
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(shown)), dpi=140)
    axes = figure.add_axes(
        (0.44, 0.55 / (0.9 + 0.42 * len(shown)), 0.53, 0.42 * len(shown) / (0.9 + 0.42 * len(shown)))
    )
    style(figure, axes, LIGHT, "", "", "difference, % (bar: interval; diamond: published)")
    axes.axvline(0, color=LIGHT.faint, linewidth=1)
    for row, (claim, v, reference) in enumerate(shown):
        scale = 100 / reference
        axes.plot(
            [v.low * scale, v.high * scale], [row, row], color=COLOURS[v.outcome], linewidth=3, solid_capstyle="butt"
        )
        axes.plot([v.mean * scale], [row], "o", color=COLOURS[v.outcome], markersize=6)
        if claim.published is not None:
            published = 100 * (claim.published.arm / claim.published.than - 1)
            axes.plot([published], [row], "D", color=LIGHT.ink, markersize=5, markerfacecolor="none")
    texts = [textwrap.fill(j.claim.text, LABEL_WIDTH) for j in shown]
    axes.set_yticks(range(len(shown)), texts, color=LIGHT.ink, fontsize=8)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    return figure


def tuning_figure(study: Study, table: Table) -> Figure | None:
    """Return the metric over the tuned values of each arm, on a logarithmic axis."""
    tuned = [o for o in table.outcomes if o.stage == "tune"]
    if not tuned or len(study.tune) != 1:
        return None
    (name,) = study.tune
    figure, axes = single(LIGHT, "Tuning", study.metric.replace("_", " "))
    for i, arm in enumerate(table.arms()):
        values = sorted({o.tuned[name] for o in tuned if o.arm == arm})
        means = [
            np.mean([o.figures.get(study.metric, np.nan) for o in tuned if o.arm == arm and o.tuned[name] == value])
            for value in values
        ]
        axes.plot(values, means, "o-", color=colour(i), linewidth=1.6, markersize=4, label=arm)
    logarithmic(axes, name.rpartition(".")[2].replace("_", " "))
    legend(axes, LIGHT)
    return figure


def rates_figure(table: Table, groups: Mapping[str, Mapping[float, str]], metric: str) -> Figure | None:
    """Return a metric over learning rates: a line for each group, whose arms are given by rate; a point for each seed.

    Diverged trials have the figures of uniform predictions.
    """
    figure, axes = single(LIGHT, "", metric.replace("_", " "))
    for i, (group, arms) in enumerate(groups.items()):
        found = {rate: [o.figures[metric] for o in table.compared(arm)] for rate, arm in arms.items()}
        found = {rate: values for rate, values in found.items() if values}
        for rate, values in found.items():
            axes.plot([rate] * len(values), values, ".", color=colour(i), markersize=4, alpha=0.5)
        axes.plot(list(found), [np.mean(v) for v in found.values()], color=colour(i), linewidth=1.8, label=group)
    logarithmic(axes, "learning rate")
    legend(axes, LIGHT)
    return figure


def logarithmic(axes: Axes, label: str) -> None:
    """Make the x axis logarithmic."""
    axes.set_xscale("log")
    axes.set_xlabel(label, color=LIGHT.faint, fontsize=9)


def load_figure(table: Table) -> Figure | None:
    """Return a heat map of the experts' load for each arm: the last recorded training step, mean over the seeds."""
    maps = []
    for arm in table.arms():
        loads = [np.array(o.arrays["expert_load"]) for o in table.compared(arm) if "expert_load" in o.arrays]
        if loads:
            # Experts sorted by load: their numbers mean nothing across seeds.
            maps.append((arm, np.mean([-np.sort(-load, axis=-1) * load.shape[-1] for load in loads], axis=0)))
    if not maps:
        return None
    height = 0.55 + 0.42 * len(maps)
    figure = Figure(figsize=(7.2, height), dpi=140)
    figure.set_facecolor(LIGHT.paper)
    most = max(load.max() for _, load in maps)
    for i, (arm, load) in enumerate(maps):
        axes = figure.add_axes((0.27, 1 - (0.42 * (i + 1)) / height, 0.6, 0.34 / height))
        image = axes.imshow(load, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_ylabel(arm, rotation=0, ha="right", va="center", fontsize=8, color=LIGHT.ink)
    bar = figure.add_axes((0.9, 0.3, 0.02, 0.6))
    figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7, colors=LIGHT.faint, length=0)
    bar.yaxis.set_major_locator(MaxNLocator(4))
    note = "load of the experts over an even share; a row per layer, experts sorted"
    figure.text(0.27, 0.16 / height, note, fontsize=8, color=LIGHT.faint)
    return figure


def isoflop_figure(budgets: Mapping[str, Mapping[float, Sequence[float]]], size: str, unit: str) -> Figure | None:
    """Return the loss over the size for each budget, by size: a point for each run, and the parabola of the means."""
    figure, axes = single(LIGHT, "Equal FLOPs", unit)
    for i, (budget, runs) in enumerate(budgets.items()):
        means = {x: float(np.mean(losses)) for x, losses in runs.items() if losses}
        if len(means) < 3:
            continue
        for x, losses in runs.items():
            axes.plot([x] * len(losses), losses, ".", color=colour(i), markersize=5, alpha=0.6)
        logs = np.log10(list(means))
        line = np.linspace(logs.min(), logs.max(), 100)
        axes.plot(10**line, np.polyval(np.polyfit(logs, list(means.values()), 2), line), color=colour(i), linewidth=1.6,
                  label=budget)  # fmt: skip
    logarithmic(axes, size)
    legend(axes, LIGHT)
    return figure
