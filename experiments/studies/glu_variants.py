"""The eight feed-forward layers of Shazeer 2020, table 1, at equal parameters and FLOPs."""

from experiments.studies.bases import dense, scales
from experiments.study.definition import Changes, Claim, Published, Study
from train.config import Experiment

PLAIN, GATED = ("relu", "gelu", "silu"), ("glu", "bilinear", "reglu", "geglu", "swiglu")
# Mean log-perplexity of the pre-training task after 65,536 steps, 4 runs of the baseline.
TABLE_1 = {"relu": 1.997, "gelu": 1.983, "silu": 1.994, "glu": 1.982, "bilinear": 1.960, "geglu": 1.942,
           "swiglu": 1.944, "reglu": 1.953}  # fmt: skip


def arms(base: Experiment) -> dict[str, Changes]:
    """Plain layers get 3/2 of the width, so that all have as many parameters."""
    width = base.model.mlp.hidden_dim
    plain: dict[str, Changes] = {
        kind: {"model.mlp.kind": kind, "model.mlp.hidden_dim": width * 3 // 2} for kind in PLAIN
    }
    return plain | {kind: {"model.mlp.kind": kind} for kind in GATED}


def against_relu(kind: str) -> Claim:
    return Claim(
        f"{kind} learns better than relu", kind, "lower", than="relu",
        published=Published(TABLE_1[kind], TABLE_1["relu"]),
    )  # fmt: skip


STUDY = Study(
    name="glu_variants",
    question="Do gated feed-forward layers learn better than plain ones of equal size?",
    source="Shazeer 2020, table 1",
    base=dense(),
    arms=arms,
    scales=scales(seeds=5),
    claims=tuple(against_relu(kind) for kind in ("geglu", "swiglu", "reglu", "bilinear")),
)
