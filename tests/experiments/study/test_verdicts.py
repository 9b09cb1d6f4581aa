"""Decisions about claims with a known answer, each branch of the rule, and its error rates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.study.power import detectable_effect
from experiments.study.statistics import equivalence, holm, noninferiority, paired
from experiments.study.verdicts import ClaimData, decide, decide_all
from tests.experiments.study.test_statistics import EXPERIMENTS, assert_rate, calibration, experiments

NOISE = np.array([-0.02, -0.01, 0.0, 0.01, 0.02])  # mean 0, sd 0.0158, half width of the 95 % interval 0.0196
BASELINE = np.array([3.0, 3.5, 2.5, 3.2, 2.8])


def claim(expected: str, difference: float, margin: float = 0.0, noise: float = 1.0) -> ClaimData:
    return ClaimData("c", expected, BASELINE, BASELINE + difference + noise * NOISE, margin, "nats")


@pytest.mark.parametrize(
    ("expected", "difference", "margin", "outcome", "words"),
    [
        ("lower", -0.05, 0, "reproduced", "The arm is lower than the baseline, as expected"),
        ("lower", 0.05, 0, "contradicted", "The arm is higher than the baseline, but was expected to be lower"),
        (
            "lower",
            -0.01,
            0,
            "inconclusive",
            "do not show at the 0.05 level that the arm is lower than the baseline, nor",
        ),
        ("lower", -0.05, 0.02, "reproduced", "lower than the baseline by more than 0.02 nats, as expected"),
        ("lower", -0.05, 0.04, "inconclusive", "lower than the baseline by more than 0.04 nats, nor that it is higher"),
        ("lower", 0.05, 0.04, "contradicted", "The arm is higher"),
        ("lower", 0.01, 0.04, "inconclusive", "do not show"),
        ("higher", 0.05, 0, "reproduced", "The arm is higher than the baseline, as expected"),
        ("higher", -0.05, 0, "contradicted", "The arm is lower than the baseline, but was expected to be higher"),
        ("higher", 0.05, 0.04, "inconclusive", "nor that it is lower"),
        ("higher", 0.05, 0.02, "reproduced", "by more than 0.02 nats"),
        ("equal", 0.01, 0.03, "reproduced", "The arm equals the baseline within 0.03 nats, as expected"),
        ("equal", -0.01, 0.03, "reproduced", "equals"),
        ("equal", 0.02, 0.03, "inconclusive", "nor that it differs by more"),
        ("equal", 0.06, 0.03, "contradicted", "The arm differs from the baseline by more than 0.03 nats, but"),
        ("equal", -0.06, 0.03, "contradicted", "differs"),
        ("equal", 0.0, 0.01, "inconclusive", "do not show"),
        ("not_higher", 0.01, 0.03, "reproduced", "not higher than the baseline by more than 0.03 nats, as expected"),
        ("not_higher", -0.9, 0.03, "reproduced", "not higher"),
        ("not_higher", 0.06, 0.03, "contradicted", "The arm is higher than the baseline by more than 0.03 nats, which"),
        ("not_higher", 0.03, 0.03, "inconclusive", "do not show at the 0.05 level whether the arm is higher"),
        ("not_lower", -0.01, 0.03, "reproduced", "not lower than the baseline by more than 0.03 nats, as expected"),
        ("not_lower", 0.9, 0.03, "reproduced", "not lower"),
        ("not_lower", -0.06, 0.03, "contradicted", "The arm is lower than the baseline by more than 0.03 nats"),
        ("not_lower", -0.03, 0.03, "inconclusive", "whether the arm is lower"),
        ("not_higher", -0.05, 0, "reproduced", "The arm is not higher than the baseline, as expected"),
    ],
)
def test_each_branch_of_the_rule(expected, difference, margin, outcome, words):
    found = decide(claim(expected, difference, margin))
    assert found.outcome == outcome and words in found.reason


def test_the_reason_is_one_sentence_with_the_numbers():
    found = decide(claim("lower", -0.05))
    assert found.reason == (
        "The arm is lower than the baseline, as expected (mean difference -0.05 nats, 95% interval -0.06963 to "
        "-0.03037, n = 5, adjusted p = 0.00211, minimum detectable effect at 80% power 0.0266 nats)."
    )
    test = paired(BASELINE, BASELINE - 0.05 + NOISE)
    assert (found.n, found.mean, found.sd, found.low, found.high) == (5, test.mean, test.sd, test.low, test.high)
    assert found.confidence == 0.95 and found.p == found.adjusted_p == pytest.approx(test.p)
    assert found.detectable == detectable_effect(test.sd, 5)
    plain = decide(replace(claim("lower", -0.05), unit=""))
    assert "mean difference -0.05, 95% interval" in plain.reason and plain.reason.endswith("power 0.0266).")


@calibration
def test_the_interval_is_the_one_that_decides():
    """On random claims, the outcome of a single claim is what its reported interval says."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for expected in ("lower", "higher", "equal", "not_higher", "not_lower"):
        for _ in range(200):
            margin = float(rng.choice([0.01, 0.03]))
            difference = BASELINE + rng.uniform(-0.08, 0.08) + rng.uniform(0, 1) * rng.normal(0, 0.02, 5)
            found = decide(ClaimData("c", expected, BASELINE, difference, margin))
            low, high = found.low, found.high
            assert found.confidence == (
                0.95
                if expected in ("lower", "higher") or (expected, found.outcome) == ("equal", "contradicted")
                else 0.9
            )
            reproduced, contradicted = {
                "lower": (high < -margin, low > 0),
                "higher": (low > margin, high < 0),
                "equal": (
                    -margin < low and high < margin,
                    found.confidence == 0.95 and (low > margin or high < -margin),
                ),
                "not_higher": (high < margin, low > margin),
                "not_lower": (low > -margin, high < -margin),
            }[expected]
            expected_outcome = "reproduced" if reproduced else "contradicted" if contradicted else "inconclusive"
            assert found.outcome == expected_outcome
            outcomes.add((expected, found.outcome))
    assert len(outcomes) == 15


def test_equality_and_noninferiority_are_the_tests_of_the_other_module():
    for difference in (-0.02, 0.0, 0.015, 0.02, 0.05):
        data = claim("equal", difference, 0.03)
        assert (decide(data).outcome == "reproduced") == equivalence(data.baseline, data.arm, 0.03).equivalent
        data = replace(data, expected="not_higher")
        assert (decide(data).outcome == "reproduced") == noninferiority(data.baseline, data.arm, 0.03).noninferior


def test_several_claims_are_adjusted_together():
    """Differences that are significant one by one are not among four claims."""
    claims = [claim("lower", -0.02), claim("lower", -0.05), claim("higher", -0.021), claim("lower", 0.0)]
    alone, together = [decide(each) for each in claims], decide_all(claims)
    assert [each.outcome for each in alone] == ["reproduced", "reproduced", "contradicted", "inconclusive"]
    assert [each.outcome for each in together] == ["inconclusive", "reproduced", "inconclusive", "inconclusive"]
    reproduced = holm([alone[0].p, alone[1].p, 1.0, alone[3].p])
    assert [together[i].adjusted_p for i in (0, 1, 3)] == pytest.approx(list(reproduced[[0, 1, 3]]))
    assert together[2].adjusted_p == pytest.approx(min(1, 4 * alone[2].p))
    assert "unadjusted 95% interval -0.03963 to" in together[0].reason
    assert "adjusted p over 4 claims = " in together[0].reason and together[0].p == alone[0].p
    assert [each.detectable for each in together] == [detectable_effect(each.sd, 5, 0.8, 0.05 / 4) for each in alone]
    assert decide_all([]) == []


def test_runs_without_spread():
    def outcome(expected: str, difference: float, margin: float) -> str:
        arm = [1.0 + difference, 2.0 + difference]
        return decide(ClaimData("c", expected, [1.0, 2.0], arm, margin)).outcome

    assert outcome("lower", 0, 0) == "inconclusive" and outcome("equal", 0, 0.1) == "reproduced"
    assert outcome("lower", -0.5, 0) == "reproduced" and outcome("higher", -0.5, 0) == "contradicted"
    assert outcome("equal", 0.5, 0.5) == outcome("not_higher", 0.5, 0.5) == "inconclusive"
    assert outcome("equal", 0.5, 0.25) == outcome("not_higher", 0.5, 0.25) == "contradicted"


@pytest.mark.parametrize("n", [0, 1])
def test_a_claim_with_too_few_seeds_is_inconclusive_and_counts(n):
    few = ClaimData("few", "equal", BASELINE[:n], BASELINE[:n] + 1, 0.1, "nats")
    found, other = decide_all([few, claim("lower", -0.05)])
    assert found.outcome == "inconclusive" and found.n == n and found.adjusted_p == 1
    assert found.reason == f"A test needs at least 2 seeds (n = {n}{', mean difference +1 nats' if n else ''})."
    assert other.adjusted_p == pytest.approx(2 * other.p)


def test_wrong_claims_are_refused_by_name():
    with pytest.raises(ValueError, match=r'claim "c": margin = 0.0 with expected = "equal"; .*above 0 for "equal"'):
        decide(claim("equal", 0.0))
    with pytest.raises(ValueError, match=r'claim "c": margin = -1'):
        decide(claim("lower", 0.0, -1))
    with pytest.raises(ValueError, match=r'claim "c": baseline has 5 values and arm has 1'):
        decide(replace(claim("lower", 0.0), arm=[1.0]))
    with pytest.raises(ValueError, match=r'claim "c": arm = .*not finite'):
        decide(claim("lower", math.nan))
    with pytest.raises(ValueError, match=r"confidence = 0\.4"):
        decide(claim("lower", 0.0), confidence=0.4)


# ---- calibration ----


def outcomes(expected: str, effect: float, margin: float, seed: int) -> list[str]:
    return [decide(ClaimData("c", expected, *pair, margin)).outcome for pair in experiments(seed, effect=effect)]


@calibration
@pytest.mark.parametrize(
    ("expected", "effect", "margin", "reproduced", "contradicted"),
    [
        ("lower", 0.0, 0.0, 0.025, 0.025),
        ("lower", -0.5, 0.5, 0.025, None),
        ("higher", 0.0, 0.5, None, 0.025),
        ("higher", detectable_effect(1.0, 5), 0.0, 0.8, None),
        ("equal", 10.0, 10.0, 0.05, 0.025),
        ("not_higher", 0.5, 0.5, 0.05, 0.05),
        ("not_lower", -0.5, 0.5, 0.05, 0.05),
    ],
)
def test_rates_of_outcomes(expected, effect, margin, reproduced, contradicted):
    """At the border of a claim, both outcomes are errors. A two-sided interval errs in 2.5 % on each side."""
    found = outcomes(expected, effect, margin, seed=20)
    for outcome, rate in (("reproduced", reproduced), ("contradicted", contradicted)):
        if rate is not None:
            assert_rate(found.count(outcome), rate)


@calibration
def test_families_of_claims_keep_their_error_rates():
    """Four arms with one baseline, of which one has an effect: a wrong outcome of any other is rarer than 5 %."""
    rng = np.random.default_rng(21)
    wrong = {"reproduced": 0, "contradicted": 0}
    kinds = (("lower", 0.0), ("higher", 0.0), ("equal", 0.5), ("lower", 0.0))
    for runs in rng.normal(0, 1, (EXPERIMENTS, 5, 5)):
        shifts = (0.0, 0.0, 0.5, -9.0)
        verdicts = decide_all(
            [
                ClaimData("c", kind, runs[0], arm + shift, margin)
                for (kind, margin), arm, shift in zip(kinds, runs[1:], shifts, strict=True)
            ]
        )
        for outcome in wrong:
            wrong[outcome] += any(each.outcome == outcome for each in verdicts[:3])
    for count in wrong.values():
        assert count / EXPERIMENTS <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / EXPERIMENTS)
