"""Restarts: how many, after which pause, and after which ends of a job."""

from __future__ import annotations

import signal

import pytest

from experiments.launch.supervise import Outcome, StopRequests, describe, keep_running


class Stops(StopRequests):
    """Records the pauses instead of sleeping. A signal arrives in the pause number `stop_at`."""

    def __init__(self, stop_at: int | None = None):
        super().__init__()
        self.pauses: list[float] = []
        self._stop_at = stop_at

    def wait(self, seconds: float) -> bool:
        self.pauses.append(seconds)
        if len(self.pauses) == self._stop_at:
            self.count = 1
        return self.count > 0


def run(codes: list[int], stop: Stops, *, restarts: int = 3, again: bool = True, lasting: float = 1.0):
    """Return (exit code, restart numbers, log). Each attempt lasts `lasting` seconds and ends with the next code."""
    seen: list[int] = []
    now = [0.0]

    def attempt(restart: int) -> Outcome:
        seen.append(restart)
        now[0] += lasting
        code = codes[len(seen) - 1]
        return Outcome(code, again and code != 0, f"it ended with {code}")

    lines: list[str] = []
    code = keep_running(attempt, stop, restarts, 10.0, lines.append, lambda: now[0])
    return code, seen, lines


def test_a_failed_job_is_restarted_after_growing_pauses():
    stop = Stops()
    code, seen, lines = run([75, 137, 0], stop)
    assert (code, seen, stop.pauses) == (0, [0, 1, 2], [10.0, 20.0])
    assert lines == ["it ended with 75; restart 1 of 3 in 10 s", "it ended with 137; restart 2 of 3 in 20 s"]


def test_restarts_are_limited_and_pauses_too():
    stop = Stops()
    code, seen, lines = run([75] * 9, stop, restarts=7)
    assert code == 75 and seen == list(range(8)) and stop.pauses == [10, 20, 40, 80, 160, 300, 300]
    assert "no restart is left (--restarts 7)" in lines[-1]
    assert run([75], Stops(), restarts=0)[:2] == (75, [0])


def test_an_attempt_of_an_hour_starts_the_count_again():
    """A preempted job of days is not limited to three preemptions."""
    stop = Stops()
    code, seen, _ = run([75] * 9 + [0], stop, lasting=3600.0)
    assert code == 0 and seen == list(range(10)) and set(stop.pauses) == {10.0}


def test_an_error_that_a_restart_cannot_fix_ends_the_job():
    code, seen, lines = run([1, 0], Stops(), again=False)
    assert (code, seen) == (1, [0]) and "a restart would not help" in lines[0]


def test_a_signal_in_a_pause_ends_the_job():
    stop = Stops(stop_at=2)
    assert run([75] * 9, stop)[:2] == (128 + signal.SIGTERM, [0, 1])


def test_signals_are_counted_and_the_first_decides_the_exit_code():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequests() as stop:
        assert not stop.wait(0.0)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(60.0) and stop.count == 2 and stop.code == 130
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("code", "text"), [(3, "exit code 3"), (75, "another process is lost"), (137, "SIGKILL"), (139, "SIGSEGV")]
)
def test_exit_codes_are_explained(code, text):
    assert text in describe(code)
