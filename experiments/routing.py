"""Statistics over steps of the experts that a run's routers choose for a fixed set of held-out tokens.

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
    saturation_SL: np.ndarray  # fraction of the choices at each step that are also choices at the last step
    # At the last step: the fraction of the tokens with expert i that also chose j. NaN on the diagonal.
    co_activation_LEE: np.ndarray
    chance: float  # saturation of independent routers: choices per token / E
    choices_a_token: int  # largest number of choices of a token


def study(run: RunFolder, num_experts: int, log: Callable[[str], None] = lambda text: None) -> Study | None:
    """Return the statistics of the choices in RUN/routing, or None if there are none.

    `log` receives a line for each damaged file, which is left out.
    """
    found = read_choices(run, log)
    if not found:
        return None
    steps, choices = np.array(list(found), np.float64), list(found.values())
    last_LNC = choices[-1]
    shared = [[saturation(a, b, num_experts) for a, b in zip(now, last_LNC, strict=True)] for now in choices]
    together = np.stack([np.array(co_activation(layer, num_experts)) for layer in last_LNC])
    together[:, np.arange(num_experts), np.arange(num_experts)] = np.nan  # always one
    chosen_LN = (last_LNC < num_experts).sum(-1)
    per_token = float(chosen_LN[chosen_LN > 0].mean()) if chosen_LN.any() else 0.0
    return Study(steps, np.asarray(shared, np.float64), together, per_token / num_experts, int(chosen_LN.max()))
