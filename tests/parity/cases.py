"""Tiny MoE layers of published models, with weights that make every option matter.

Weights come from NumPy's RandomState, whose stream is frozen, so that a seed determines them. Shapes are those of
transformers: B batch, T time, D width, E experts, F hidden width of an expert, S hidden width of the shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.moe_config import MoEConfig

B, T, D = 2, 12, 16
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """A layer and its config. Each change in `wrong` must change the output."""

    name: str
    family: str  # name of the model in transformers
    seed: int
    moe: MoEConfig
    wrong: tuple[dict[str, Any], ...]

    @property
    def file(self) -> Path:
        """Return the path of the reference's outputs and gradients."""
        return FOLDER / f"{self.name}.npz"


_DEEPSEEK = MoEConfig(
    num_experts=16, top_k=4, hidden_dim=6, shared_experts=2, weights="sigmoid_renormalized", scale=2.5, groups=(4, 2),
    bias_rate=0.0,
)  # fmt: skip
_DEEPSEEK_WRONG: tuple[dict[str, Any], ...] = (
    {"scale": 1.0}, {"groups": (1, 1)}, {"groups": (4, 3)}, {"groups": (2, 1)}, {"bias_rate": None},
    {"weights": "renormalized"}, {"shared_experts": 0}, {"top_k": 3},
)  # fmt: skip

CASES = (
    Case(
        "mixtral",
        "mixtral",
        3,
        MoEConfig(num_experts=8, top_k=2, hidden_dim=12, weights="renormalized"),
        ({"weights": "softmax"}, {"weights": "sigmoid_renormalized"}, {"top_k": 3}, {"scale": 1.1}),
    ),
    Case(
        "qwen3_moe",
        "qwen3_moe",
        5,
        MoEConfig(num_experts=8, top_k=3, hidden_dim=8, weights="renormalized"),
        ({"weights": "softmax"}, {"top_k": 2}),
    ),
    Case(
        "qwen3_moe_unnormalized",
        "qwen3_moe",
        7,
        MoEConfig(num_experts=8, top_k=3, hidden_dim=8, weights="softmax"),
        ({"weights": "renormalized"}, {"weights": "sigmoid"}),
    ),
    Case(
        "olmoe",
        "olmoe",
        12,
        MoEConfig(num_experts=12, top_k=4, hidden_dim=8, weights="softmax"),
        ({"weights": "renormalized"}, {"top_k": 3}),
    ),
    Case(
        "deepseek_v3",
        "deepseek_v3",
        13,
        _DEEPSEEK,
        (*_DEEPSEEK_WRONG, {"weights": "sigmoid"}),
    ),
    Case(
        "deepseek_v3_unnormalized",
        "deepseek_v3",
        17,
        MoEConfig(
            num_experts=12,
            top_k=3,
            hidden_dim=6,
            shared_experts=1,
            weights="sigmoid",
            scale=1.7,
            groups=(3, 2),
            bias_rate=0.0,
        ),
        (
            {"weights": "sigmoid_renormalized"},
            {"bias_rate": None},
            {"groups": (1, 1)},
            {"scale": 1.0},
            {"shared_experts": 0},
        ),
    ),
)


def draw(case: Case) -> dict[str, np.ndarray]:
    """Return inputs and weights, float32.

    Matrices are N(0, 1 / inputs); inputs and the differentiated functional are N(0, 1). Biases are large enough to
    change choices. `mask`: tokens that are not padding, for the statistics that use a mask.
    """
    random = np.random.RandomState(case.seed)

    def normal(*shape: int, std: float = 1.0) -> np.ndarray:
        return (random.standard_normal(shape) * std).astype(np.float32)

    E, F, S = case.moe.num_experts, case.moe.hidden_dim, case.moe.shared_experts * case.moe.hidden_dim
    drawn = {
        "x": normal(B, T, D),
        "functional": normal(B, T, D),
        "router": normal(E, D, std=D**-0.5),
        "gate_up": normal(E, 2 * F, D, std=D**-0.5),
        "down": normal(E, D, F, std=F**-0.5),
        "mask": random.uniform(size=(B, T)) < 0.7,
    }
    if case.moe.bias_rate is not None:
        drawn["bias"] = normal(E, std=0.2)
    if S:
        drawn |= {
            "shared_gate": normal(S, D, std=D**-0.5),
            "shared_up": normal(S, D, std=D**-0.5),
            "shared_down": normal(D, S, std=S**-0.5),
        }
    return drawn


def load(case: Case) -> dict[str, np.ndarray]:
    """Return the reference for `draw(case)`: y, logits, indices, weights, losses, and `d_NAME` for every input."""
    with np.load(case.file) as file:
        return dict(file)
