"""A real trial resumes exactly; a report states what its records say, from the CSV file alone."""

from __future__ import annotations

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
from etils import epath

from experiments.run import prepare_data
from experiments.study import launch, report
from experiments.study.definition import Published, Study, StudyError
from experiments.study.execute import Programs, program_key, run_trial, trial_folder
from experiments.study.measures import HeldOutUnder
from experiments.study.records import Table, export, read
from experiments.study.report import judge, write_report
from experiments.study.storage import TrialStore
from experiments.study.trials import Outcome, plan
from experiments.study.worker import work
from tests.experiments.study.small_study import STUDY, job
from tests.experiments.study.tiny import tiny_study
from tests.train.small_runs import TINY, StopAt
from train.config_io import replace_fields
from train.signals import StopSignal


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Study:
    study = tiny_study(tmp_path_factory.mktemp("tiny"), seeds=2)
    return replace(study, measures={"longer": HeldOutUnder("longer", {"data.sequence_length": 64}, windows=4)})


def test_a_stopped_trial_continues_with_the_same_figures(tiny, tmp_path):
    trials, _ = plan(tiny, "cpu", lambda experiment: prepare_data(experiment, print).identity, [])
    trial, programs = trials[0], Programs()

    def run(folder: str, stop: StopSignal) -> dict | None:
        path = trial_folder(epath.Path(tmp_path) / folder, "tiny", "cpu", trial)
        with stop:
            return run_trial(tiny, trial, path, programs, log=lambda text: None, stop=stop)

    whole = run("whole", StopSignal())
    assert run("stopped", StopAt(7)) is None
    continued = run("stopped", StopSignal())
    assert continued["figures"] == whole["figures"]
    assert continued["curves"]["bits_per_byte"] == whole["curves"]["bits_per_byte"]
    assert whole["curves"]["step"] == [4, 8, 12] and math.isfinite(whole["figures"]["longer"])
    # The last arm shares the program, and diverges: its figures are those of uniform predictions.
    assert program_key(trial.experiment) == program_key(trials[2].experiment) == program_key(trials[3].experiment)
    with StopSignal() as stop:
        bad = run_trial(tiny, trials[2], epath.Path(tmp_path / "bad"), programs, log=lambda text: None, stop=stop)
    assert bad["diverged"] and bad["figures"]["loss"] == pytest.approx(math.log(TINY.vocab_size))
    assert bad["figures"]["bits_per_byte"] > whole["figures"]["bits_per_byte"]


def test_programs_are_shared_by_what_is_traced_alone(tiny):
    base = tiny.base
    same = [{"train.seed": 3}, {"optimizer.learning_rate": 1.0}, {"data.seed": 4}, {"optimizer.weight_decay": 0.5}]
    other = [{"model.num_layers": 2}, {"train.z_loss": 1e-4}, {"train.steps": 13}, {"data.batch_size": 16}]
    assert {program_key(replace_fields(base, changes)) for changes in same} == {program_key(base)}
    assert len({program_key(replace_fields(base, changes)) for changes in other} | {program_key(base)}) == 5
    keys = {program_key(replace_fields(base, {"train.z_loss": z})) for z in (1e-4, 1e-3)}
    assert len(keys) == 1


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A finished study: its job, store and trials."""
    folder = tmp_path_factory.mktemp("recorded")
    made = job(f"sqlite:///{folder}/trials.db", folder)
    assert work(made, log=lambda text: None)
    store = TrialStore(made.url, made.name)
    return made, store, plan(STUDY, "cpu", lambda experiment: "", store.outcomes())[0]


def test_records_survive_the_file(recorded, tmp_path):
    table = read(export(*recorded, tmp_path / "docs"))
    assert table.arms() == ["low", "high", "same"] and table.seeds() == [0, 1, 2, 3]
    found = {(o.arm, o.seed): o.figures["bits_per_byte"] for o in table.outcomes}
    stored = {(o.arm, o.seed): o.figures["bits_per_byte"] for o in recorded[1].outcomes()}
    assert found == pytest.approx(stored, rel=1e-6)


def test_the_report_decides_claims_with_known_answers(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "load_study", lambda name: STUDY)
    path = export(*recorded, tmp_path / "docs")
    page = write_report(STUDY, path)
    judged = judge(STUDY, read(path))
    assert [j.verdict.outcome for j in judged] == ["reproduced", "contradicted", "reproduced"]
    assert judged[0].verdict.mean == pytest.approx(-0.1, abs=1e-3)
    text, index = page.read_text(), (page.parent / "README.md").read_text()
    assert "**reproduced**" in text and "**contradicted**" in text and "preliminary" not in text
    assert "| [small_study](small_study.md) | low is better |" in index and "high is better" in index
    before = {each.name: each.read_bytes() for each in page.parent.iterdir()}
    path.rename(tmp_path / "kept.csv")
    for each in page.parent.iterdir():
        each.unlink()
    (tmp_path / "kept.csv").rename(path)
    write_report(STUDY, path)  # from the records alone
    assert {each.name: each.read_bytes() for each in page.parent.iterdir()} == before


def test_an_unfinished_study_is_called_preliminary(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "load_study", lambda name: STUDY)
    path = export(*recorded, tmp_path / "docs")
    lines = path.read_text().splitlines(keepends=True)
    last = recorded[2][-1].id
    path.write_text("".join(line for line in lines if last not in line))
    text = write_report(STUDY, path).read_text()
    assert "11 of 12 trials are finished; the figures are preliminary" in text and "n = 3" in text


def test_damaged_records_are_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("arm,stage,seed,trial,kind,name,step,value\na,compare,zero,1,figure,x,,1\n")
    with pytest.raises(StudyError, match="line 2: not a record"):
        read(path)
    path.write_text("arm,stage,seed,trial,kind,name,step,value\n")
    with pytest.raises(StudyError, match="no trial of the comparison is finished"):
        write_report(STUDY, path)


def test_figures_are_drawn_for_curves_loads_tuning_and_claims(tmp_path):
    chance = np.random.default_rng(0)

    def outcome(arm: str, seed: int, stage: str) -> Outcome:
        curve = {"step": [10, 20, 30], "bits_per_byte": (3 - np.arange(3) * 0.4 + chance.normal(0, 0.02, 3)).tolist()}
        load = {"expert_load": chance.dirichlet(np.ones(4), 2).tolist()}
        tuned = {"optimizer.learning_rate": 0.1 * (1 + (seed == 1001))}
        return Outcome(arm, seed, stage, f"{arm}{seed}", tuned, {"bits_per_byte": curve["bits_per_byte"][-1]}, curve,
                       load, False, 2.0)  # fmt: skip

    outcomes = [outcome(arm, seed, "tune" if seed >= 1000 else "compare")
                for seed in (1000, 1001, 0, 1, 2) for arm in STUDY.arms]  # fmt: skip
    claims = tuple(replace(claim, published=Published(1.9, 2.0)) for claim in STUDY.claims)
    study = replace(STUDY, claims=claims, tune={"optimizer.learning_rate": (1.0, 2.0)})
    table = Table({"study": "x", "scale": "cpu", "planned": "15"}, tuple(outcomes))
    figures = [report.curves_figure(study, table), report.claims_figure(judge(study, table)),
               report.tuning_figure(study, table), report.load_figure(table)]  # fmt: skip
    for i, figure in enumerate(figures):
        assert figure is not None
        content = report.save(figure, tmp_path / f"{i}.png").read_bytes()
        assert content[:4] == b"\x89PNG" and 4_000 < len(content) < 100_000


def test_csv_has_one_header_and_equal_columns(recorded, tmp_path):
    rows = list(csv.reader(export(*recorded, tmp_path / "docs").read_text().splitlines()))
    assert {len(row) for row in rows} == {8}
