"""The style of the figures of a report: colours, axes, and series of the metrics.

Figures are made without pyplot: there is no global state, nothing to close, and no display.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.html import LINES

Rows = Sequence[Mapping[str, Any]]

MAX_POINTS = 1500  # of a line; a longer one is averaged


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    paper: str
    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]
    alarm: str


LIGHT = Theme("#ffffff", "#24292f", "#6e7781", "#e6e8eb", LINES["light"], "#c62828")
DARK = Theme("#16191d", "#dfe3e8", "#8b949e", "#2b3036", LINES["dark"], "#ff6b6b")


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (steps, values), float64 [N], of the rows that have `key`. A null value was not finite and is NaN."""
    pairs = [(row["step"], np.nan if row[key] is None else row[key]) for row in rows if key in row]
    array = np.array(pairs, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Return the exponential moving average of [N] over about `span` points, without bias to the start; NaNs are
    skipped."""
    keep = 1 - 1 / max(span, 1.0)
    total = weight = 0.0
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight if weight else np.nan
    return out


def thin(steps: np.ndarray, values: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `points` points: means over groups of equal length, along the first axis."""
    if len(steps) <= points:
        return steps, values
    groups = np.array_split(np.arange(len(steps)), points)
    return np.array([steps[g].mean() for g in groups]), np.stack([values[g].mean(axis=0) for g in groups])


def style(figure: Figure, axes: Axes, theme: Theme, title: str, y: str, x: str = "step") -> None:
    """Give axes their title, labels and colours."""
    figure.set_facecolor(theme.paper)
    axes.set_facecolor(theme.paper)
    axes.set_title(title, loc="left", color=theme.ink, fontsize=11, fontweight="bold", pad=9)
    axes.set_xlabel(x, color=theme.faint, fontsize=9)
    axes.set_ylabel(y, color=theme.faint, fontsize=9)
    axes.tick_params(colors=theme.faint, labelsize=8.5, length=0)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)


def single(theme: Theme, title: str, y: str) -> tuple[Figure, Axes]:
    """Return a figure of one plot over steps."""
    # Fixed margins: constrained layout draws each figure several times, and would not align them.
    figure = Figure(figsize=(5.7, 3.3), dpi=140)
    axes = figure.add_axes((0.13, 0.135, 0.85, 0.765))
    style(figure, axes, theme, title, y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def legend(axes: Axes, theme: Theme) -> None:
    """Add a legend without a frame."""
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink)
