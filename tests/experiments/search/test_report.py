"""A report states what the records say, and is made again from them byte for byte."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest

from experiments.search import figures
from experiments.search.importance import PED_ANOVA, importances
from experiments.search.records import Result, Table, export, read
from experiments.search.report import write_report
from experiments.search.space import SearchError
from tests.experiments.search.closed_form import BEST_DECAY, BEST_RATE, search

NUMBER = 40


def results(number: int = NUMBER) -> list[Result]:
    """Return trials whose loss depends on the rate, a little on the kind, and not on the decay."""
    chance, found = np.random.default_rng(0), []
    for index in range(number):
        rate, decay = float(10 ** chance.uniform(-4, -1)), float(chance.uniform(0, 0.3))
        kind = ("swiglu", "relu", "silu")[index % 3]
        value = 2 + math.log10(rate / BEST_RATE) ** 2 + 0.05 * (kind == "relu")
        state = "diverged" if rate > 0.09 else "pruned" if index > 10 and value > 2.8 else "complete"
        curve = {step: value + 400 / step for step in ((100,) if state == "pruned" else (100, 200, 300, 500))}
        figures = {"bits_per_byte": value, "parameters": 1e3} if state == "complete" else {}
        values = {"optimizer.learning_rate": rate, "optimizer.weight_decay": decay, "model.mlp.kind": kind}
        found.append(
            Result(index, state, values, curve[max(curve)], curve, figures, 2.0, "a formula", "", "2026-01-01")
        )
    return [*found, Result(number, "failed", {}, None, {}, {}, error='ValueError: a, "b"\nand c')]


@pytest.fixture
def folder(tmp_path) -> Path:
    export(search(pruner="median"), results(), tmp_path)
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_records_survive_the_file(folder):
    table = read(folder)
    assert table.search == search(pruner="median")
    exact = [(r.index, r.state, r.values, r.value, r.curve, r.error) for r in table.results]
    assert exact == [(r.index, r.state, r.values, r.value, r.curve, r.error) for r in results()]
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == NUMBER + 1 and float(rows[3]["bits_per_byte"]) == results()[3].value


def test_a_report_is_made_again_from_its_records_byte_for_byte(folder):
    page = write_report(folder)
    before = contents(folder)
    assert {name for name in before if name.endswith(".png")} == {
        f"{name}.png" for name in ("history", "slices", "parallel", "importance", "curves")
    }
    for name in before:
        if name not in ("trials.csv", "search.json"):
            (folder / name).unlink()
    write_report(folder)
    assert contents(folder) == before
    export(read(folder).search, read(folder).results, folder)
    write_report(folder)
    assert contents(folder) == before
    assert all(4_000 < len(before[name]) < 200_000 for name in before if name.endswith(".png"))
    text, best = page.read_text(), read(folder).best()
    assert best is not None and f"Trial {best.index} has the lowest bits per byte, {best.value:.4f}" in text
    assert f"--set optimizer.learning_rate={best.values['optimizer.learning_rate']!r}" in text
    counts = {state: sum(r.state == state for r in results()) for state in ("complete", "pruned", "diverged")}
    assert (
        f"41 trials: {counts['complete']} finished, {counts['pruned']} pruned, {counts['diverged']} diverged, 1 failed"
        in text
    )
    assert "## Failed trials" in text and "ValueError: a" in text


def test_importance_names_the_field_that_matters(folder):
    found, method = importances(read(folder))
    assert sum(found.values()) == pytest.approx(1) and method
    assert max(found, key=found.__getitem__) == "optimizer.learning_rate" and found["optimizer.learning_rate"] > 0.6
    few = Table(search(), tuple(results()[:8]))
    assert importances(few) == ({}, "")
    assert "25 %" in PED_ANOVA and BEST_DECAY  # the decay has no effect in these records


def test_the_axis_of_the_metric_is_not_stretched_by_a_hopeless_trial():
    table = Table(search(), tuple(results()))
    hopeless = Result(99, "complete", results()[0].values, 50.0, {}, {})
    most = figures.ceiling(Table(search(), (*table.results, hopeless)))
    best = table.best()
    assert best is not None and best.score < figures.ceiling(table) and most < 4
    figure = figures.history_figure(Table(search(), (*table.results, hopeless)))
    assert figure is not None and figure.axes[0].get_ylim()[1] == pytest.approx(most)


def test_a_search_of_one_field_or_of_one_trial_has_a_report(tmp_path):
    one = [Result(0, "complete", {"model.num_layers": 2}, 2.0, {500: 2.0}, {}, 1.0, "x", "", "2026-01-01")]
    export(search("model.num_layers=int:1:3"), one, tmp_path)
    text = write_report(tmp_path).read_text()
    assert "lowest bits per byte, 2.0000" in text and "importance.png" not in text and "parallel.png" not in text


def test_a_range_whose_end_is_best_is_named(tmp_path):
    at_end = [Result(i, "complete", {"model.num_layers": n}, 3.0 - n / 10, {}, {}) for i, n in enumerate((1, 2, 3))]
    export(search("model.num_layers=int:1:3"), at_end, tmp_path)
    assert "at the end of the range" in write_report(tmp_path).read_text()


def test_records_that_cannot_be_read_or_written_are_refused(folder, tmp_path):
    with pytest.raises(SearchError, match="run the search"):
        read(tmp_path / "missing")
    lines = (folder / "trials.csv").read_text().splitlines(keepends=True)
    (folder / "trials.csv").write_text("".join([lines[0], lines[1].replace("0,", "zero,", 1)]))
    with pytest.raises(SearchError, match="line 2: not a record of a trial"):
        read(folder)
    (folder / "trials.csv").write_text("".join([lines[0], lines[-2], lines[-1]]))
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchError, match=r"--to .* cannot be written"):
        export(search(), results(), tmp_path / "file")
    export(search(), [r for r in results() if r.state != "complete"], folder)
    with pytest.raises(SearchError, match="no trial has finished"):
        write_report(folder)
