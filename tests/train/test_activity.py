"""The process for which the others wait is named: in a hang, and while a step is slow."""

from __future__ import annotations

import pytest

from train.activity import ORDER, Activity, Report, behind, name_processes, straggler


def reports(*rows: tuple[str, int, float]) -> dict[int, Report]:
    """Return reports of processes 0, 1, ... from (activity, last dispatched step, seconds of the activity)."""
    return {i: Report(f"w-{i}", doing, step, step, seconds) for i, (doing, step, seconds) in enumerate(rows)}


def spending(*rows: dict[str, float], steps: int = 10) -> dict[int, Report]:
    """Return reports of processes that have spent these seconds in `steps` steps, and no others."""
    return {
        i: Report(f"w-{i}", "step", steps, steps, 0.1, dict.fromkeys(ORDER, 0.0) | row) for i, row in enumerate(rows)
    }


def test_an_activity_counts_every_moment_once():
    now = [0.0]
    activity = Activity(lambda: now[0])
    for doing, step, seconds in (("data", 0, 2.0), ("step", 1, 3.0), ("hooks", 1, 0.5), ("data", 1, 4.0)):
        activity.begin(doing, step)
        now[0] += seconds
    report = activity.report("w-0")
    assert report == Report.parse(report.text())
    assert (report.doing, report.step, report.dispatched, report.seconds) == ("data", 1, 1, 4.0)
    assert report.spent == dict.fromkeys(ORDER, 0.0) | {"data": 6.0, "step": 3.0, "hooks": 0.5}
    assert sum(report.spent.values()) == now[0]


def test_names_of_processes():
    assert name_processes([2], {2: "w-2"}) == "process 2 (host w-2)"
    assert name_processes([1, 2], {2: "w-2"}) == "processes 1, 2 (host w-2)"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [("step", 18, 30), ("step", 18, 31), ("data", 17, 33), ("step", 18, 30)],
            "process 2 (host w-2) last dispatched step 17 and has been reading its data for 33 s; the others have come "
            "to step 18",
        ),
        (  # a process whose device hangs in a step that the others have finished
            [("checkpoint", 18, 9), ("step", 18, 9)],
            "process 1 (host w-1) last dispatched step 18 and has waited for the result of a step for 9 s; the others "
            "have come to step 18",
        ),
        (
            [("step", 18, 9), ("step", 18, 9)],
            "every process has dispatched step 18 and has waited for the result of a step: a device or the network "
            "hangs",
        ),
    ],
    ids=["data", "device", "all"],
)  # fmt: skip
def test_the_process_that_is_behind_is_named(rows, expected):
    assert behind(reports(*rows)) == expected


def test_a_process_without_a_heartbeat_says_so():
    text = behind(reports(("step", 7, 9), ("hooks", 6, 1), ("step", 7, 9)), silent=[1])
    assert text == ("process 1 (host w-1) sends no heartbeat, and last reported step 6; the others have come to step 7")


BEFORE = spending({}, {}, {}, steps=0)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_straggler_is_named_with_its_time_per_step(hidden):
    now = spending({"step": 22.0, "data": 0.1}, {"data": 21.0, "step": 1.1}, {"step": 22.0, "data": 0.1})
    assert straggler(BEFORE, now, hidden=hidden) == (
        "process 1 (host w-1) takes 2.10 s a step to read its data, the others 0.01 s; all wait for it"
    )


def test_a_process_that_makes_no_step_is_named():
    now = spending({"step": 30.0}, {"step": 30.0}, {"data": 30.0}, steps=0)
    assert straggler(BEFORE, now, hidden=True) == (
        "process 2 (host w-2) has been reading its data for 30 s; all wait for it"
    )


def test_slow_hooks_of_one_process_are_named():
    now = spending({"hooks": 9.0, "step": 13.0}, {"step": 22.0}, {"step": 22.0})
    assert "process 0 (host w-0) takes 0.90 s a step for hooks and logs" in straggler(BEFORE, now, hidden=False)


def test_even_times_and_hidden_ones_name_nobody():
    even = spending(*[{"data": 15.0, "step": 7.0}] * 3)
    assert straggler(BEFORE, even, hidden=False) is None
    hidden = spending({"step": 22.0}, {"data": 9.0, "step": 13.0}, {"step": 22.0})  # its device is still computing
    assert straggler(BEFORE, hidden, hidden=True) is None and straggler(BEFORE, hidden, hidden=False)
    evaluating = spending({"evaluation": 20.0}, {"step": 20.0}, {"checkpoint": 20.0})
    assert straggler(BEFORE, evaluating, hidden=False) is None
    assert straggler({}, even, hidden=False) is None  # the processes have just joined
