"""Numbers on the page: as text, as JSON, and as the strength of a colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from experiments.html import Html, element

STRONGEST = 62  # percent of the strongest colour behind a text, which stays readable


def rounded(values: np.ndarray) -> list:
    """Return the numbers to three digits, in nested lists; None where they are not finite, which JSON cannot hold."""
    if values.ndim > 1:
        return [rounded(row) for row in values]
    return [float(f"{x:.3g}") if math.isfinite(x) else None for x in values.tolist()]


def in_bits(nats: float | np.floating) -> str:
    """Return an amount of information as text."""
    return f"{nats / math.log(2):.2f}" if math.isfinite(nats) else "not finite"


def percent(p: float) -> str:
    """Return a probability as text."""
    return "100 %" if p >= 0.995 else f"{float(f'{100 * p:.2g}'):g} %"


def strength(part: float) -> str:
    """Return the style of a colour behind a text: a part, from 0 to 1, of the strongest one."""
    return f"--s:{STRONGEST * part:.0f}%"


def legend(what: str, colour: str, steps: Sequence[tuple[str, float]]) -> Html:
    """Return a legend of (text, part of the strongest colour)."""
    marks = (element("span", text, style=strength(part)) for text, part in steps)
    return element("div", what, element("span", *marks, class_="ramp", style=f"--of:{colour}"), class_="legend")
