"""What the routers of a run chose for the same held-out tokens, step by step.

Shapes: S evaluations, L MoE layers, N tokens, C choices of a token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from model.balance import co_activation, saturation
from train.records import RunFolder
from train.routing import read_choices


class Study(NamedTuple):
    steps: np.ndarray  # [S]
    saturation_SL: np.ndarray  # part of the choices of each step that are the last step's too
    co_activation_LEE: (
        np.ndarray
    )  # at the last step: of the tokens that chose i, the part that chose j; NaN on the diagonal
    chance: float  # the saturation of routers that have nothing to do with each other: choices of a token / E
    choices_a_token: int  # the most


def study(run: RunFolder, num_experts: int, log: Callable[[str], None] = lambda text: None) -> Study | None:
    """Return the study of the choices kept in RUN/routing; None where there are none. `log` receives a line for each
    file that is left out because it is damaged."""
    found = read_choices(run, log)
    if not found:
        return None
    steps, choices = np.array(list(found), np.float64), list(found.values())
    last_LNC = choices[-1]
    shared = [[saturation(a, b, num_experts) for a, b in zip(now, last_LNC, strict=True)] for now in choices]
    together = np.stack([np.array(co_activation(layer, num_experts)) for layer in last_LNC])
    together[:, np.arange(num_experts), np.arange(num_experts)] = np.nan  # one, and so of no interest
    chosen_LN = (last_LNC < num_experts).sum(-1)
    per_token = float(chosen_LN[chosen_LN > 0].mean()) if chosen_LN.any() else 0.0
    return Study(steps, np.asarray(shared, np.float64), together, per_token / num_experts, int(chosen_LN.max()))
