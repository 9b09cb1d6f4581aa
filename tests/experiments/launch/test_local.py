"""The target `local` for real: processes find each other, die, are restarted and stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from experiments.study.storage import TrialStore
from tests.experiments.command_line import final_row, tiny_overrides, write_folder
from tests.experiments.launch.launching import PEER, ROOT, alive, finish, start, until
from tests.experiments.study.small_study import LOG, SECONDS
from tests.experiments.study.test_storage import IDS

QUICK = ("--backoff", "0.1")


def test_two_processes_join_and_add(tmp_path):
    (tmp_path / "die").write_text("")
    process = start("local", "--processes", 2, *QUICK, "--logs", tmp_path / "logs", "--", *PEER, "add", tmp_path)
    code, out, err = finish(process)
    assert code == 0, err
    sums = sorted(line for line in out.splitlines() if "sum" in line)
    assert sums == [f"[{i}] sum 3 of 2 processes, restart 1" for i in (0, 1)], out
    assert "launch: process 1: exit code 137 (killed (SIGKILL), often for lack of memory); restart 1 of 3" in err
    assert "sum 3 of 2 processes, restart 1" in (tmp_path / "logs/1.log").read_text()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process(tmp_path, number, expected):
    process = start("local", "--processes", 3, "--", *PEER, "wait", tmp_path)
    until(lambda: len(list(tmp_path.glob("waiting-*"))) == 3, "three processes")
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == expected, err
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1", "stopped-2"]
    assert "restart" not in err


def test_processes_end_with_their_launcher(tmp_path):
    process = start("local", "--processes", 2, "--", *PEER, "wait", tmp_path)
    until(lambda: len(list(tmp_path.glob("waiting-*"))) == 2, "two processes")
    process.kill()
    finish(process)
    until(lambda: len(list(tmp_path.glob("stopped-*"))) == 2, "their end")


@pytest.mark.parametrize(
    ("end", "code", "attempts"),
    [
        ("75 lost", 75, 2),  # as after a lost peer
        ("76 error: a device", 76, 1),  # that computes wrong
        ("1 Traceback", 1, 2),  # an exception
        ("1 error: data.batch_size = 3: it must be even", 1, 1),  # something to change
        ("2 usage", 2, 1),
    ],
)
def test_a_failure_stops_the_others_and_decides_about_a_restart(tmp_path, end, code, attempts):
    (tmp_path / "fail").write_text(end)
    process = start("local", "--processes", 2, *QUICK, "--restarts", 1, "--", *PEER, "fail", tmp_path)
    got, _, err = finish(process)
    assert got == code and (tmp_path / "stopped-0").exists(), err
    assert err.count(f"[1] {end.partition(' ')[2]}") == attempts and ("restart 1 of 1" in err) == (attempts == 2), err
    assert "stopping 0" in err


@pytest.mark.slow
def test_workers_of_a_study_share_its_trials(tmp_path):
    """Every trial is recorded once."""
    log, url = tmp_path / "trials", f"sqlite:///{tmp_path}/s.db"
    words = ("study", ROOT / "tests/experiments/study/small_study.py", "--storage", url, "--worker")
    variables = ("--env", f"{LOG}={log}", "--env", f"{SECONDS}=0.5")
    with TrialStore(url, "small_study/cpu") as store:  # several workers cannot make a database at once
        process = start("local", "--processes", 2, *variables, "--", *words, cwd=tmp_path)
        code, _, err = finish(process, 200)
        assert code == 0, err
        assert store.counts(IDS) == (0, 0, len(IDS), 0)
        assert sorted(outcome.id for outcome in store.outcomes()) == sorted(IDS)
    assert len({line.split()[2] for line in log.read_text().splitlines()}) == 2  # both workers took part


def train_processes(run: Path) -> list[int]:
    """Return the numbers of the processes that train the run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(run) in words and "experiments" in words and not {"launch", "experiments.launch.worker"} & set(words):
            found.append(int(path.parent.name))
    return found


def recorded_steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row["step"] for row in rows if row["kind"] == "train"]


@pytest.mark.slow
def test_a_run_that_lost_a_process_is_restarted_and_resumes(tmp_path):
    """It ends with the figures of an uninterrupted run, and records the restart."""
    write_folder(tmp_path / "corpus")
    words = [*tiny_overrides(tmp_path), "--set", "train.steps=100", "--set", "train.checkpoint_every=20"]
    words += ["--set", "train.eval_every=100", "--distributed"]
    common = ("local", "--processes", 2, *QUICK, "--env", "JAX_PLATFORMS=cpu", "--", "train", "smoke", *words, "--run")
    code, _, err = finish(start(*common, tmp_path / "whole"), 300)
    assert code == 0, err[-3000:]
    run = tmp_path / "killed"
    process = start(*common, run)
    until(lambda: max(recorded_steps(run), default=0) > 22, "step 24", 200)
    victims = train_processes(run)
    assert len(victims) == 2
    os.kill(max(victims), signal.SIGKILL)
    code, out, err = finish(process, 300)
    assert code == 0 and "restart 1 of 3" in err, err[-3000:]
    assert not any(alive(pid) for pid in victims)
    environment = json.loads((run / "environment.json").read_text())
    assert environment["restart"] == 1 and [each["restart"] for each in environment["earlier"]] == [0]
    assert "resum" in out or "continu" in out
    whole, killed = final_row(tmp_path / "whole"), final_row(run)
    times = {"time", "wall_seconds"}
    assert {k: v for k, v in killed.items() if k not in times} == {k: v for k, v in whole.items() if k not in times}
