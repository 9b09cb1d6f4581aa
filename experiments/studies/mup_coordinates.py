"""muP's coordinate check: how much a few steps change hidden states and logits, over the width."""

import numpy as np

from experiments.studies.bases import ADAMW, dense, scales
from experiments.study.definition import Claim, SeedFigures, Study, grid
from experiments.study.fits import fit_power_law
from experiments.study.measures import Movement
from model.config import InitConfig

WIDTHS = (32, 64, 128, 256)
STEPS = 10
CONSTANT = {**ADAMW, "optimizer.schedule": "constant", "optimizer.warmup_steps": 0, "optimizer.weight_decay": 0.0,
            "train.steps": STEPS, "train.eval_every": 0, "model.init": InitConfig(embedding_std=1.0),
            "model.tied_embeddings": False}  # fmt: skip


def width(d: int) -> dict[str, int]:
    """Return the changes that make the base `d` wide, with heads of the same size."""
    return {"model.embed_dim": d, "model.attention.num_heads": d // 32, "model.attention.num_kv_heads": d // 32,
            "model.attention.head_dim": 32, "model.mlp.hidden_dim": 3 * d}  # fmt: skip


def parametrizations() -> dict[str, dict]:
    return {"standard": {}, "muP": {"model.mup_base_dim": WIDTHS[0]}}


def slope(parametrization: str, figure: str):
    """Return the exponent of the width in a figure, from the figures of a seed."""

    def found(seed: SeedFigures) -> float:
        sizes = [seed[f"{parametrization}, {d}"][figure] for d in WIDTHS]
        return fit_power_law(np.array(WIDTHS), np.array(sizes)).exponent

    return found


STUDY = Study(
    name="mup_coordinates",
    question="Do training steps change activations equally at every width under muP?",
    source="Yang et al. 2022, appendix D.1",
    base=dense(),
    arms=grid(
        parametrization={label: CONSTANT | changes for label, changes in parametrizations().items()},
        width={str(d): width(d) for d in WIDTHS},
    ),
    scales=scales(seeds=4),
    measures={"movement": Movement()},
    metric="logits_change",
    also=("hidden_change", "initial_logits"),
    claims=(
        Claim("under muP, the change of the logits is the same at every width", slope("muP", "logits_change"),
              "equal", 0.0, margin=0.25, metric="exponent"),
        Claim("in the standard parametrization, the change of the logits grows with the width",
              slope("standard", "logits_change"), "higher", 0.0, margin=0.25, metric="exponent"),
        Claim("under muP, the change of hidden states is the same at every width", slope("muP", "hidden_change"),
              "equal", 0.0, margin=0.25, metric="exponent"),
        Claim("in the standard parametrization, the change of hidden states grows", slope("standard", "hidden_change"),
              "higher", 0.0, metric="exponent"),
    ),
    notes=f"{STEPS} steps of AdamW at a constant rate. Claims are about the exponent of the width, 32 to 256; changes "
    "are root mean squares over held-out tokens. Under muP, the initial logits fall as the inverse root of the width, "
    "and with them what the change of hidden states adds to the logits: after few steps, the change of the logits "
    "falls with the width instead of staying the same.",
)  # fmt: skip
