"""What `--space` means, and which spaces are refused before anything runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from experiments.search.definition import Search
from experiments.search.space import SearchError, check_space, configured, read_space
from experiments.studies.bases import dense
from tests.experiments.search.closed_form import search
from train.config_io import flatten

RATE = "optimizer.learning_rate"


def test_a_space_is_read_from_flags_and_from_a_file(tmp_path):
    texts = [f"{RATE}=log:1e-4:1e-1", "optimizer.weight_decay=uniform:0:0.3", "model.num_layers=int:2:7:2",
             "model.mlp.kind=swiglu,relu", "optimizer.betas=(0.9,0.95),(0.9,0.99)"]  # fmt: skip
    space = read_space(texts)
    assert [dimension.distribution() for dimension in space] == [
        FloatDistribution(1e-4, 1e-1, log=True), FloatDistribution(0, 0.3), IntDistribution(2, 6, step=2),
        CategoricalDistribution(("swiglu", "relu")), CategoricalDistribution(("(0.9,0.95)", "(0.9,0.99)")),
    ]  # fmt: skip
    assert read_space([str(dimension) for dimension in space]) == space
    file = tmp_path / "space.json"
    file.write_text(json.dumps(dict(text.split("=", 1) for text in texts)))
    assert read_space([str(file)]) == space
    values = {RATE: 1 / 3, "model.num_layers": 4, "optimizer.betas": "(0.9,0.99)", "model.mlp.kind": "relu"}
    found = flatten(configured(dense(), space, values))
    assert found[RATE] == 1 / 3 and found["model.num_layers"] == 4 and found["optimizer.betas"] == (0.9, 0.99)
    assert found["model.mlp.kind"] == "relu" and found["optimizer.weight_decay"] == dense().optimizer.weight_decay


def test_points_of_a_grid_include_both_ends():
    (log,), (even,) = read_space([f"{RATE}=log:1e-4:1e-1:4"]), read_space([f"{RATE}=uniform:1:2:3"])
    assert log.finite() == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1]) and even.finite() == [1, 1.5, 2]
    assert log.finite()[0] == log.low and log.finite()[-1] == log.high


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([], "nothing varies"),
        ([f"{RATE}=log:0:1"], "LOW = 0 has no logarithm; set it above 0, or use uniform"),
        ([f"{RATE}=log:1:1"], "LOW = 1 is not below HIGH = 1"),
        ([f"{RATE}=uniform:2:1"], "LOW = 2 is not below HIGH = 1"),
        ([f"{RATE}=uniform:a:1"], "'a' is not a number"),
        ([f"{RATE}=uniform:0:inf"], "'inf' is not a number"),
        ([f"{RATE}=uniform:1"], "takes LOW:HIGH"),
        ([f"{RATE}=log:1e-4:1e-1:1"], "1 points; give 2 or more"),
        (["model.num_layers=int:1:2.5"], "'2.5' is not a whole number"),
        (["model.num_layers=int:1:3:5"], "the step 5 leaves fewer than two values"),
        (["model.mlp.kind=swiglu"], "not a list of two or more different values"),
        (["model.mlp.kind=swiglu,swiglu"], "not a list of two or more different values"),
        ([f"{RATE}="], "has no values"),
        (["=1,2"], "has no field"),
        ([f"{RATE}=log:1e-4:1e-1", f"{RATE}=1,2"], "given twice"),
        (["missing.json"], "cannot be read as a file"),
    ],
)
def test_a_space_that_cannot_be_read_is_refused(texts, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SearchError, match=r"^--space") as error:
        read_space(texts)
    assert expected in str(error.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_a_file_that_is_not_a_space_is_refused(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(SearchError, match=r"not JSON|not an object of strings"):
        read_space([str(tmp_path / "x.json")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.learning_rte=log:1e-4:1e-1", "did you mean 'optimizer.learning_rate'"),
        ("model.num_layers=log:1:4", "model.num_layers = 1.0: expected int"),
        ("model.mlp.kind=swiglu,swish", "the config refuses swish: model.mlp.kind = swish"),
        ("optimizer.weight_decay=uniform:-1:0.3", "the config refuses -1.0"),  # one end
        ("optimizer.learning_rate=uniform:0:1", "the config refuses 0.0"),
        ("model.attention.num_heads=int:2:8", "the config refuses 3"),  # between the ends: a multiple of 2 is needed
        ("train.log_every=int:1:5", "does not change what is learned"),
        ("model=a,b", "cannot be set as a whole"),
    ],
)
def test_values_that_the_config_refuses_are_found_before_anything_runs(text, expected):
    with pytest.raises(SearchError) as error:
        check_space(dense(), read_space([text]))
    assert str(error.value).startswith(f"--space {text.partition('=')[0]}=") and expected in str(error.value)


@pytest.mark.parametrize(
    ("space", "changes", "expected"),
    [
        ((f"{RATE}=log:1e-4:1e-1",), {"sampler": "grid"}, "infinitely many values; give a number of points"),
        ((f"{RATE}=log:1e-4:1e-1:5",), {"sampler": "tpe"}, "the points of a grid; leave it out"),
        ((f"{RATE}=log:1e-4:1e-1",), {"sampler": "cmaes"}, "needs two or more fields"),
        ((f"{RATE}=log:1e-4:1e-1", "model.mlp.kind=relu,silu"), {"sampler": "cmaes"}, "use --sampler tpe"),
        ((f"{RATE}=log:1e-4:1e-1:400", "optimizer.weight_decay=uniform:0:1:400"), {"sampler": "grid"}, "160,000"),
        (("train.steps=int:200:300:50",), {"pruner": "median"}, "compares trials at equal steps"),
    ],
)
def test_a_sampler_or_pruner_that_does_not_fit_is_refused(space, changes, expected):
    with pytest.raises(SearchError, match="--") as error:
        search(*space, **changes).validate()
    assert expected in str(error.value)


def test_a_pruner_needs_evaluations_before_the_end():
    made = search(pruner="hyperband")
    made.validate()
    for every in (0, 500):
        base = replace(made.base, train=replace(made.base.train, eval_every=every))
        with pytest.raises(SearchError, match="evaluates nothing before the end"):
            replace(made, base=base).validate()


def test_a_search_survives_json_and_differences_are_named():
    made = search(seed=3, overrides=("train.steps=5",), data="x")
    assert Search.from_json(made.to_json()) == made and not made.differences(made)
    assert made.differences(replace(made, data="")) == []  # not known yet
    other = search(f"{RATE}=log:1e-4:1e-2", sampler="random")
    found = "; ".join(made.differences(other))
    assert "--sampler was tpe and is random" in found and "log:0.0001:0.01" in found and "--seed was 3" in found
    longer = replace(made, base=replace(made.base, train=replace(made.base.train, steps=7, log_every=3)))
    assert made.differences(longer) == ["train.steps was 500 and is 7"]  # log_every does not matter


def test_a_grid_has_every_point_once_in_an_order_of_the_seed():
    space = ("model.num_layers=int:1:3", "model.mlp.kind=swiglu,relu", f"{RATE}=log:1e-3:1e-1:3")
    points = search(*space, sampler="grid").grid()
    assert len({str(sorted(point.items())) for point in points}) == len(points) == 18
    assert points == search(*space, sampler="grid").grid() != search(*space, sampler="grid", seed=1).grid()
    made = search(*space, sampler="grid")
    assert made.trials(None) == 18 and made.trials(4) == 4 and search().trials(None) == 20
    with pytest.raises(SearchError, match="the grid has 18 points"):
        made.trials(19)
    assert math.prod((3, 2, 3)) == made.grid_size()
