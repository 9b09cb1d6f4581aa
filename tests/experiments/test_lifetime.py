"""The account of a run's whole life: what killed starts wasted, pauses, and where the time of a real run went."""

from __future__ import annotations

import dataclasses
import time

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import SourceConfig
from data.pipeline import TrainBatches
from data.prepare import prepare
from experiments.lifetime import PHASES, life_lines, lifetime, read_lifetime, starts_of, summary
from tests.data.conftest import byte_config, write_corpus
from tests.train.small_runs import TINY, StopAt, experiment, run
from train.goodput import PHASES as MEASURED
from train.hooks import Hook
from train.program import build
from train.records import read_metrics


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("lifetime")
    return prepare(byte_config(root, write_corpus(root / "large", 30)))


@pytest.fixture(scope="module")
def program(prepared):
    root = prepared.directory.parents[1]
    data = byte_config(root, SourceConfig(name="large", path=str(root / "large")))
    config = experiment(data, microbatches=1, log_every=1)
    return build(dataclasses.replace(config, model=TINY), devices=jax.devices()[:2])


class Killed(BaseException):
    """What no code of a run handles. The rows that a run appended to its local file before are on disk, and no later
    ones, as after SIGKILL."""


class KillAt(Hook):
    """Ends the run right after the row of step `when` was written."""

    def __init__(self, when: int):
        self._when = when

    def on_step(self, trainer, result):
        if result.step == self._when:
            raise Killed


def killed_at(when: int, program, prepared, folder):
    with pytest.raises(Killed):
        run(program, prepared, folder, hooks=[KillAt(when)])


def test_an_uninterrupted_run_loses_nothing(program, prepared, tmp_path):
    began = time.time()
    run(program, prepared, tmp_path)
    wall = time.time() - began
    life = read_lifetime(tmp_path / "metrics.jsonl")
    assert (life.starts, life.restarts, life.repeated_steps, life.restart_loss, life.paused) == (1, 0, 0, 0, 0)
    assert life.seconds["repeated"] == life.seconds["down"] == 0 and 0 < life.goodput < 1
    assert life.wall == pytest.approx(wall, rel=0.01, abs=0.05)
    assert "restart" not in summary(life).lower()


@pytest.mark.parametrize(("when", "checkpoint"), [(8, 5), (4, 0), (11, 10)])
def test_a_killed_run_reports_the_steps_after_its_last_checkpoint_as_repeated(
    program, prepared, tmp_path, when, checkpoint
):
    """Checkpoints are saved every 5 steps."""
    killed_at(when, program, prepared, tmp_path)
    before = read_lifetime(tmp_path / "metrics.jsonl")
    assert (before.repeated_steps, before.restarts) == (0, 0)  # nothing is repeated yet
    time.sleep(0.3)
    assert run(program, prepared, tmp_path).finished
    life = read_lifetime(tmp_path / "metrics.jsonl")
    assert (life.starts, life.restarts, life.repeated_steps) == (2, 1, when - checkpoint)
    assert life.seconds["down"] >= 0.3 and life.paused == 0
    assert life.restart_loss >= life.seconds["down"] + life.seconds["repeated"]
    wall = [row["time"] for row in read_metrics(tmp_path / "metrics.jsonl", superseded=True)]
    start = min(row["start"]["time"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "goodput")
    assert life.wall == pytest.approx(max(wall) - start, rel=0.01, abs=0.02)
    assert f"{when - checkpoint} steps repeated" in summary(life)


def test_a_run_that_was_stopped_on_request_pauses(program, prepared, tmp_path):
    with StopAt(4) as stop:
        run(program, prepared, tmp_path, stop=stop)
    time.sleep(0.3)
    run(program, prepared, tmp_path)
    life = read_lifetime(tmp_path / "metrics.jsonl")
    assert (life.starts, life.restarts, life.repeated_steps, life.restart_loss) == (2, 0, 0, 0)
    assert life.paused >= 0.3 and life.seconds["down"] == 0


def test_waiting_for_data_is_counted_apart_from_steps(program, prepared, tmp_path):
    class SlowBatches(TrainBatches):
        def __next__(self):
            time.sleep(0.05)
            return super().__next__()

    quick = run(program, prepared, tmp_path / "quick") and read_lifetime(tmp_path / "quick" / "metrics.jsonl")
    batches = SlowBatches(prepared, program.experiment.data, 0, 0, 1)
    run(program, prepared, tmp_path / "slow", batches=batches)
    slow = read_lifetime(tmp_path / "slow" / "metrics.jsonl")
    assert slow.seconds["data_wait"] >= 12 * 0.05 > quick.seconds["data_wait"]
    assert any("waiting for data" in line for line in life_lines(slow))


# ---- rows ----


def rows_of(
    began: float, first: int, last: int, *, wall: float, steps: float, counted: int, restart=None, stopped=False
):
    """Return the rows of a start: an account at `counted` after `wall` seconds, then a row a second until `last`."""
    account = {"kind": "goodput", "step": counted, "time": began + wall,
               "start": {"time": began, "step": first, "restart": restart},
               "seconds": {"wall": wall, "steps": steps, "other": wall - steps}}  # fmt: skip
    later = [{"kind": "train", "step": counted + i + 1, "time": began + wall + i + 1} for i in range(last - counted)]
    end = (
        [{"kind": "event", "event": "stopped", "step": last, "time": began + wall + last - counted}] if stopped else []
    )
    return [account, *later, *end]


def test_a_restart_of_the_launcher_after_a_preemption_is_down_time():
    """The preempted start saved in time, so no step is repeated; but nobody chose the pause."""
    first = rows_of(1000.0, 0, 20, wall=100, steps=80, counted=20, stopped=True)
    for restart, down, paused in ((1, 400, 0), (None, 0, 400), (0, 0, 400)):
        life = lifetime(starts_of([*first, *rows_of(1500.0, 20, 40, wall=50, steps=40, counted=40, restart=restart)]))
        assert (life.seconds["down"], life.paused, life.restarts) == (down, paused, int(down > 0))


def test_time_after_the_last_account_counts_as_steps():
    """The account ends at step 20 after 100 s; rows follow until step 30 after 110 s. The next start is at step 20."""
    first = rows_of(1000.0, 0, 30, wall=100, steps=80, counted=20)
    life = lifetime(starts_of([*first, *rows_of(1200.0, 20, 40, wall=50, steps=40, counted=40)]))
    assert life.repeated_steps == 10 and life.seconds["repeated"] == pytest.approx(10)
    assert life.seconds["steps"] == pytest.approx(80 + 40) and life.seconds["down"] == 90
    assert life.wall == pytest.approx(250) and life.goodput == pytest.approx(120 / 250)


def test_an_older_checkpoint_wastes_steps_of_all_starts_after_it():
    starts = [rows_of(0.0, 0, 50, wall=50, steps=50, counted=50), rows_of(100.0, 40, 45, wall=5, steps=5, counted=45),
              rows_of(200.0, 30, 60, wall=30, steps=30, counted=60)]  # fmt: skip
    life = lifetime(starts_of([row for rows in starts for row in rows]))
    assert life.repeated_steps == 20 + 5 and life.seconds["steps"] == pytest.approx(30 + 30)


def test_steps_that_a_rewind_undid_are_not_repeated_by_the_next_start():
    """A start comes to step 60, returns to step 20, and is stopped at step 40, where the next one continues."""
    undone = rows_of(1000.0, 0, 60, wall=100, steps=80, counted=50)
    rewound = {"kind": "event", "event": "rewound", "step": 20, "time": 1111.0}
    again = [{"kind": "train", "step": step, "time": 1091.0 + step} for step in range(21, 41)]
    stopped = {"kind": "event", "event": "stopped", "step": 40, "time": 1132.0}
    rows = [*undone, rewound, *again, stopped, *rows_of(1200.0, 40, 70, wall=50, steps=40, counted=70)]
    life = lifetime(starts_of(rows))
    assert (life.repeated_steps, life.seconds["repeated"], life.restarts) == (0, 0.0, 0)


walks = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 9), st.floats(0, 100), st.booleans()), max_size=5
)


@given(walks)
def test_every_second_of_a_life_counts_once(walk):
    rows, now, away = [], 0.0, 0.0
    for first, more, late, gap, stopped in walk:
        wall = float(more)
        rows += rows_of(
            now, first, first + more + late, wall=wall, steps=wall / 2, counted=first + more, stopped=stopped
        )
        ended, now = now + wall + late, now + wall + late + 1 + gap
        away = now - ended
    life = lifetime(starts_of(rows))
    assert life.wall + life.paused == pytest.approx(max(now - away, 0.0))
    assert all(seconds >= -1e-9 for seconds in life.seconds.values()) and life.repeated_steps >= 0


def test_every_measured_phase_has_a_name():
    assert set(MEASURED) | {"repeated", "down"} == set(PHASES)
