"""The figures of a report, drawn from metrics rows. Each function returns a matplotlib Figure, or None without data.

Figures are made without pyplot: no global state, nothing to close, no display. Matplotlib is imported here, so this
module is imported only where a report is written.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

Rows = Sequence[Mapping[str, Any]]

MAX_POINTS = 1500  # a line of more is averaged down
MAX_COLUMNS = 300  # of the heat map
MAX_HEAT_ROWS = 400  # above, the heat map shows each layer's most loaded expert instead of every expert


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    paper: str
    ink: str
    faint: str
    grid: str
    lines: tuple[str, ...]
    alarm: str


LIGHT = Theme("#ffffff", "#24292f", "#6e7781", "#e6e8eb", ("#2563ab", "#c2571a", "#2e7d4f", "#8a4fa3"), "#c62828")
DARK = Theme("#16191d", "#dfe3e8", "#8b949e", "#2b3036", ("#6aa5e8", "#e8925c", "#6cc191", "#c08ad6"), "#ff6b6b")


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) float64 [N] of the rows that have `key`; a null value (not finite when written) is NaN."""
    pairs = [(row["step"], np.nan if row[key] is None else row[key]) for row in rows if key in row]
    array = np.array(pairs, np.float64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average of [N] over about `span` points, without bias to the start; NaNs are passed over."""
    keep = 1 - 1 / max(span, 1.0)
    total = weight = 0.0
    out = np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        out[i] = total / weight if weight else np.nan
    return out


def thin(steps: np.ndarray, values: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of them: means over runs of equal length, along the first axis."""
    if len(steps) <= points:
        return steps, values
    groups = np.array_split(np.arange(len(steps)), points)
    return np.array([steps[g].mean() for g in groups]), np.stack([values[g].mean(axis=0) for g in groups])


def _style(figure: Figure, axes: Axes, theme: Theme, title: str, y: str, x: str = "step") -> None:
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


def _single(theme: Theme, title: str, y: str) -> tuple[Figure, Axes]:
    # Fixed margins: constrained layout draws each figure several times, and would not line them up.
    figure = Figure(figsize=(5.7, 3.3), dpi=140)
    axes = figure.add_axes((0.13, 0.135, 0.85, 0.765))
    _style(figure, axes, theme, title, y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    return figure, axes


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, fontsize=8.5, labelcolor=theme.ink)


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
    figure, axes = _single(theme, "Loss", "nats per token")
    _raw_and_smooth(axes, theme, steps, values, "train")
    for i, (name, evals) in enumerate(_by_set(rows).items()):
        colour = theme.lines[1 + i % 3]
        axes.plot(*series(evals, "loss"), "o-", color=colour, markersize=4, linewidth=1, label=f"held-out {name}")
    for i, step in enumerate(steps[~np.isfinite(values)]):
        axes.axvline(step, color=theme.alarm, linewidth=1, alpha=0.8, label=None if i else "not finite")
    _legend(axes, theme)
    return figure


def bits_per_byte(rows: Rows, theme: Theme, compressors: Mapping[str, float]) -> Figure | None:
    """Held-out bits per byte by set, with a level line for each compressor."""
    sets = _by_set(rows)
    if not sets:
        return None
    figure, axes = _single(theme, "Held-out bits per byte", "bits per byte")
    for i, (name, evals) in enumerate(sets.items()):
        axes.plot(*series(evals, "bits_per_byte"), "o-", color=theme.lines[i % 4], markersize=4, label=name)
    if compressors:
        axes.margins(x=0.12)
        low, high = min(compressors.values()), max(compressors.values())
        names = " · ".join(f"{n} {v:.2f}" for n, v in sorted(compressors.items(), key=lambda item: item[1]))
        for level in compressors.values():
            axes.axhline(level, color=theme.faint, linewidth=1, linestyle=(0, (4, 3)))
        axes.axhspan(low, high, color=theme.faint, alpha=0.1, linewidth=0, label=names)
    _legend(axes, theme)
    return figure


def learning_rate(rows: Rows, theme: Theme) -> Figure | None:
    """The schedule as it was applied."""
    steps, values = series(rows, "learning_rate")
    if not len(steps):
        return None
    figure, axes = _single(theme, "Learning rate", "")
    axes.plot(*thin(steps, values), color=theme.lines[0], linewidth=1.8)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda rate, _: f"{rate:.3g}")
    return figure


def gradient_norm(rows: Rows, theme: Theme) -> Figure | None:
    """Global gradient norm before clipping; steps whose row says `clipped` are marked below."""
    steps, values = series(rows, "grad_norm")
    if not len(steps):
        return None
    figure, axes = _single(theme, "Gradient norm", "global norm before clipping")
    _raw_and_smooth(axes, theme, steps, values, "norm")
    if np.nanmax(values, initial=0) > 20 * np.nanmin(values, initial=np.inf) > 0:
        axes.set_yscale("log")
    clipped = [row["step"] for row in rows if row.get("clipped")]
    if clipped:
        label = f"clipped ({len(clipped)} of {len(steps)})"
        axes.plot(clipped, np.full(len(clipped), 0.02), "|", color=theme.alarm, markersize=6, label=label,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    _legend(axes, theme)
    return figure


def speed(rows: Rows, theme: Theme) -> Figure | None:
    """Training tokens per second."""
    steps, values = series(rows, "tokens_per_second")
    if not np.isfinite(values).any():
        return None
    figure, axes = _single(theme, "Speed", "tokens per second")
    axes.plot(*thin(steps, values), color=theme.lines[0], linewidth=1.3)
    axes.set_ylim(0, 1.15 * np.nanmax(values))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def router_losses(rows: Rows, theme: Theme) -> Figure | None:
    """The auxiliary losses of the router, before their coefficients."""
    names = {"load_balance_loss": "load balance (1 when even)", "router_z_loss": "router z"}
    lines = {label: series(rows, key) for key, label in names.items()}
    if not any(np.isfinite(values).any() for _, values in lines.values()):
        return None
    figure, axes = _single(theme, "Router losses", "auxiliary loss")
    for i, (label, (steps, values)) in enumerate(lines.items()):
        if len(steps):
            axes.plot(*thin(steps, values), color=theme.lines[i], linewidth=1.3, label=label)
    _legend(axes, theme)
    return figure


def expert_load(rows: Rows, theme: Theme) -> Figure | None:
    """Expert load over layers and steps as a multiple of the fair share, and the worst violation above it.

    `expert_load` of a row is [L][E], each layer summing to one; the colour is its value times E.
    """
    loaded = [row for row in rows if row.get("expert_load")]
    if not loaded:
        return None
    steps = np.array([row["step"] for row in loaded], np.float64)
    load_NLE = np.array([row["expert_load"] for row in loaded], np.float64)
    layers, experts = load_NLE.shape[1:]
    shown_NLR = load_NLE * experts
    every = layers * experts <= MAX_HEAT_ROWS
    if not every:
        shown_NLR = shown_NLR.max(axis=2, keepdims=True)
    per_layer = shown_NLR.shape[2]
    _, heat = thin(steps, shown_NLR.reshape(len(steps), -1), MAX_COLUMNS)

    height = float(np.clip(1.9 + 0.075 * heat.shape[1], 3.4, 8.5))
    figure = Figure(figsize=(11.8, height), dpi=140)
    bottom, middle = 0.45 / height, 1 - 1.2 / height
    axes = figure.add_axes((0.055, bottom, 0.855, middle - bottom))
    top = figure.add_axes((0.055, middle + 0.15 / height, 0.855, 0.75 / height), sharex=axes)
    top.tick_params(labelbottom=False)
    what = "every expert" if every else "the most loaded expert of each layer"
    _style(figure, top, theme, f"Expert load, {what}", "max violation", x="")
    violation = series(loaded, "max_violation")
    if len(violation[0]):
        top.plot(*thin(*violation), color=theme.lines[1], linewidth=1.2)
        top.set_ylim(bottom=0)
    _style(figure, axes, theme, "", "MoE layer")
    axes.grid(False)
    blue, orange = theme.lines[:2]
    if every:
        low, high, ramp, ticks = 0, 2, [blue, theme.paper, orange], ["0", "½", "fair share", "1½", "2 or more"]
    else:
        low, high, ramp, ticks = 1, 5, [theme.paper, orange], ["fair share", "2", "3", "4", "5 or more"]
    colours = LinearSegmentedColormap.from_list("load", ramp)
    first, last = steps[0], steps[-1] if len(steps) > 1 else steps[0] + 1
    image = axes.imshow(heat.T, aspect="auto", cmap=colours, vmin=low, vmax=high, interpolation="nearest",
                        extent=(first, last, heat.shape[1], 0))  # fmt: skip
    for boundary in range(per_layer, heat.shape[1], per_layer) if every else ():
        axes.axhline(boundary, color=theme.faint, linewidth=0.8)
    stride = max(1, layers // 16)
    axes.set_yticks(
        [(i + 0.5) * per_layer for i in range(0, layers, stride)], [str(i) for i in range(0, layers, stride)]
    )
    bar = figure.colorbar(
        image, cax=figure.add_axes((0.92, bottom, 0.01, middle - bottom)), ticks=np.linspace(low, high, 5)
    )
    bar.set_ticklabels(ticks, color=theme.faint, fontsize=8.5)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    return figure


def figures(rows: Rows, theme: Theme, compressors: Mapping[str, float]) -> dict[str, Figure]:
    """Every figure that the rows have data for, by name, in the order of the report."""
    drawn = {
        "bits_per_byte": bits_per_byte(rows, theme, compressors),
        "loss": loss(rows, theme),
        "learning_rate": learning_rate(rows, theme),
        "gradient_norm": gradient_norm(rows, theme),
        "tokens_per_second": speed(rows, theme),
        "router_losses": router_losses(rows, theme),
        "expert_load": expert_load(rows, theme),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """The figure as PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
