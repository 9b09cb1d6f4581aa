"""The decision rule: whether the runs of a study reproduce a claim, contradict it, or leave it open.

    verdicts = decide_all([
        ClaimData("GLU lowers the loss", "lower", baseline=relu_losses, arm=glu_losses, unit="nats"),
        ClaimData("RMSNorm equals LayerNorm", "equal", baseline=layer_norm, arm=rms_norm, margin=0.01, unit="nats"),
    ])

Each claim is about the mean difference arm - baseline of runs that share seeds. For a single claim and
alpha = 1 - confidence, the t interval of the difference decides:

| expected   | reproduced if the interval lies | contradicted if it lies                | its confidence |
|------------|---------------------------------|----------------------------------------|----------------|
| lower      | below -margin                   | above 0                                | 1 - alpha      |
| higher     | above margin                    | below 0                                | 1 - alpha      |
| equal      | within ±margin (TOST)           | outside ±margin, with 1 - alpha        | 1 - 2 alpha    |
| not_higher | below margin                    | above margin                           | 1 - 2 alpha    |
| not_lower  | above -margin                   | below -margin                          | 1 - 2 alpha    |

Anything else is inconclusive. With several claims, Holm's method adjusts the p values of "reproduced" over the family,
and those of "contradicted" likewise. So the probability that any claim is wrongly called reproduced is at most alpha,
and so is the probability that any is wrongly called contradicted, however the claims depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.study.power import check_fraction, detectable_effect, half_width
from experiments.study.statistics import Paired, Values, alpha_of, holm, p_above, p_below, paired

Expected = Literal["lower", "higher", "equal", "not_higher", "not_lower"]
Outcome = Literal["reproduced", "contradicted", "inconclusive"]


@dataclass(frozen=True)
class ClaimData:
    """A claim and the results of its runs, fixed before the runs except for the values."""

    name: str
    expected: Expected  # of the arm, compared with the baseline
    baseline: Values  # one result for each seed
    arm: Values  # of the same seeds
    margin: float = 0.0  # in the unit of the values; above 0 for "equal"
    unit: str = ""  # of the values, e.g. "nats"


@dataclass(frozen=True)
class Verdict:
    """The decision about a claim, with what a reader needs to check it."""

    name: str
    outcome: Outcome
    reason: str  # one sentence
    n: int  # pairs of runs
    mean: float  # difference arm - baseline
    sd: float  # of the differences
    low: float  # of the interval, which is not adjusted for the other claims; infinite with fewer than 2 seeds
    high: float
    confidence: float  # of the interval
    p: float  # of the outcome; if inconclusive, of the outcome that is closer
    adjusted_p: float  # the same after Holm's adjustment
    detectable: float  # the true difference that a two-sided test at alpha / claims finds with the wanted power


def decide(claim: ClaimData, confidence: float = 0.95, power: float = 0.8) -> Verdict:
    """Return the verdict about the only claim of a study."""
    return decide_all([claim], confidence, power)[0]


def decide_all(claims: Sequence[ClaimData], confidence: float = 0.95, power: float = 0.8) -> list[Verdict]:
    """Return the verdicts about all claims of a study, adjusted for their number.

    Pass every claim that was stated before the runs. One with fewer than 2 seeds so far is inconclusive, and counts.
    Raises ValueError, with the name of the claim, for a wrong margin, values that are not finite, or unequal numbers of
    seeds.
    """
    check_fraction("confidence", confidence, least=0.5)
    differences = [_difference(claim, confidence) for claim in claims]
    tests = [_p_values(claim, found) for claim, found in zip(claims, differences, strict=True)]
    adjusted = [holm([pair[side] for pair in tests]) for side in (0, 1)]
    verdicts = []
    for claim, found, raw, reproduced, contradicted in zip(claims, differences, tests, *adjusted, strict=True):
        if found is None:
            verdicts.append(_too_few(claim))
        else:
            pair = float(reproduced), float(contradicted)
            verdicts.append(_verdict(claim, found, raw, pair, len(claims), confidence, power))
    return verdicts


def _difference(claim: ClaimData, confidence: float) -> Paired | None:
    """Return the difference with its interval, or None with fewer than 2 seeds. Raises ValueError for a wrong claim."""
    if not 0 <= claim.margin < math.inf or (claim.expected == "equal" and claim.margin == 0):
        raise ValueError(
            f'claim "{claim.name}": margin = {claim.margin} with expected = "{claim.expected}"; use a number of 0 or '
            'more, and above 0 for "equal"'
        )
    if len(claim.baseline) == len(claim.arm) < 2:
        return None
    try:
        return paired(claim.baseline, claim.arm, confidence)
    except ValueError as error:
        raise ValueError(f'claim "{claim.name}": {error}') from error


def _p_values(claim: ClaimData, found: Paired | None) -> tuple[float, float]:
    """Return the p values of "reproduced" and "contradicted", to be compared with alpha."""
    if found is None:
        return 1.0, 1.0
    margin = claim.margin
    if claim.expected == "lower":
        return _twice(p_below(found, -margin)), _twice(p_above(found))
    if claim.expected == "higher":
        return _twice(p_above(found, margin)), _twice(p_below(found))
    if claim.expected == "equal":
        within = max(p_above(found, -margin), p_below(found, margin))
        return within, _twice(min(p_above(found, margin), p_below(found, -margin)))
    if claim.expected == "not_higher":
        return p_below(found, margin), p_above(found, margin)
    return p_above(found, -margin), p_below(found, -margin)


def _verdict(
    claim: ClaimData,
    found: Paired,
    raw: tuple[float, float],
    adjusted: tuple[float, float],
    claims: int,
    confidence: float,
    power: float,
) -> Verdict:
    """Return the verdict about one of several claims from its p values of "reproduced" and "contradicted"."""
    alpha = alpha_of(confidence)
    outcome: Outcome = "inconclusive"
    if min(adjusted) <= alpha:
        outcome = "reproduced" if adjusted[0] <= alpha else "contradicted"
    side = 0 if raw[0] <= raw[1] else 1
    two_sided = claim.expected in ("lower", "higher") or (claim.expected == "equal" and outcome == "contradicted")
    level = confidence if two_sided else round(2 * confidence - 1, 12)
    half = half_width(found.sd, found.n, level)
    low, high = found.mean - half, found.mean + half
    detectable = detectable_effect(found.sd, found.n, power, alpha / claims)
    adjustment, unadjusted = (f" over {claims} claims", "unadjusted ") if claims > 1 else ("", "")
    mean = f"{found.mean:+.4g} {claim.unit}".rstrip()
    facts = (
        f"mean difference {mean}, {unadjusted}{100 * level:g}% interval {low:+.4g} to "
        f"{high:+.4g}, n = {found.n}, adjusted p{adjustment} = {adjusted[side]:.3g}, minimum detectable effect at "
        f"{100 * power:g}% power {_quantity(detectable, claim.unit)}"
    )
    return Verdict(
        name=claim.name,
        outcome=outcome,
        reason=f"{_finding(claim, outcome, alpha)} ({facts}).",
        n=found.n,
        mean=found.mean,
        sd=found.sd,
        low=low,
        high=high,
        confidence=level,
        p=raw[side],
        adjusted_p=adjusted[side],
        detectable=detectable,
    )


def _too_few(claim: ClaimData) -> Verdict:
    """Return the verdict about a claim with fewer than 2 seeds."""
    n = len(claim.arm)
    mean = float(claim.arm[0] - claim.baseline[0]) if n else math.nan
    difference = f", mean difference {mean:+.4g} {claim.unit}".rstrip() if n else ""
    reason = f"A test needs at least 2 seeds (n = {n}{difference})."
    return Verdict(
        claim.name, "inconclusive", reason, n, mean, math.nan, -math.inf, math.inf, math.nan, 1.0, 1.0, math.inf
    )


def _twice(p: float) -> float:
    return min(1.0, 2 * p)


def _finding(claim: ClaimData, outcome: Outcome, alpha: float) -> str:
    """Return the main clause of the reason."""
    margin = _quantity(claim.margin, claim.unit)
    if claim.expected in ("lower", "higher"):
        beyond = f" by more than {margin}" if claim.margin else ""
        opposite = "higher" if claim.expected == "lower" else "lower"
        return {
            "reproduced": f"The arm is {claim.expected} than the baseline{beyond}, as expected",
            "contradicted": f"The arm is {opposite} than the baseline, but was expected to be {claim.expected}",
            "inconclusive": f"The runs do not show at the {alpha:.3g} level that the arm is {claim.expected} than the "
            f"baseline{beyond}, nor that it is {opposite}",
        }[outcome]
    if claim.expected == "equal":
        return {
            "reproduced": f"The arm equals the baseline within {margin}, as expected",
            "contradicted": f"The arm differs from the baseline by more than {margin}, but was expected to be equal",
            "inconclusive": f"The runs do not show at the {alpha:.3g} level that the arm equals the baseline within "
            f"{margin}, nor that it differs by more",
        }[outcome]
    direction = claim.expected.removeprefix("not_")
    beyond = f" by more than {margin}" if claim.margin else ""
    return {
        "reproduced": f"The arm is not {direction} than the baseline{beyond}, as expected",
        "contradicted": f"The arm is {direction} than the baseline{beyond}, which was not expected",
        "inconclusive": f"The runs do not show at the {alpha:.3g} level whether the arm is {direction} than the "
        f"baseline{beyond}",
    }[outcome]


def _quantity(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".rstrip()
