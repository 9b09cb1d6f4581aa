"""Position methods at the trained length and beyond it, and RoPE scaled after training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from experiments.studies.bases import dense, scales
from experiments.study.definition import Claim, Study
from experiments.study.measures import HeldOutUnder, Trained
from model.config import RopeScalingConfig

TRAINED = 128  # tokens, at every scale
LONGER = (256, 512)


@dataclass(frozen=True)
class Scaled:
    """Bits per byte of a RoPE network on longer windows, with its frequencies scaled and without training."""

    kind: Literal["linear", "ntk", "yarn"]
    length: int

    def __call__(self, trained: Trained) -> Mapping[str, float]:
        if trained.network.experiment.model.position.kind != "rope":
            return {}
        scaling = RopeScalingConfig(self.kind, factor=self.length / TRAINED, original_length=TRAINED)
        changes = {"data.sequence_length": self.length, "model.position.scaling": scaling}
        return HeldOutUnder(f"{self.kind}_{self.length}", changes)(trained)


def grows(kind: str):
    """Return how much worse a method gets from the trained length to four times that, in bits per byte."""
    return lambda seed: seed[kind]["at_512"] - seed[kind]["at_128"]


def rope(name: str):
    return lambda seed: seed["rope"][name]


STUDY = Study(
    name="positions",
    question="Which position methods learn best, and which still work beyond the trained length?",
    source="Press et al. 2022 (ALiBi), figure 1; Haviv et al. 2022, table 1; Peng et al. 2023 (YaRN), table 1",
    base=dense(),
    arms={kind: {"model.position.kind": kind} for kind in ("rope", "alibi", "sinusoidal", "learned", "none")},
    scales={name: scale.with_changes({"data.sequence_length": TRAINED}) for name, scale in scales(seeds=4).items()},
    measures={
        **{f"at_{n}": HeldOutUnder(f"at_{n}", {"data.sequence_length": n}) for n in (TRAINED, *LONGER)},
        **{f"{kind}_{n}": Scaled(kind, n) for kind in ("linear", "ntk", "yarn") for n in LONGER},
    },
    also=("at_128", "at_256", "at_512"),
    claims=(
        Claim("ALiBi at 4 times the length is not worse than at the length", grows("alibi"), "not_higher", 0.0,
              margin=0.02, metric="growth"),
        Claim("RoPE gets worse beyond the trained length", grows("rope"), "higher", 0.0, margin=0.1, metric="growth"),
        Claim("sinusoidal positions get worse beyond the trained length", grows("sinusoidal"), "higher", 0.0,
              margin=0.1, metric="growth"),
        Claim("RoPE learns better than no positions", "rope", "lower", than="none"),
        Claim("NTK-aware scaling repairs RoPE at twice the length", rope("ntk_256"), "lower", rope("at_256")),
        Claim("YaRN repairs RoPE at 4 times the length", rope("yarn_512"), "lower", rope("at_512")),
        Claim("YaRN is better than interpolation at 4 times the length", rope("yarn_512"), "lower",
              rope("linear_512")),
    ),
    notes="at_N: bits per byte in windows of N tokens, 256 windows; training windows have 128. Longer windows "
    "also give more context, so a method that still works gets better.",
)  # fmt: skip
