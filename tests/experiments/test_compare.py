"""A comparison overlays runs, says which of their figures do not compare, and refuses what it cannot compare."""

import json
import re
from pathlib import Path

import pytest

from experiments.compare import write_comparison
from tests.experiments.command_line import call, refusal
from tests.experiments.synthetic_run import make_run
from tests.experiments.test_report import Checker
from train.records import MetricsWriter, RunFolder, RunFolderError

DATA = {"batch_size": 8, "sequence_length": 64, "tokenizer": {"kind": "trained", "vocab_size": 512}}
BYTES = {**DATA, "tokenizer": {"kind": "byte"}}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_named(name: str, data: dict = DATA, **options) -> RunFolder:
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    return make_run(folder, **{"steps": 12, "layers": 2, "experts": 4, "changes": {"data": data}, **options})


def compared(runs, themes=()) -> Checker:
    path = write_comparison(runs, Path("runs/page.html"), themes=themes)
    content = path.read_text()
    assert "://" not in content and "@import" not in content and "url(" not in content
    return Checker(content)


def test_two_runs_through_the_command_line(capsys):
    a, b = run_named("a"), run_named("b", layers=3)
    code, out, err = call(capsys, "compare", "a", "b")
    assert (code, out, err) == (0, "runs/comparison.html\n", "")
    page = Checker(Path("runs/comparison.html").read_text())
    assert page.tags.count("img") == page.tags.count("source") == 4
    assert page.links == ["a", "b"] and "Comparison of a and b" in page.text and "1.5320" in page.text
    assert "do not compare" not in page.text and "Not finished" not in page.text
    assert a.report.exists() == b.report.exists() == False  # noqa: E712


def test_only_fields_that_differ_are_in_the_table():
    page = compared([run_named("a"), run_named("b", layers=3, question="Another?"), run_named("c")])
    table = page.text.partition("in which the runs differ")[2]
    assert "model.num_layers" in table and "num_experts" not in table and "question" not in table
    again = run_named("d")
    assert "the same config" in compared([RunFolder("runs/a"), again]).text


@pytest.mark.parametrize("learned", [False, True])
def test_losses_per_token_of_different_tokenizers_do_not_compare(learned):
    """Tokenizers differ by config, or by what they learned from different text."""
    a, b = run_named("a"), run_named("b", DATA if learned else BYTES)
    if learned:
        for run, identity in ((a, "1"), (b, "2")):
            run.tokenizer.mkdir()
            (run.tokenizer / "tokenizer.json").write_text(json.dumps({"identity": identity}))
    page = compared([a, b], themes=("light",))
    assert "different tokenizers" in page.text and "losses per token do not compare" in page.text
    assert "train bits/byte" in page.text and "train loss" not in page.text
    if learned:
        (b.tokenizer / "tokenizer.json").write_text(json.dumps({"identity": "1"}))
        assert "train loss" in compared([a, b]).text


def test_held_out_sets_of_other_sizes_and_unfinished_runs_are_named():
    a, b = run_named("a"), run_named("b", finished=False)
    page = compared([a, b])
    assert "Not finished: b." in page.text and "not the same text" not in page.text
    with MetricsWriter(b) as writer:
        writer.write({"kind": "final", "step": 12, "sets": {"stdlib": {"bits_per_byte": 1.1, "bytes": 5}}})
    page = compared([a, b])
    assert "Not finished" not in page.text and "held-out set stdlib is not the same text" in page.text


def test_the_best_figure_is_bold_where_all_runs_are_finished():
    a, b = run_named("a"), run_named("b", finished=False)
    compared([a, b])
    assert "<b>" not in Path("runs/page.html").read_text()
    with MetricsWriter(b) as writer:
        writer.write({"kind": "final", "step": 12, "sets": {"stdlib": {"bits_per_byte": 1.1, "bytes": 1_790_000}}})
    compared([a, b])
    assert re.findall("<b>(.*?)</b>", Path("runs/page.html").read_text()) == ["1.1000"]


def test_text_of_a_run_is_never_markup():
    bad = "<script>alert(1)</script>"
    a, b = run_named("a"), run_named("b", {**DATA, "cache_dir": bad})
    with MetricsWriter(b) as writer:
        writer.write({"kind": "eval", "step": 12, "set": bad, "bits_per_byte": 1.0})
    page = compared([a, b])
    assert "script" not in page.tags and page.text.count(bad) >= 2


def test_a_damaged_row_costs_its_part_and_is_noted():
    a, b = run_named("a"), run_named("b")
    with open(b.metrics, "a") as file:
        file.write(json.dumps({"kind": "train", "step": 13, "loss": "much"}) + "\n")
    page = compared([a, b], themes=("light",))
    assert "Note: the figures left out" in page.text and "Config fields" in page.text


def test_runs_that_cannot_be_compared_are_refused(capsys):
    run_named("a")
    run_named("b", steps=0, finished=False)
    assert "'nowhere'" in refusal(capsys, "compare", "a", "nowhere")
    assert "runs/b has no rows of training or evaluation" in refusal(capsys, "compare", "a", "b")
    assert "is given twice" in refusal(capsys, "compare", "a", "runs/a")
    assert not Path("runs/comparison.html").exists()


def test_a_page_that_cannot_be_written_is_a_clear_error():
    runs = [run_named("a"), run_named("b")]
    Path("folder.html").mkdir()
    with pytest.raises(RunFolderError, match=r"--to folder\.html: cannot be written .*choose another file"):
        write_comparison(runs, Path("folder.html"), themes=())


def test_runs_of_one_name_in_two_places_are_told_apart_by_their_paths(tmp_path):
    run_named("a")
    other = tmp_path / "elsewhere" / "a"
    other.mkdir(parents=True)
    page = compared([RunFolder("runs/a"), make_run(other, steps=12, layers=2, experts=4)])
    assert str(other) in page.text
