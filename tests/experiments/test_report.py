"""A report shows the files of a run, whichever of them are missing, and none of their text as markup."""

import json
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.lifetime import read_lifetime
from experiments.plot_style import smooth, thin
from experiments.report import write_report
from experiments.report_account import run_link
from experiments.routing import study
from tests.experiments.synthetic_run import make_run
from train.records import MetricsWriter, RunFolder, RunFolderError, write_environment, write_samples

VOID = {"meta", "img", "source"}


class Checker(HTMLParser):
    """Collects text and tags, and fails on a tag that is not closed in order or anything fetched from elsewhere."""

    def __init__(self, page: str):
        super().__init__()
        self.stack, self.tags, self.links, self.text = [], [], [], ""
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset"):
                assert value.startswith("data:image/png;base64,")
            if name == "href":  # of a run beside this one: a relative path, in characters that name no scheme
                assert re.fullmatch(r"[A-Za-z0-9._~/%-]+", value) and not value.startswith("/")
                self.links.append(value)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def checked(run, **options) -> Checker:
    page = write_report(run.path, **options).read_bytes().decode()
    assert "://" not in page and "@import" not in page and "url(" not in page
    return Checker(page)


def test_the_report_of_a_whole_run_has_every_part(tmp_path):
    run = make_run(tmp_path, steps=120)
    began = time.process_time()
    page = checked(run)
    assert time.process_time() - began < 15  # seconds; about 2 on an idle core
    assert "Note:" not in page.text
    for word in (
        "quickstart",
        "Does a small mixture",
        "on held-out stdlib (1.79MB): better than gzip -9, xz -9e and bz2 -9.",
        "5.2M",
        "parameters active",
        "half causal",
        "Completions",
        "resumed",
        "not finite at 40",
        "2 x TPU v5p",
        "with uncommitted changes",
        "model.num_layers",
        "Goodput",
        "47.0 MB",
        "What differs from the defaults",
    ):
        assert word in page.text, word
    assert page.tags.count("img") == page.tags.count("source") == 11
    assert {p.name for p in run.plots.iterdir()} == {
        f"{n}.png"
        for n in (
            "bits_per_byte",
            "loss",
            "learning_rate",
            "gradient_norm",
            "tokens_per_second",
            "router_losses",
            "router_certainty",
            "dropped",
            "saturation",
            "expert_load",
            "co_activation",
        )
    }
    raw = run.report.read_text()
    assert re.search(r'class="set"><td>model.num_layers<', raw) and not re.search(r'class="set"><td>name<', raw)


# ---- records of the trainer ----


def test_steps_that_a_crash_lost_are_not_goodput(tmp_path):
    """The synthetic run crashed at step 110 of 120 and resumed at step 100: 10 of its 110 steps were lost."""
    run = make_run(tmp_path, steps=120)
    text = checked(run, themes=()).text
    assert "over 2 starts" in text and "repeated steps2s" in text.replace("\n", "")
    life = read_lifetime(run.metrics)
    assert life.seconds["repeated"] == pytest.approx(0.17 * 10) and life.seconds["steps"] == pytest.approx(0.17 * 120)


def test_a_run_of_older_code_has_a_report_without_the_newer_records(tmp_path):
    page = checked(make_run(tmp_path, steps=20, goodput=False), themes=())
    assert "Goodput" not in page.text and "Memory" not in page.text and "Note:" not in page.text
    assert "Summary" in page.text and page.links == []


def test_a_report_links_to_the_run_that_its_weights_came_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("dense: 1", "new"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    parent = make_run(tmp_path / "runs" / "dense: 1", steps=4)
    new = make_run(tmp_path / "runs" / "new", steps=4)
    with MetricsWriter(new) as writer:
        origin = {"run": "runs/dense: 1", "step": 4}
        writer.write({"kind": "event", "step": 0, "event": "started", "upcycled_from": origin})
        writer.write({"kind": "event", "step": 0, "event": "started", "imported_from": "model.gguf"})
    page = checked(new, themes=())
    assert "Upcycled from the run runs/dense: 1 at step 4." in page.text and "Imported from model.gguf." in page.text
    assert page.links == ["../dense%3A%201"]
    write_report(parent.path, themes=())
    assert checked(new, themes=()).links == ["../dense%3A%201/report.html"]
    assert run_link("runs/absent", new.path) is None and run_link("gs://bucket/dense", new.path) is None
    assert run_link("x" * 9999, new.path) is None and run_link("a\0b", new.path) is None


def test_the_fields_that_differ_are_those_of_the_config_and_of_no_other(tmp_path):
    """Also of a config that this code cannot read."""
    run = make_run(tmp_path, steps=0, finished=False)
    for more in ({}, {"removed_field": 7}):
        run.config.write_text(json.dumps({**json.loads(run.config.read_text()), **more}))
        checked(run, themes=())
        table = re.search(r"<h2>What differs.*?</table>", run.report.read_text(), re.DOTALL)[0]
        fields = re.findall(r"<tr><td>([^<]*)</td>", table)
        assert "train.steps" in fields and "name" not in fields and "model.num_layers" not in fields  # 4, as by default
        assert ("removed_field" in fields) == bool(more)


def test_what_routers_chose_is_studied_against_the_last_step(tmp_path):
    """Saturation and co-activation by hand, of two layers, three tokens, and a token without a second choice (index
    4)."""
    run = RunFolder(tmp_path)
    run.routing.mkdir()
    last = [[[0, 1], [0, 2], [3, 4]], [[0, 1], [0, 1], [0, 1]]]
    early = [[[1, 0], [2, 3], [3, 4]], [[2, 3], [0, 3], [1, 0]]]
    for step, choices in ((20, last), (10, early)):
        np.savez(run.routing / f"{step:08d}.npz", choices=np.array(choices, np.int16))
    found = study(run, 4)
    assert found.steps.tolist() == [10, 20] and found.choices_a_token == 2 and found.chance == pytest.approx(11 / 6 / 4)
    np.testing.assert_allclose(found.saturation_SL, [[4 / 5, 3 / 6], [1, 1]], rtol=1e-6)
    np.testing.assert_allclose(found.co_activation_LEE[0, 0], [np.nan, 0.5, 0.5, 0])
    np.testing.assert_allclose(found.co_activation_LEE[1, 1], [1, np.nan, 0, 0])


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_run_without_experts_evaluations_or_end(tmp_path, steps):
    run = make_run(tmp_path, steps=steps, experts=0, evaluations=False, finished=False)
    page = checked(run)
    assert "No held-out figure yet" in page.text
    assert page.tags.count("img") == (4 if steps else 0)


def test_the_report_of_an_unfinished_run_shows_its_last_evaluation(tmp_path):
    run = make_run(tmp_path, steps=60, experts=0, finished=False)
    assert re.search(r"Not finished. Held-out bits per byte so far: stdlib \d\.\d+ at step 56", checked(run).text)


def test_only_a_config_is_enough_and_without_one_it_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert tmp_path.name in checked(RunFolder(tmp_path)).text
    with pytest.raises(RunFolderError, match=r"no config\.json"):
        write_report(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("ours", "words"), [(1.65, "better than gzip -9, not as good as xz -9e"), (2.0, "not as good")]
)
def test_the_verdict_names_the_compressors_that_are_better(tmp_path, ours, words):
    (tmp_path / "config.json").write_text("{}")
    with MetricsWriter(RunFolder(tmp_path)) as writer:
        compressors = {"gzip -9": 1.71, "xz -9e": 1.62}
        final = {"s": {"bits_per_byte": ours, "bytes": 10, "compressors": compressors}, "t": {"bits_per_byte": None}}
        writer.write({"kind": "final", "step": 1, "sets": final})
    page = checked(RunFolder(tmp_path))
    assert words in page.text and "t: the held-out loss is not finite" in page.text


nasty = st.text(max_size=30) | st.sampled_from(
    ["<script>alert(1)</script>", "</pre>&amp;", "\"'><img src=x>", "\r\n\t"]
)


@settings(max_examples=20)
@given(nasty, nasty, nasty)
def test_nothing_a_run_says_becomes_markup(tmp_path_factory, a, b, c):
    run = make_run(tmp_path_factory.mktemp("run"), steps=0, name=a, question=b, finished=False)
    write_samples(run, [{"prompt": a, "completion": b, "reference": c, "file": c}])
    with MetricsWriter(run) as writer:
        writer.write({"kind": "event", "step": c, "event": a, "message": b})
        writer.write({"kind": "eval", "step": 1, "set": a, "bits_per_byte": 1.0, "loss": None})
        origin = {"run": a, "step": c}
        writer.write({"kind": "event", "step": 0, "event": "started", "upcycled_from": origin, "study": {"name": b}})
    write_environment(run, {"devices": {a: b}, "command": [c, 1], "start_time": a, "git_commit": b})
    page = checked(run, themes=())
    assert "script" not in page.tags and "img" not in page.tags
    assert page.text.count(a) >= 4 and b in page.text and c in page.text and "Note:" not in page.text


@given(st.lists(st.floats(-100, 100) | st.just(float("nan")), max_size=50), st.floats(1, 20))
def test_the_moving_average_stays_between_the_smallest_and_the_largest_value(values, span):
    values = np.array(values, np.float64)
    averaged = smooth(values, span)
    for i in range(len(values)):
        seen = values[: i + 1][np.isfinite(values[: i + 1])]
        if not len(seen):
            assert np.isnan(averaged[i])
        else:
            assert seen.min() - 1e-9 <= averaged[i] <= seen.max() + 1e-9


@given(st.integers(0, 500), st.integers(1, 100))
def test_thinning_keeps_the_mean_of_equal_groups_and_the_order(length, points):
    steps = np.arange(length, dtype=np.float64)
    thinned, values = thin(steps, steps * 2, points)
    assert len(thinned) == min(length, points)
    assert np.all(np.diff(thinned) > 0) and np.allclose(values, 2 * thinned)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run whose files are garbled in copies; few steps, so that a report takes milliseconds."""
    return make_run(tmp_path_factory.mktemp("small"), steps=4, layers=2, experts=4)


DAMAGED = ("config.json", "environment.json", "overrides.json", "samples.jsonl", "routing/00000002.npz")


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", ["cut", "empty", "not text", "another type", "nested", "a folder"])
def test_a_damaged_file_costs_its_part_of_the_page_and_is_named(small_run, tmp_path, name, damage):
    run = RunFolder(Path(shutil.copytree(small_run.path, tmp_path / "run")))
    path = run.path / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    else:
        path.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "empty": b"",
                "not text": b"\xff\xfe\x00" + content,
                "another type": b"12\n",
                "nested": b"[" * 200_000 + b"]" * 200_000,
            }[damage]
        )
    lines: list[str] = []
    page = checked(run, themes=("light",) if "npz" in name else (), log=lines.append)
    if (name, damage) != ("samples.jsonl", "empty"):  # which is a run without completions
        assert any(path.name in line for line in lines) and path.name in page.text
    assert "quickstart" in page.text or name == "config.json"
    assert "Events" not in page.text and "Summary" in page.text


WRONG = (
    b"null",
    b"1e999",
    b'"<b>"',
    b"[]",
    b"{}",
    b"-1",
    b"\n",
    b'{"kind": "eval", "step": 1}\n',
    b'"\\ud800"',
    b"9" * 30,
)


def garbled(draw, content: bytes) -> bytes:
    """`content` with junk in up to three places, and perhaps cut."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 40))] = draw(st.binary(max_size=6) | st.sampled_from(WRONG))
    return bytes(content[: draw(st.integers(0, len(content)) | st.just(len(content)))])


def survives(small_run, folder, name: str, data, themes) -> None:
    run = RunFolder(Path(shutil.copytree(small_run.path, folder / "run")))
    path = run.path / name
    path.write_bytes(garbled(data.draw, path.read_bytes()))
    try:
        checked(run, themes=themes)
    except RunFolderError as error:
        assert name == "metrics.jsonl" and "\n" not in str(error)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((*DAMAGED[:4], "metrics.jsonl")), st.data())
def test_no_bytes_in_any_file_end_the_report_with_another_error(small_run, tmp_path_factory, name, data):
    survives(small_run, tmp_path_factory.mktemp("fuzz"), name, data, ())


@settings(max_examples=8, deadline=None)
@given(st.sampled_from(("config.json", "metrics.jsonl", "routing/00000002.npz")), st.data())
def test_no_bytes_in_any_file_end_the_figures_with_another_error(small_run, tmp_path_factory, name, data):
    survives(small_run, tmp_path_factory.mktemp("fuzz"), name, data, ("light",))


@pytest.mark.parametrize(
    "row",
    [
        {"kind": "eval", "step": 3},
        {"kind": "train", "step": "<i>"},
        {"kind": "train", "step": 5, "loss": "much", "grad_norm": [1], "expert_load": [[1], [1, 2]]},
        {"kind": "final", "step": 5, "sets": {"s": {"bits_per_byte": "low"}}},
        {"kind": "final", "step": 5, "sets": [1]},
        {"kind": "final", "step": 5, "wall_seconds": "long"},
        {"kind": "event", "step": {"a": "<script>"}, "event": ["<script>"], "time": {}},
        {"kind": ["<b>"], "step": 1},
        {"kind": "goodput", "step": 5},
        {"kind": "goodput", "step": 5, "start": {"time": "<i>", "step": 0}, "seconds": {"steps": 1.0}},
        {"kind": "goodput", "step": 5, "start": {"time": 1, "step": 0}, "seconds": {"steps": 1.0}, "memory": ["<i>"]},
    ],
)
def test_rows_of_other_types_cost_what_they_would_have_shown(small_run, tmp_path, row):
    run = RunFolder(Path(shutil.copytree(small_run.path, tmp_path / "run")))
    with open(run.metrics, "a") as file:
        file.write(json.dumps(row) + "\n")
    try:
        page = checked(run, themes=("light",))
    except RunFolderError as error:
        assert "metrics.jsonl" in str(error)
        return
    assert "script" not in page.tags and "i" not in page.tags
    assert "Note:" in page.text or row["kind"] in ("event", "final")


@pytest.mark.parametrize("number", [0, -1, 10**9, "8", None, [8], True])
def test_an_impossible_number_of_experts_is_noted(small_run, tmp_path, number):
    run = RunFolder(Path(shutil.copytree(small_run.path, tmp_path / "run")))
    run.config.write_text(json.dumps({"model": {"moe": {"num_experts": number}}}))
    page = checked(run, themes=("light",))
    assert "Note: routing/ left out" in page.text


def test_a_report_that_cannot_be_written_is_a_clear_error(small_run, tmp_path):
    run = RunFolder(Path(shutil.copytree(small_run.path, tmp_path / "run")))
    run.report.mkdir()
    with pytest.raises(RunFolderError, match=r"report\.html cannot be written .*fix the permissions"):
        write_report(run.path, themes=())
    assert not list(run.path.glob("*.tmp"))
    run.report.rmdir()
    run.plots.write_text("a file where a folder should be")
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_report(run.path, themes=("light",))
