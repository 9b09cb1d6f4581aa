"""Rows rearranged so that the middle comes last: does it cost left-to-right quality, and does it teach infilling?"""

from experiments.studies.bases import dense, scales
from experiments.study.definition import Claim, Study
from experiments.study.measures import Infilling

FIM = {"train.objective": "fill_in_middle"}
MARGIN = 0.02  # bits per byte; stated before the runs

STUDY = Study(
    name="fill_in_middle",
    question="Is training to fill in the middle free, as it is for large models?",
    source="Bavarian et al. 2022, figure 4",
    base=dense(),
    arms={"0": {}} | {f"{rate:g}": {**FIM, "train.fim_rate": rate} for rate in (0.25, 0.5, 0.9, 1.0)},
    scales=scales(seeds=5),
    measures={"infilling": Infilling()},
    also=("middle_nats", "infill_nats"),
    claims=(
        Claim("a rate of 0.5 costs no left-to-right quality", "0.5", "not_higher", than="0", margin=MARGIN),
        Claim("a rate of 0.9 costs no left-to-right quality", "0.9", "not_higher", than="0", margin=MARGIN),
        Claim("a rate of 1 costs left-to-right quality", "1", "higher", than="0", margin=MARGIN),
        Claim("with a rate of 0.5, the text after a middle helps to predict it",
              lambda seed: seed["0.5"]["infill_nats"], "lower", lambda seed: seed["0.5"]["middle_nats"],
              metric="nats per token"),
    ),
    notes="Half of the rearranged rows are in suffix-prefix-middle order. The paper's models see 100 billion tokens; "
    "here, a row that is rearranged is missing from left-to-right training.",
)  # fmt: skip
