"""Overrides, JSON and differences of configs, as properties of a config with every kind of field."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.fake_bucket import use_fake_bucket
from train.config_io import (
    ABSENT,
    ConfigError,
    apply_overrides,
    config_hash,
    diff,
    flatten,
    from_dict,
    load_json,
    save_json,
    to_dict,
)


@dataclass(frozen=True)
class Moe:
    num_experts: int = 8
    top_k: int = 2
    router: Literal["softmax", "sigmoid"] = "softmax"


@dataclass(frozen=True)
class Needy:
    count: int


@dataclass(frozen=True)
class Source:
    path: str = "stdlib"
    include: tuple[str, ...] = ("**/*.py",)
    weight: float = 1.0


@dataclass(frozen=True)
class Model:
    num_layers: int = 2
    tied: bool = True
    softcap: float | None = None
    window: int | None = 64
    pattern: tuple[int, ...] = (1, 0)
    scales: tuple[float, ...] = ()
    mode: Literal["a", "b"] | None = "a"
    moe: Moe | None = None
    needy: Needy | None = None


@dataclass(frozen=True)
class Root:
    name: str = "run"
    rate: float = 3e-4
    model: Model = field(default_factory=Model)
    sources: tuple[Source, ...] = (Source(),)
    axes: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Twice:
    train: Source = Source()
    evaluation: Source | None = None


numbers = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(st.characters(codec="utf-8", exclude_characters=","), max_size=12)
moes = st.builds(Moe, st.integers(), st.integers(), st.sampled_from(["softmax", "sigmoid"]))
sources = st.builds(Source, names, st.lists(names, max_size=3).map(tuple), numbers)
models = st.builds(
    Model,
    st.integers(),
    st.booleans(),
    st.none() | numbers,
    st.none() | st.integers(),
    st.lists(st.integers(), max_size=3).map(tuple),
    st.lists(numbers, max_size=3).map(tuple),
    st.sampled_from(["a", "b", None]),
    st.none() | moes,
    st.none() | st.builds(Needy, st.integers()),
)
axes = st.none() | names | st.lists(names, max_size=3).map(tuple)
roots = st.builds(Root, names, numbers, models, st.lists(sources, max_size=3).map(tuple), axes)


def written(value) -> str:
    """Return a leaf as a user would write it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "()" if not value else ",".join(map(written, value)) + ("," if len(value) == 1 else "")
    return "none" if value is None else repr(value) if isinstance(value, float) else str(value)


@given(roots)
def test_json_round_trip_is_exact(config):
    back = from_dict(Root, json.loads(json.dumps(to_dict(config), allow_nan=False)))
    assert back == config
    assert math.copysign(1, back.rate) == math.copysign(1, config.rate)
    assert config_hash(back) == config_hash(config)
    assert diff(back, config) == []


@given(roots, roots)
def test_hash_and_diff_agree_with_equality(a, b):
    assert (diff(a, b) == []) == (a == b)
    if a != b:
        assert to_dict(a) == to_dict(b) or config_hash(a) != config_hash(b)


@given(roots, roots)
def test_the_leaves_of_a_config_as_overrides_reproduce_it(start, goal):
    assume(goal.model.needy is None or start.model.needy is not None)
    leaves = {k: v for k, v in flatten(goal).items() if not (isinstance(v, str) and (v != v.strip() or v == "none"))}
    for text in [s for v in leaves.values() if isinstance(v, tuple) for s in v if isinstance(s, str)]:
        assume(text and text == text.strip() and not text.startswith("(") and not text.endswith(")"))
    assume(not (isinstance(goal.axes, str) and goal.axes == "()"))
    # Sources are emptied first, and then added one by one, each with at least one field set.
    overrides = ["sources=()", *(f"{k}={written(v)}" for k, v in leaves.items() if v != () or "include" in k)]
    changed = apply_overrides(start, [*overrides, *(f"{k}=()" for k, v in leaves.items() if v == ())])
    skipped = flatten(goal).keys() - leaves.keys()
    assert {row[0] for row in diff(changed, goal)} <= skipped


def test_overrides_by_example():
    config = apply_overrides(
        Root(),
        [
            "model.moe.top_k=4",
            "rate=1",
            "model.tied=false",
            "model.pattern=3,4,5",
            "sources.0.path=docs",
            "axes=data,fsdp",
            "sources.1.weight=2",
            "model.softcap=1e1",
            "model.window=none",
            "model.mode=b",
            "name=none",
            "name=a=b",
        ],
    )
    assert config.model.moe == Moe(top_k=4)
    assert config.rate == 1.0 and isinstance(config.rate, float)
    assert config.model == dataclasses.replace(
        Model(), moe=Moe(top_k=4), tied=False, pattern=(3, 4, 5), softcap=10.0, window=None, mode="b"
    )
    assert config.sources == (Source(path="docs"), Source(weight=2.0))
    assert config.axes == ("data", "fsdp") and config.name == "a=b"
    assert apply_overrides(config, ["model.moe=none", "axes=none", "sources=()"]).sources == ()
    assert apply_overrides(config, ["model.moe=none"]).model.moe is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.num_layer=4", ["'model.num_layer'", "did you mean 'model.num_layers'?"]),
        ("top_k=4", ["did you mean 'model.moe.top_k'?"]),
        ("modle.moe.top_k=4", ["did you mean 'model.moe.top_k'?"]),
        ("sources.0.pth=x", ["did you mean 'sources.0.path'?"]),
        ("zzzzqqqq=1", ["the fields here are name, rate, model"]),
        ("sources.7.path=x", ["'sources.7'", "1 items"]),
        ("sources.-1.path=x", ["'sources.-1'"]),
        ("model.num_layers=1e3", ["model.num_layers = 1e3", "int like 4"]),
        ("model.num_layers=none", ["model.num_layers = none", "int like 4"]),
        ("model.num_layers=\u0664", ["model.num_layers = \u0664", "int like 4"]),
        ("model.num_layers=\uff14", ["int like 4"]),
        (f"model.num_layers={'9' * 9999}", ["model.num_layers = 999", "(9999 characters)", "int like 4"]),
        ("model.pattern=1,\u0664", ["comma-separated list"]),
        ("rate=\u0664.5", ["float like"]),
        ("rate=1e999", ["float like"]),
        ("name=\udcff", ["name = \udcff", "str like text"]),
        ("model.tied=yes", ["model.tied = yes", "bool like true"]),
        ("rate=nan", ["rate = nan", "float like"]),
        ("rate=inf", ["rate = inf", "float like"]),
        ("model.mode=c", ["model.mode = c", "one of a, b", "none"]),
        ("model.pattern=1,x", ["model.pattern = 1,x", "comma-separated list, () when empty, of int like 4"]),
        ("model.pattern=1,,2", ["model.pattern = 1,,2"]),
        ("model=big", ["model = big", "num_layers", "model.num_layers=…"]),
        ("sources=docs", ["sources = docs", "sources.0.path=…"]),
        ("model.needy.count=3", ["NeedsDefault"]),
        ("model.num_layers.x=3", ["'model.num_layers.x'", "set model.num_layers=…"]),
        ("model.num_layers", ["name=value"]),
        ("=3", ["name=value"]),
    ],
)
def test_wrong_overrides_name_field_value_and_fix(override, words):
    if words == ["NeedsDefault"]:
        words = ["model.needy is not set", "no default for count"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides(Root(), [override])
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_letter_is_answered_with_the_right_name():
    for name in flatten(Root(model=Model(moe=Moe(), needy=Needy(1)))):
        for position, letter in enumerate(name):
            wrong = name[:position] + name[position + 1 :]
            if letter in ".0" or wrong == "model.moe":
                continue
            with pytest.raises(ConfigError, match=f"did you mean '{re.escape(name)}'"):
                apply_overrides(Root(), [f"{wrong}=1"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nam": "x"}, ["unknown field 'nam'", "did you mean 'name'"]),
        ({"model": {"moe": {"topk": 1}}}, ["'model.moe.topk'", "'model.moe.top_k'"]),
        ({"rate": "fast"}, ["rate = 'fast'", "float"]),
        ({"model": {"num_layers": 2.0}}, ["model.num_layers = 2.0", "int"]),
        ({"model": {"num_layers": True}}, ["model.num_layers = True"]),
        ({"model": {"tied": 1}}, ["model.tied = 1"]),
        ({"model": {"needy": {}}}, ["model.needy.count is missing"]),
        ({"model": 3}, ["model = 3", "Model"]),
        ({"sources": [4]}, ["sources.0 = 4", "Source"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(change))
    with pytest.raises(ConfigError) as caught:
        load_json(Root, path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 100_000, ["nested too deep"]),
        ('{"model": ' * 1000 + "1" + "}" * 1000, []),
        ('{"name": ' + "[" * 900 + "]" * 900 + "}", ["name = [[["]),
        ('{"model": {"num_layers": ' + "9" * 5000 + "}}", ["not a config in JSON"]),
        ('{"rate": 1' + "0" * 400 + "}", ["rate = 1000", "float"]),
        ('{"rate": 1e999}', ["rate = inf", "float"]),
        ('{"rate": NaN}', ["rate = nan", "float"]),
        ("[]", ["the config = []", "name, rate, model"]),
        ("3", ["the config = 3"]),
        ('{"name": "\\ud800"}', ["name = ", "str like text"]),
        ('{"name": ' + str(list(range(999))) + "}", ["characters)"]),
        ("\xff", []),
    ],
)
def test_an_invalid_file_is_named_in_one_paragraph(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_json(Root, path)
    for word in [str(path), *words]:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_config_can_be_saved_to_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_fake_bucket()
    save_json(Root(rate=0.5), "gs://bucket/test_config_io/config.json")
    assert load_json(Root, "gs://bucket/test_config_io/config.json") == Root(rate=0.5)
    assert list(tmp_path.iterdir()) == []


def test_files_round_trip_and_missing_keys_take_defaults(tmp_path):
    path = tmp_path / "config.json"
    config = Root(name="ünïcode \u2028", rate=0.1 + 0.2, model=Model(moe=Moe(top_k=3)))
    save_json(config, path)
    assert load_json(Root, path) == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    path.write_text('{"rate": 1}')
    assert load_json(Root, path) == Root(rate=1.0)
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"config\.json: not a config in JSON"):
        load_json(Root, path)


def test_values_outside_their_annotation_are_not_written():
    for wrong in (Root(rate=math.nan), Root(name=3), Root(model=Model(num_layers=2.5))):
        with pytest.raises(ConfigError):
            to_dict(wrong)


def test_an_int_given_for_a_float_hashes_as_the_float():
    assert config_hash(Root(rate=1)) == config_hash(Root(rate=1.0))
    assert config_hash(Root(model=Model(softcap=2))) == config_hash(Root(model=Model(softcap=2.0)))


def test_diff_and_flatten_by_example():
    assert diff(Root(), apply_overrides(Root(), ["model.num_layers=3"])) == [("model.num_layers", 2, 3)]
    assert diff(Root(), Root(model=Model(moe=Moe()))) == [("model.moe", None, Moe())]
    assert diff(Root(), Root(sources=(Source(), Source("x")))) == [("sources.1", ABSENT, Source("x"))]
    assert flatten(Root())["sources.0.include"] == ("**/*.py",)
    assert flatten(to_dict(Root())).keys() == flatten(Root()).keys()


def test_import_is_light():
    program = "import sys, train.config_io; print({'jax', 'numpy', 'rich'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=os.getcwd(), check=True
    )
    assert result.stdout.strip() == "set()"
