"""The account of a start's wall time: every moment counts once, and every start of a run keeps its own."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.goodput import PHASES, ROW_SECONDS, Goodput, RecordGoodput
from train.hooks import Recorder, StepResult
from train.records import MetricsWriter, RunFolder, read_metrics


class Clock:
    """A clock that moves only when it is advanced."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


waits = st.lists(st.floats(0, 100), max_size=3)
walks = st.recursive(
    waits.map(lambda waited: ("other", waited, [])),
    lambda inner: st.tuples(st.sampled_from(PHASES), waits, st.lists(inner, max_size=3)),
    max_leaves=12,
)


@given(walks)
def test_every_moment_counts_once_in_the_innermost_phase(walk):
    clock = Clock()
    goodput, expected = Goodput(clock), dict.fromkeys(PHASES, 0.0)

    def follow(walk) -> None:
        name, waits, inner = walk
        with goodput.phase(name):
            for wait in waits:
                clock.now += wait
                expected[name] += wait
            for each in inner:
                follow(each)

    follow(walk)
    clock.now += 3
    expected["other"] += 3
    seconds = goodput.row(7)["seconds"]
    assert seconds.pop("wall") == pytest.approx(clock.now - 1000, abs=0.01) and seconds == pytest.approx(
        expected, abs=0.01
    )


def test_a_phase_that_raises_ends_and_an_unknown_one_is_refused():
    clock = Clock()
    goodput = Goodput(clock)
    with pytest.raises(KeyError), goodput.phase("steps"):
        clock.now += 2
        raise KeyError
    clock.now += 1
    assert goodput.row(0)["seconds"] == {"wall": 3.0, **dict.fromkeys(PHASES, 0.0), "steps": 2.0, "other": 1.0}
    with pytest.raises(ValueError, match="phase 'step': unknown; use one of startup, data"), goodput.phase("step"):
        pass


def test_the_account_is_written_every_minute_and_outlives_a_resumption(tmp_path):
    run, clock = RunFolder(tmp_path), Clock()
    with MetricsWriter(run) as metrics:
        recorder = Recorder(metrics, print)
        hook = RecordGoodput(Goodput(clock), recorder, clock)
        for step in range(1, 41):
            clock.now += ROW_SECONDS / 10
            hook.on_step(None, StepResult(step, {}, None, 0))
        recorder.event(15, "resumed", "from step 15")
        RecordGoodput(Goodput(clock), recorder, clock).on_save(None, 40, True)
    rows = [row for row in read_metrics(run.metrics) if row["kind"] == "goodput"]
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 40]
    assert [row["seconds"]["wall"] for row in rows] == [60, 120, 180, 240, 0]
    assert all(json.dumps(row) for row in rows)
