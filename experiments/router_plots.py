"""The figures of a report on the routers. As in experiments/plots.py, each function returns a Figure, or None without
data."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from experiments.plot_style import Rows, Theme, legend, series, single, style, thin
from experiments.routing import Study

MAX_COLUMNS = 300  # of the heat map
MAX_HEAT_ROWS = 400  # beyond this, the heat map shows each layer's most loaded expert instead of every expert
MAX_LAYERS = 4  # for which co-activation is drawn


def losses(rows: Rows, theme: Theme) -> Figure | None:
    """The auxiliary losses of the router, before their coefficients."""
    names = {"load_balance_loss": "load balance (1 when even)", "router_z_loss": "router z"}
    lines = {label: series(rows, key) for key, label in names.items()}
    if not any(np.isfinite(values).any() for _, values in lines.values()):
        return None
    figure, axes = single(theme, "Router losses", "auxiliary loss")
    for i, (label, (steps, values)) in enumerate(lines.items()):
        if len(steps):
            axes.plot(*thin(steps, values), color=theme.lines[i], linewidth=1.3, label=label)
    legend(axes, theme)
    return figure


def certainty(rows: Rows, theme: Theme) -> Figure | None:
    """Certainty of the routers: the largest probability, and the entropy as a part of its maximum."""
    confidence, entropy = series(rows, "router_confidence"), series(rows, "router_entropy")
    experts = next((len(row["expert_load"][0]) for row in rows if row.get("expert_load")), 0)
    if not len(confidence[0]) or experts < 2:
        return None
    figure, axes = single(theme, "Router certainty", "mean over tokens and layers")
    axes.plot(*thin(*confidence), color=theme.lines[0], linewidth=1.3, label="largest probability")
    steps, values = thin(*entropy)
    axes.plot(steps, values / np.log(experts), color=theme.lines[1], linewidth=1.3, label="entropy / its maximum")
    axes.set_ylim(0, 1.05)
    legend(axes, theme)
    return figure


def dropped(rows: Rows, theme: Theme) -> Figure | None:
    """Choices beyond the capacity of their expert, by layer."""
    found = [row for row in rows if row.get("router_layers")]
    share_NL = np.array([row["router_layers"]["dropped_fraction"] for row in found], np.float64)
    if not share_NL.any():
        return None
    steps = np.array([row["step"] for row in found], np.float64)
    figure, axes = single(theme, "Dropped choices, by layer", "part of the choices")
    _lines_of_layers(axes, theme, *thin(steps, share_NL))
    axes.set_ylim(bottom=0)
    return figure


def saturation(study: Study, theme: Theme) -> Figure | None:
    """Part of the choices that the last step makes too, by layer (Muennighoff et al. 2024, sec. 5.1)."""
    if len(study.steps) < 3:
        return None
    figure, axes = single(theme, "Router saturation, by layer", "choices shared with the last step")
    _lines_of_layers(axes, theme, study.steps, study.saturation_SL)
    axes.axhline(study.chance, color=theme.faint, linewidth=1, linestyle=":")
    axes.annotate("chance", (study.steps[-1], study.chance), color=theme.faint, fontsize=8.5, ha="right", va="bottom")
    axes.set_ylim(0, 1.05)
    return figure


def co_activation(study: Study, theme: Theme) -> Figure | None:
    """How often a token that chose expert i also chose j (Muennighoff et al. 2024, sec. 5.2), for up to MAX_LAYERS
    layers."""
    if study.chance >= 1 or not np.isfinite(study.co_activation_LEE).any() or study.choices_a_token < 2:
        return None
    layers = np.unique(np.linspace(0, len(study.co_activation_LEE) - 1, MAX_LAYERS).astype(int))
    figure = Figure(figsize=(11.8, 3.4), dpi=140)
    figure.set_facecolor(theme.paper)
    most = float(np.nanmax(study.co_activation_LEE[layers]))
    colours = LinearSegmentedColormap.from_list("together", [theme.paper, theme.lines[0]])
    for i, layer in enumerate(layers):
        axes = figure.add_axes((0.055 + i * 0.218, 0.14, 0.185, 0.68))
        style(figure, axes, theme, f"Together, MoE layer {layer}", "expert" if i == 0 else "", x="with expert")
        axes.grid(False)
        image = axes.imshow(study.co_activation_LEE[layer], cmap=colours, vmin=0, vmax=most, interpolation="nearest")
    bar = figure.colorbar(image, cax=figure.add_axes((0.935, 0.14, 0.01, 0.68)))
    bar.ax.tick_params(colors=theme.faint, labelsize=8.5, length=0)
    bar.outline.set_visible(False)
    return figure


def _lines_of_layers(axes, theme: Theme, steps: np.ndarray, values_NL: np.ndarray) -> None:
    """Draw one line for each layer, in colours from the first to the second."""
    ramp = LinearSegmentedColormap.from_list("layers", theme.lines[:2])
    layers = values_NL.shape[1]
    for layer in range(layers):
        labelled = layer in (0, layers - 1) or layers <= 6
        axes.plot(
            steps,
            values_NL[:, layer],
            color=ramp(layer / max(layers - 1, 1)),
            linewidth=1.3,
            label=f"MoE layer {layer}" if labelled else None,
        )
    legend(axes, theme)


def expert_load(rows: Rows, theme: Theme) -> Figure | None:
    """Expert load over layers and steps as a multiple of the fair share, and the worst violation above it.

    `expert_load` of a row is [L][E], and each layer sums to one; the colour is its value times E.
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
    style(figure, top, theme, f"Expert load, {what}", "max violation", x="")
    violation = series(loaded, "max_violation")
    if len(violation[0]):
        top.plot(*thin(*violation), color=theme.lines[1], linewidth=1.2)
        top.set_ylim(bottom=0)
    style(figure, axes, theme, "", "MoE layer")
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
