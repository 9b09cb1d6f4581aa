"""The routers' choices on the page: which experts each token uses in each layer, and how many tokens each expert gets.

Shapes: T time, C choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from experiments.html import LINES, Html, element, joined
from experiments.inspection.capture import Choices, Layer
from experiments.inspection.figures import rounded
from model.config import ModelConfig

MOST_BUTTONS = 64  # experts for which the legend has a button each

GRID_HINT = """\
In a layer of experts, the router sends each token to a few of them. Every cell has the colours of its experts, as wide
as their weights; the widest is the expert that counts most. Point at a cell for the numbers, and choose an expert in
the legend to see only its tokens. Experts of different layers have nothing to do with each other, although they share
colours."""
LOAD_HINT = """\
The height of a bar is an expert's part of all choices for this text; the dashed line is an even share. A few words are
no measure of balance: routers are balanced over whole batches."""
DROPPED = " Grey: the choice exceeded the capacity of its expert (model.moe.capacity_factor) and was dropped."


def facts(layers: Sequence[Layer], config: ModelConfig) -> list[dict[str, Any]]:
    """Return the choices for page.js, a dict for each layer of experts. The index `experts` means no expert."""
    assert config.moe is not None or all(layer.choices is None for layer in layers)
    return [
        {
            "layer": i,
            "experts": config.moe.num_experts,
            "chosen": layer.choices.indices_TC.tolist(),
            "weights": rounded(layer.choices.weights_TC),
            "kept": layer.choices.kept_TC.astype(int).tolist(),
        }
        for i, layer in enumerate(layers)
        if layer.choices is not None and config.moe is not None
    ]


def colours(config: ModelConfig) -> str:
    """Return the style of the experts' colours: var(--e0), var(--e1), ..."""
    if config.moe is None:
        return ""
    lines, E = len(LINES["light"]), config.moe.num_experts
    made = (f"var(--line{e})" if E <= lines else f"hsl({137.508 * e % 360:.0f} 55% 54%)" for e in range(E))
    return "\n:root {" + "".join(f" --e{e}: {colour};" for e, colour in enumerate(made)) + " }\n"


def load(choices: Choices, num_experts: int) -> Int[np.ndarray, "E"]:
    """Return the number of choices that fall on each expert, dropped ones included."""
    return np.bincount(choices.indices_TC.ravel(), minlength=num_experts + 1)[:num_experts]


def section(layers: Sequence[Layer], config: ModelConfig, columns: Sequence[str]) -> Html | None:
    """Return the grid of choices and the loads, or None for a network without experts. `columns`: labels of the
    tokens."""
    routed = [(i, layer.choices) for i, layer in enumerate(layers) if layer.choices is not None]
    if config.moe is None or not routed:
        return None
    E = config.moe.num_experts
    rows = (
        element("tr", element("th", f"layer {i}"), *(element("td", style=_stripes(*each)) for each in _tokens(choices)))
        for i, choices in routed
    )
    head = element("tr", element("th", "token"), *(element("th", column) for column in columns))
    grid = element("table", element("thead", head), element("tbody", *rows))
    dropped = any((~choices.kept_TC & (choices.indices_TC < E)).any() for _, choices in routed)
    buttons = [
        element("button", element("span", class_="swatch", style=f"background:var(--e{e})"), f"expert {e}",
                type="button", **{"aria-pressed": "false"})
        for e in range(min(E, MOST_BUTTONS))
    ]  # fmt: skip
    if E > MOST_BUTTONS:
        buttons.append(element("span", f"and {E - MOST_BUTTONS} more"))
    return joined(
        (
            element("h2", "Router choices"),
            element("p", GRID_HINT + (DROPPED if dropped else ""), class_="hint"),
            element("div", *buttons, class_="legend experts", id="experts"),
            element("div", grid, class_="wide routes", id="routes"),
            element("p", LOAD_HINT, class_="hint", style="margin-top: 26px"),
            element("div", *(_bars(i, load(choices, E)) for i, choices in routed), class_="loads"),
        )
    )


def _tokens(choices: Choices) -> Iterator[tuple[list[int], list[float], list[bool]]]:
    return zip(choices.indices_TC.tolist(), choices.weights_TC.tolist(), choices.kept_TC.tolist(), strict=True)


def _stripes(experts: Sequence[int], weights: Sequence[float], kept: Sequence[bool]) -> str:
    """Return a background of one stripe for each expert of a token, widest first."""
    found = sorted(
        ((max(weight, 0.0), expert, is_kept) for expert, weight, is_kept in zip(experts, weights, kept, strict=True)
         if weight == weight and weight > 0),
        reverse=True,
    )  # fmt: skip
    total, edge, stops = sum(weight for weight, _, _ in found), 0.0, []
    for weight, expert, is_kept in found:
        start, edge = edge, edge + 100 * weight / total
        colour = f"var(--e{expert})" if is_kept else "var(--other)"
        stops.append(f"{colour} {start:.0f}% {edge:.0f}%")
    return f"background:linear-gradient(90deg,{','.join(stops)})" if stops else ""


def _bars(layer: int, load_E: Int[np.ndarray, "E"]) -> Html:
    """Return the loads of the experts of a layer."""
    E, total = len(load_E), max(int(load_E.sum()), 1)
    most = max(int(load_E.max()), 1)
    bars = (
        element("div", title=f"expert {e}: {n} of {total} choices, {n / total:.1%}",
                style=f"height:{100 * n / most:.0f}%;background:var(--e{e})")
        for e, n in enumerate(load_E.tolist())
    )  # fmt: skip
    fair = element("span", class_="fair", style=f"bottom:{100 * total / E / most:.0f}%")
    busiest = element("span", f"busiest: {most * E / total:.1f} × an even share")
    return element(
        "div", element("h3", f"layer {layer}", busiest), element("div", *bars, fair, class_="columns"), class_="load"
    )
