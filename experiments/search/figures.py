"""The figures of a search's report, each from its records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from experiments.plot_style import LIGHT, legend, single, style
from experiments.search.records import Result, Table
from experiments.search.space import Dimension

DONE, BEST, PRUNED, DIVERGED = LIGHT.lines[0], LIGHT.lines[1], "#b4bac1", LIGHT.alarm
MAP = colormaps["viridis"]  # of the metric: low is dark
COLUMNS = 3  # of slices
SPREAD = 2.5  # of an axis at most, in distances from the best trial to the median


def metric_name(table: Table) -> str:
    """Return the metric for people."""
    return table.search.metric.replace("_", " ")


def ceiling(table: Table) -> float:
    """Return the largest metric that the axes show. Diverged and hopeless trials would flatten the others."""
    values = np.array([r.score for r in table.scored()])
    if not len(values):
        return math.inf
    low, middle, high = values.min(), np.median(values), values.max()
    most = min(high, low + SPREAD * (middle - low)) if middle > low else high
    return float(most + 0.03 * (most - low) + 1e-9)


def history_figure(table: Table) -> Figure | None:
    """Return the metric of each trial and the best so far. Triangles at the top are off the axis."""
    best = table.best()
    if best is None:
        return None
    figure, axes = single(LIGHT, "Best so far", metric_name(table))
    axes.set_xlabel("trial", color=LIGHT.faint, fontsize=9)
    most = ceiling(table)
    shown = {"complete": (DONE, "finished"), "pruned": (PRUNED, "pruned"), "diverged": (DIVERGED, "diverged")}
    for state, (colour, label) in shown.items():
        trials = table.ended(state)
        inside = [r for r in trials if r.score <= most]
        outside = [r for r in trials if r not in inside]
        axes.plot([r.index for r in inside], [r.score for r in inside], "o", color=colour, markersize=4.5,
                  label=label if inside else None, zorder=3 if state == "complete" else 2)  # fmt: skip
        axes.plot([r.index for r in outside], [most] * len(outside), "^", color=colour, markersize=5, clip_on=False,
                  label=None if inside or not outside else label)  # fmt: skip
    steps: list[int] = []
    values: list[float] = []
    for r in table.scored():
        if not values or r.score < values[-1]:
            steps.append(r.index)
            values.append(r.score)
    steps.append(max(r.index for r in table.results))
    values.append(values[-1])
    axes.step(steps, values, where="post", color=BEST, linewidth=2, label="best so far")
    axes.set_ylim(best.score - 0.06 * (most - best.score), most)
    legend(axes, LIGHT)
    return figure


def importance_figure(found: Mapping[str, float]) -> Figure | None:
    """Return a bar for the importance of each field."""
    if not found:
        return None
    fields = sorted(found, key=lambda field: found[field])
    height = 0.95 + 0.34 * len(fields)
    figure = Figure(figsize=(5.7, height), dpi=140)
    axes = figure.add_axes((0.4, 0.5 / height, 0.52, 0.34 * len(fields) / height))
    style(figure, axes, LIGHT, "Importance of the fields", "", "share")
    axes.title.set_x(-0.72)
    axes.barh(range(len(fields)), [found[field] for field in fields], color=DONE, height=0.62)
    for row, field in enumerate(fields):
        axes.text(found[field] + 0.01, row, f"{found[field]:.2f}", va="center", fontsize=8, color=LIGHT.ink)
    axes.set_yticks(range(len(fields)), fields, color=LIGHT.ink, fontsize=8.5)
    axes.set_xlim(0, max(found.values()) * 1.14)
    axes.grid(False, axis="y")
    return figure


def positions(dimension: Dimension, values: Sequence[object]) -> np.ndarray:
    """Return where values lie along an axis from 0 to 1, float64 [N]."""
    if dimension.kind == "choice":
        at = [dimension.choices.index(str(value)) for value in values]
        return np.array(at, np.float64) / (len(dimension.choices) - 1)
    scale = np.log if dimension.kind == "log" else np.asarray
    low, high = (float(scale(end)) for end in (dimension.low, dimension.high))
    return (np.asarray(scale(np.array(values, np.float64))) - low) / (high - low)


def _shades(table: Table, trials: Sequence[Result]) -> list[tuple[float, float, float, float]]:
    """Return the colour of each trial by its metric."""
    best, most = table.best(), ceiling(table)
    low = 0.0 if best is None else best.score
    return [MAP(min(max((r.score - low) / ((most - low) or 1), 0), 1) * 0.9) for r in trials]


def parallel_figure(table: Table) -> Figure | None:
    """Return parallel coordinates: a line for each trial, dark where the metric is low; pruned trials are grey."""
    space, best = table.search.space, table.best()
    if best is None or len(space) < 2:
        return None
    figure = Figure(figsize=(max(5.7, 1.3 * len(space) + 2), 3.5), dpi=140)
    axes = figure.add_axes((0.07, 0.13, 0.86, 0.64))
    style(figure, axes, LIGHT, "", "", "")
    figure.text(0.07, 0.92, "All trials", color=LIGHT.ink, fontsize=11, fontweight="bold")
    axes.grid(False)
    done = sorted(table.ended("complete"), key=lambda r: -r.score)
    for r in table.ended("pruned", "diverged"):
        axes.plot(range(len(space)), _line(space, r), color=PRUNED, linewidth=0.8, alpha=0.5)
    for r, shade in zip(done, _shades(table, done), strict=True):
        axes.plot(range(len(space)), _line(space, r), color=shade, linewidth=1.2, alpha=0.9)
    axes.plot(range(len(space)), _line(space, best), color=BEST, linewidth=2.4)
    for i, dimension in enumerate(space):
        axes.axvline(i, color=LIGHT.faint, linewidth=0.8)
        axes.text(i, 1.09, dimension.short, ha="left" if i == 0 else "center", fontsize=8.5, color=LIGHT.ink)
        for place, text in _marks(dimension):
            axes.text(i + 0.03, place, text, va="center", fontsize=7.5, color=LIGHT.ink,
                      bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 0.6})  # fmt: skip
    axes.set_xlim(-0.1, len(space) - 1 + 0.3)
    axes.set_ylim(-0.05, 1.05)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines["bottom"].set_visible(False)
    note = f"orange: the best; dark: low {metric_name(table)}; grey: pruned or diverged"
    figure.text(0.07, 0.04, note, fontsize=8, color=LIGHT.faint)
    return figure


def _line(space: Sequence[Dimension], r: Result) -> list[float]:
    return [float(positions(dimension, [r.values[dimension.field]])[0]) for dimension in space]


def _marks(dimension: Dimension) -> list[tuple[float, str]]:
    if dimension.kind == "choice":
        places = positions(dimension, dimension.choices)
        return [(float(place), text) for place, text in zip(places, dimension.choices, strict=True)]
    ends = (dimension.low, dimension.high)
    return [(float(place), f"{end:g}") for place, end in zip(positions(dimension, ends), ends, strict=True)]


def slices_figure(table: Table) -> Figure | None:
    """Return the metric over each field, one plot for each; later trials are darker."""
    best = table.best()
    if best is None:
        return None
    space, most = table.search.space, ceiling(table)
    columns = min(COLUMNS, len(space))
    rows = -(-len(space) // columns)
    width, height = 5.7 if columns == 1 else 2.9 * columns, 2.75 * rows
    figure = Figure(figsize=(width, height), dpi=140)
    inside = [r for r in table.scored() if r.score <= most]
    for i, dimension in enumerate(space):
        row, column = divmod(i, columns)
        left = (0.75 + column * (width - 0.85) / columns) / width
        bottom = 1 - (row * 2.75 + 2.2) / height
        axes = figure.add_axes((left, bottom, ((width - 0.85) / columns - 0.35) / width, 1.8 / height))
        style(figure, axes, LIGHT, dimension.short, metric_name(table) if column == 0 else "", "")
        axes.title.set_fontsize(9.5)
        shades = [to_rgba(DONE, 0.25 + 0.7 * (k + 1) / len(inside)) for k in range(len(inside))]
        axes.scatter(_places(dimension, inside), [r.score for r in inside], s=20, c=shades, linewidths=0, zorder=3)
        axes.plot(_places(dimension, [best]), [best.score], "o", color=BEST, markersize=7, zorder=4)
        _scale(axes, dimension)
        axes.set_ylim(best.score - 0.08 * (most - best.score), most)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if column:
            axes.set_yticklabels([])
    return figure


def _places(dimension: Dimension, trials: Sequence[Result]) -> list[float]:
    values = [r.values[dimension.field] for r in trials]
    return [dimension.choices.index(str(v)) for v in values] if dimension.kind == "choice" else values


def _scale(axes: Axes, dimension: Dimension) -> None:
    if dimension.kind == "choice":
        axes.set_xticks(range(len(dimension.choices)), dimension.choices)
        axes.set_xlim(-0.5, len(dimension.choices) - 0.5)
    elif dimension.kind == "log":
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
        axes.set_xlim(dimension.low / 1.15, dimension.high * 1.15)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=dimension.kind == "int"))
        margin = 0.06 * (dimension.high - dimension.low)
        axes.set_xlim(dimension.low - margin, dimension.high + margin)


def curves_figure(table: Table) -> Figure | None:
    """Return the metric by step of every trial; pruned trials are faded."""
    best, most = table.best(), ceiling(table)
    if best is None or not any(len(r.curve) > 1 for r in table.results):
        return None
    figure, axes = single(LIGHT, "Learning curves", metric_name(table))
    highest = best.score
    for r in [*table.ended("pruned", "diverged"), *table.ended("complete")]:
        if not r.curve:
            continue
        done = r.state == "complete"
        steps, values = list(r.curve), list(r.curve.values())
        colour = BEST if r == best else DONE if done else PRUNED
        axes.plot(
            steps, values, color=colour, linewidth=2.2 if r == best else 1.1 if done else 0.9,
            alpha=1 if r == best else 0.7, zorder=4 if r == best else 3 if done else 2,
            marker="" if done else "x", markevery=[len(steps) - 1], markersize=4,
        )  # fmt: skip
        if done and r.score <= most:
            highest = max([highest, *(v for v in values if math.isfinite(v))])
    axes.set_ylim(best.score - 0.05 * (highest - best.score), highest + 0.02 * (highest - best.score) + 1e-9)
    for colour, label, marker in (
        (BEST, f"trial {best.index}, the best", ""),
        (DONE, "finished", ""),
        (PRUNED, "pruned", "x"),
    ):
        if colour != PRUNED or table.ended("pruned"):
            axes.plot([], [], color=colour, label=label, marker=marker, markersize=4)
    legend(axes, LIGHT)
    return figure
