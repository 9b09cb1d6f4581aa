"""The figures of a report, drawn from metrics rows. Each function returns a matplotlib Figure, or None without data.

Matplotlib is imported here, so this module is imported only where a report is written.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from experiments import router_plots
from experiments.plot_style import Rows, Theme, legend, series, single, smooth, thin
from experiments.routing import Study

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))
FEW_POINTS = 40  # of a line whose points are marked
MAX_LEGEND = 12  # lines of a legend


def _raw_and_smooth(axes: Axes, theme: Theme, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    colour = theme.lines[0]
    span = len(values) / 100
    averaged = smooth(values, span)
    if span <= 1:
        axes.plot(steps, values, color=colour, linewidth=1.6, label=label)
        return
    axes.plot(*thin(steps, values), color=colour, linewidth=0.7, alpha=0.35, label=label)
    axes.plot(*thin(steps, averaged), color=colour, linewidth=1.8, label=f"{label}, mean of about {span:.0f}")


def _by_set(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    sets: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "eval":
            sets.setdefault(row["set"], []).append(row)
    return sets


def loss(rows: Rows, theme: Theme) -> Figure | None:
    """Training loss, raw and smoothed, with the points of each held-out set; steps that were not finite are marked."""
    steps, values = series([row for row in rows if row["kind"] == "train"], "loss")
    if not len(steps):
        return None
    figure, axes = single(theme, "Loss", "nats per token")
    _raw_and_smooth(axes, theme, steps, values, "train")
    for i, (name, evals) in enumerate(_by_set(rows).items()):
        colour = theme.lines[1 + i % 3]
        axes.plot(*series(evals, "loss"), "o-", color=colour, markersize=4, linewidth=1, label=f"held-out {name}")
    for i, step in enumerate(steps[~np.isfinite(values)]):
        axes.axvline(step, color=theme.alarm, linewidth=1, alpha=0.8, label=None if i else "not finite")
    legend(axes, theme)
    return figure


def bits_per_byte(rows: Rows, theme: Theme, compressors: Mapping[str, float]) -> Figure | None:
    """Held-out bits per byte by set, with a level line for each compressor."""
    sets = _by_set(rows)
    if not sets:
        return None
    figure, axes = single(theme, "Held-out bits per byte", "bits per byte")
    for i, (name, evals) in enumerate(sets.items()):
        axes.plot(
            *series(evals, "bits_per_byte"), "o-", color=theme.lines[i % len(theme.lines)], markersize=4, label=name
        )
    if compressors:
        axes.margins(x=0.12)
        low, high = min(compressors.values()), max(compressors.values())
        names = " · ".join(f"{n} {v:.2f}" for n, v in sorted(compressors.items(), key=lambda item: item[1]))
        for level in compressors.values():
            axes.axhline(level, color=theme.faint, linewidth=1, linestyle=(0, (4, 3)))
        axes.axhspan(low, high, color=theme.faint, alpha=0.1, linewidth=0, label=names)
    legend(axes, theme)
    return figure


def learning_rate(rows: Rows, theme: Theme) -> Figure | None:
    """Learning rate of each step."""
    steps, values = series(rows, "learning_rate")
    if not len(steps):
        return None
    figure, axes = single(theme, "Learning rate", "")
    axes.plot(*thin(steps, values), color=theme.lines[0], linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
    return figure


def gradient_norm(rows: Rows, theme: Theme) -> Figure | None:
    """Global gradient norm before clipping; clipped steps are marked below."""
    steps, values = series(rows, "grad_norm")
    if not len(steps):
        return None
    figure, axes = single(theme, "Gradient norm", "global norm before clipping")
    _raw_and_smooth(axes, theme, steps, values, "norm")
    if np.nanmax(values, initial=0) > 20 * np.nanmin(values, initial=np.inf) > 0:
        axes.set_yscale("log")
    clipped = [row["step"] for row in rows if row.get("clipped")]
    if clipped:
        label = f"clipped ({len(clipped)} of {len(steps)})"
        axes.plot(clipped, np.full(len(clipped), 0.02), "|", color=theme.alarm, markersize=6, label=label,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    legend(axes, theme)
    return figure


def speed(rows: Rows, theme: Theme) -> Figure | None:
    """Training tokens per second."""
    steps, values = series(rows, "tokens_per_second")
    if not np.isfinite(values).any():
        return None
    figure, axes = single(theme, "Speed", "tokens per second")
    axes.plot(*thin(steps, values), color=theme.lines[0], linewidth=1.3)
    axes.set_ylim(0, 1.15 * np.nanmax(values))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def drawings(
    rows: Rows, compressors: Mapping[str, float], study: Study | None = None
) -> dict[str, Callable[[Theme], Figure | None]]:
    """Return by name, in the order of the report, a function that draws each figure for a theme; it returns None
    without data. `study` is the study of the routers' choices."""
    return {
        "bits_per_byte": lambda theme: bits_per_byte(rows, theme, compressors),
        "loss": lambda theme: loss(rows, theme),
        "learning_rate": lambda theme: learning_rate(rows, theme),
        "gradient_norm": lambda theme: gradient_norm(rows, theme),
        "tokens_per_second": lambda theme: speed(rows, theme),
        "router_losses": lambda theme: router_plots.losses(rows, theme),
        "router_certainty": lambda theme: router_plots.certainty(rows, theme),
        "dropped": lambda theme: router_plots.dropped(rows, theme),
        "saturation": lambda theme: None if study is None else router_plots.saturation(study, theme),
        "expert_load": lambda theme: router_plots.expert_load(rows, theme),
        "co_activation": lambda theme: None if study is None else router_plots.co_activation(study, theme),
    }


class Curve(NamedTuple):
    """A line of an overlay."""

    label: str
    colour: int  # of the run
    dash: int  # of the held-out set
    x: np.ndarray
    values: np.ndarray


def overlay(
    theme: Theme, title: str, y: str, x: str, curves: Sequence[Curve], *, from_zero: bool = False
) -> Figure | None:
    """Curves of several runs in one plot, over steps or tokens."""
    curves = [curve for curve in curves if np.isfinite(curve.values).any()]
    if not curves:
        return None
    figure, axes = single(theme, title, y)
    axes.set_xlabel(x)
    if x != "step":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for curve in curves:
        colour = theme.lines[curve.colour % len(theme.lines)]
        # Runs beyond the number of colours take the colours again, with other dashes.
        dash = DASHES[(curve.dash + curve.colour // len(theme.lines)) % len(DASHES)]
        few = len(curve.x) <= FEW_POINTS
        axes.plot(
            *thin(curve.x, curve.values), color=colour, linestyle=dash, linewidth=1.5, label=curve.label,
            marker="o" if few else None, markersize=3.5,
        )  # fmt: skip
    if from_zero:
        axes.set_ylim(bottom=0)
    if max(np.nanmax(curve.values) for curve in curves) >= 1e3:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if len(curves) <= MAX_LEGEND:
        legend(axes, theme)
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
