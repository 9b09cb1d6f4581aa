"""Studies are checked before anything runs, and their trials are identified, ordered and paired."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.studies.bases import dense, scales
from experiments.study.definition import Claim, Scale, Study, StudyError, chain, grid, values, zipped
from experiments.study.launch import load_study, study_names
from experiments.study.trials import Outcome, plan, seeded, trial_id
from tests.experiments.study.small_study import STUDY, with_arms
from train.config_io import ConfigError, replace_fields


def study(**changes: object) -> Study:
    fields = dict(name="s", question="q", source="x", base=dense(), arms={"a": {}, "b": {"model.num_layers": 2}},
                  scales=scales(), claims=())  # fmt: skip
    return Study(**{**fields, **changes})  # type: ignore[arg-type]


def same_data(experiment) -> str:
    return "data"


def test_combinators():
    a, b = values("train.z_loss", 0.0, 1e-4), values("model.num_layers", 2, 3, label="{} layers")
    assert list(b) == ["2 layers", "3 layers"]
    both = grid(z=a, depth=b)
    assert len(both) == 4 and both["0.0001, 3 layers"] == {"train.z_loss": 1e-4, "model.num_layers": 3}
    assert zipped(a, b) == {"0": {"train.z_loss": 0.0, "model.num_layers": 2},
                            "0.0001": {"train.z_loss": 1e-4, "model.num_layers": 3}}  # fmt: skip
    assert chain(a, b) == a | b
    with pytest.raises(StudyError, match=r"two axes change train\.z_loss"):
        grid(a=a, b=a)
    with pytest.raises(StudyError, match="an arm '0'"):
        chain(a, a)
    with pytest.raises(StudyError, match="2 arms beside 1"):
        zipped(a, {"x": {}})


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(arms={"a": {"model.num_layer": 2}}), "arm 'a': unknown field 'model.num_layer'; did you mean"),
        (dict(arms={"a": {"model.num_layers": "2"}}), "model.num_layers = '2': expected"),
        (dict(arms={"a": {}, "b": {"train.log_every": 3}}), "arms 'a' and 'b' are equal"),
        (dict(arms={"a": {}, "b": {"data.batch_size": 4}}), "arm 'b' changes the data"),
        (dict(arms={}), "it has no arms"),
        (dict(claims=(Claim("c", "z", "lower", than="a"),)), "claim 'c' names arm 'z'; the arms are a, b"),
        (dict(claims=(Claim("c", "b", "equal", than="a"),)), "needs a margin above 0"),
        (dict(scales={"gpu": Scale(1000, 2)}), "no budget for it; its scales are gpu"),
        (dict(scales={"cpu": Scale(0, 2)}), "tokens = 0; at least 1"),
        (dict(scales={"cpu": Scale(1000, 1)}, claims=(Claim("c", "b", "lower", than="a"),)), "needs at least 2"),
        (dict(tune={"optimizer.learning_rate": (1.0, 1.0)}), "two or more different factors"),
        (dict(tune={"optimizer.name": (1.0, 2.0)}), "tune a number"),
        (dict(scales={"cpu": Scale(1000, 2, {"model.x": 1})}), "scale 'cpu': unknown field 'model.x'"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(changes, message):
    with pytest.raises(StudyError, match=message.replace("(", r"\(")):
        study(**changes).experiments("cpu")


def test_every_study_of_the_project_is_valid_at_every_scale():
    for name in study_names():
        found = load_study(name)
        for scale in found.scales:
            assert found.experiments(scale)
    with pytest.raises(StudyError, match="did you mean 'glu_variants'"):
        load_study("glu_variant")


def test_trials_are_seed_major_and_paired():
    trials, more = plan(STUDY, "cpu", same_data, [])
    assert not more
    assert [(t.seed, t.arm) for t in trials[:4]] == [(0, "low"), (0, "high"), (0, "same"), (1, "low")]
    for trial in trials:  # data order and weights depend on the seed alone
        assert trial.experiment.data.seed == trial.experiment.train.seed == trial.seed
        assert trial.experiment.data == trials[3 * trial.seed].experiment.data
    assert len({t.id for t in trials}) == len(trials)


def test_identity_ignores_what_does_not_compute_and_sees_the_rest():
    base = dense()
    same = replace_fields(base, {"name": "x", "train.log_every": 7, "data.cache_dir": "elsewhere"})
    assert trial_id(base, "data") == trial_id(same, "data")
    others = [trial_id(base, "other data"), trial_id(seeded(base, 1), "data"),
              trial_id(replace_fields(base, {"optimizer.learning_rate": 1e-3}), "data")]  # fmt: skip
    assert len({trial_id(base, "data"), *others}) == 4


def test_tuning_picks_the_best_value_of_each_arm_with_other_seeds():
    tuned = replace(STUDY, tune={"optimizer.learning_rate": (0.5, 1.0)})
    trials, more = plan(tuned, "cpu", same_data, [])
    assert more and len(trials) == 6 and all(t.stage == "tune" and t.seed >= 1000 for t in trials)

    def outcome(trial):
        loss = abs(trial.experiment.optimizer.learning_rate - 0.06)
        return Outcome(trial.arm, trial.seed, trial.stage, trial.id, {}, {"bits_per_byte": loss}, {}, {}, False, 1.0)

    compared, more = plan(tuned, "cpu", same_data, [outcome(t) for t in trials])
    assert not more and len(compared) == 6 + 12
    rates = {t.arm: t.experiment.optimizer.learning_rate for t in compared if t.stage == "compare"}
    assert rates == {"low": 0.05, "high": 0.1, "same": 0.05}


def test_an_arm_may_set_its_own_number_of_steps():
    found = study(arms={"a": {}, "b": {"train.steps": 77}}).experiments("cpu")
    assert found["a"].train.steps == 500 and found["b"].train.steps == 77


def test_replace_fields_refuses_what_the_annotation_does_not_allow():
    with pytest.raises(ConfigError, match=r"optimizer.name = 'sgd'"):
        replace_fields(dense(), {"optimizer.name": "sgd"})
    assert replace_fields(dense(), {"model.moe.top_k": 1}).model.moe.top_k == 1
    assert with_arms(third={"model.num_layers": 1}).experiments("cpu")["third"].model.num_layers == 1
