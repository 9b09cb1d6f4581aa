"""No trial is lost or recorded twice, whatever happens to the workers; unusable storages are refused."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.study import storage
from experiments.study.definition import StudyError
from experiments.study.storage import TrialStore
from experiments.study.trials import plan
from experiments.study.worker import work
from tests.experiments.study.small_study import LOG, SECONDS, STUDY, TRAIN_IN, job, with_arms
from tests.experiments.study.tiny import tiny_study
from tests.experiments.test_processes import free_address

TRIALS, _ = plan(STUDY, "cpu", lambda experiment: "", [])
IDS = [trial.id for trial in TRIALS]


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/trials.db"


def store(folder: Path) -> TrialStore:
    return TrialStore(url(folder), "small_study/cpu", heartbeat_seconds=1)


def worker(address: str, folder: Path, *more: str, before: Sequence[str] = (), **environment: str) -> subprocess.Popen:
    command = [*before, sys.executable, "-m", "tests.experiments.study.small_study", address, str(folder), *more]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment)


def test_trials_are_claimed_in_order_once_and_duplicates_set_aside(tmp_path):
    first, second = store(tmp_path), store(tmp_path)
    assert first.enqueue(TRIALS) == 12 and second.enqueue(TRIALS) == 0
    for trial in TRIALS[:3]:  # as a process that looked before `first` had queued them
        attributes = {"id": trial.id, "arm": trial.arm, "seed": trial.seed, "stage": "compare", "tuned": {}}
        second._study.enqueue_trial({}, user_attrs=attributes)
    claimed = []
    while (each := (first, second)[len(claimed) % 2].claim(IDS)) is not None:
        claimed.append(each)
    assert [each.id for each in claimed] == IDS
    outcome = {"figures": {"bits_per_byte": 2.0}, "curves": {}, "arrays": {}, "diverged": False, "seconds": 1.0}
    for each in claimed:
        first.finish(each, outcome, 2.0)
        first.finish(each, outcome, 3.0)  # a second record changes nothing
    assert first.counts(IDS) == (0, 0, 12, 0)
    assert [o.id for o in second.outcomes()] == IDS and not second.failures()


def test_a_released_trial_is_claimed_again_and_a_failed_one_on_request(tmp_path):
    kept = store(tmp_path)
    kept.enqueue(TRIALS[:2])
    first = kept.claim()
    kept.release(first)
    assert kept.claim().id == first.id
    second = kept.claim()
    kept.fail(second, "ValueError: bad")
    assert kept.failures() == {second.id: "ValueError: bad"} and kept.enqueue(TRIALS[:2]) == 0
    assert kept.claim() is None and kept.retry_failed() == 1
    assert kept.claim().id == second.id and not kept.failures()


def test_a_worker_runs_everything_and_a_wider_study_only_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setenv(LOG, str(tmp_path / "log"))
    assert work(job(url(tmp_path), tmp_path), log=lambda text: None)
    assert len((tmp_path / "log").read_text().splitlines()) == 12
    wider = with_arms(third={"optimizer.learning_rate": 0.3})
    assert work(job(url(tmp_path), tmp_path, wider), log=lambda text: None)
    assert len((tmp_path / "log").read_text().splitlines()) == 16
    assert not work(job(url(tmp_path), tmp_path, with_arms(new={"model.num_layers": 1})), log=print, seconds=0.0)


def test_a_full_disk_stops_the_worker_and_fails_no_trial(tmp_path):
    full = True

    def run(experiment):
        if full:
            raise RuntimeError("checkpoint") from OSError(errno.ENOSPC, "No space left on device")
        return {"bits_per_byte": 1.0}

    made = job(url(tmp_path), tmp_path, dataclasses.replace(STUDY, run=run))
    with pytest.raises(StudyError, match=r"low, seed 0: the disk is full .* free some space"):
        work(made, log=print)
    with store(tmp_path) as kept:
        assert kept.counts(IDS) == (12, 0, 0, 0)
    full = False
    assert work(made, log=print)


def survive(address: str, folder: Path, workers: int = 3, kills: int = 4, clocks: Sequence[str] = ()) -> None:
    """Run the study in processes, of which random ones are killed, and check that every trial is recorded once.

    `clocks`: offsets of the first workers' clocks, such as "+1h".
    """
    log, chance = folder / "log", random.Random(0)
    started = itertools.count()

    def start() -> subprocess.Popen:
        number = next(started)
        fake = ["faketime", "-f", clocks[number]] if number < len(clocks) else []
        return worker(address, folder, before=fake, **{LOG: str(log), SECONDS: "0.5"})

    with TrialStore(address, "small_study/cpu", heartbeat_seconds=1) as kept:
        _kill(kept, start, chance, workers, kills)
        assert kept.counts(IDS) == (0, 0, 12, 0) and not kept.failures()
        assert Counter(o.id for o in kept.outcomes()) == Counter(IDS)
    ended = Counter(tuple(line.split()[:2]) for line in log.read_text().splitlines())
    assert sum(ended.values()) <= 12 + kills  # only a trial whose worker was killed between its end and its record


def _kill(kept: TrialStore, start, chance: random.Random, workers: int, kills: int) -> None:
    """Run workers to their end, and kill random ones, which are replaced."""
    running = [start() for _ in range(workers)]
    deadline = time.monotonic() + 150
    while kept.counts(IDS).done < 12 and time.monotonic() < deadline:
        if kills and kept.counts(IDS).running:
            time.sleep(chance.uniform(0.1, 0.7))
            victim = chance.randrange(workers)
            running[victim].send_signal(signal.SIGKILL)
            running[victim].wait()
            running[victim], kills = start(), kills - 1
        time.sleep(0.3)
    assert all(process.wait(timeout=60) == 0 for process in running)
    assert not kills


@pytest.mark.slow
def test_workers_may_start_at_once_on_an_empty_database(tmp_path):
    """One creates the tables, and no trial runs twice, although all queue them."""
    started = [worker(url(tmp_path), tmp_path, **{LOG: str(tmp_path / "log")}) for _ in range(4)]
    assert [process.wait(timeout=180) for process in started] == [0] * 4
    lines = [tuple(line.split()[:2]) for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == 12
    with store(tmp_path) as kept:
        assert kept.counts(IDS) == (0, 0, 12, 0) and Counter(o.id for o in kept.outcomes()) == Counter(IDS)


@pytest.mark.slow
def test_killed_workers_lose_no_trial(tmp_path):
    survive(url(tmp_path), tmp_path)


@pytest.mark.slow
def test_killed_workers_lose_no_trial_on_postgresql(tmp_path):
    pytest.importorskip("psycopg")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs or not shutil.which("runuser"):
        pytest.skip("PostgreSQL's server is not installed")
    data, port = tmp_path / "data", "54399"
    tmp_path.chmod(0o777)
    run = lambda *command: subprocess.run(["runuser", "-u", "postgres", "--", *map(str, command)], check=True)
    for parent in tmp_path.parents:
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(0o777)
    run(programs[-1] / "initdb", "-D", data, "-A", "trust", "-N")
    server = [programs[-1] / "pg_ctl", "-D", data, "-w", "-l", tmp_path / "server.log", "-o",
              f"-p {port} -k {tmp_path} -c listen_addresses=127.0.0.1"]  # fmt: skip
    run(*server, "start")
    try:
        # The server's clock judges the heartbeats, so the clocks of the workers do not matter.
        clocks = ("+1h", "-1h") if shutil.which("faketime") else ()
        survive(f"postgresql+psycopg://postgres@127.0.0.1:{port}/postgres", tmp_path, clocks=clocks)
    finally:
        run(*server, "-m", "immediate", "stop")


@pytest.mark.slow
def test_two_processes_are_one_worker(tmp_path):
    """Both run every trial; process 0 claims and records."""
    address = free_address()
    peers = [worker(url(tmp_path), tmp_path, address, str(rank), **{LOG: str(tmp_path / "log")}) for rank in (0, 1)]
    assert [peer.wait(timeout=180) for peer in peers] == [0, 0]
    with store(tmp_path) as kept:
        assert kept.counts(IDS) == (0, 0, 12, 0) and [o.id for o in kept.outcomes()] == IDS
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert set(Counter((rate, seed) for rate, seed, _ in lines).values()) == {2, 4}  # "low" and "same" share a rate
    assert set(Counter(process for _, _, process in lines).values()) == {12}


@pytest.mark.slow
def test_two_processes_train_trials_as_one_process_with_two_devices(tmp_path):
    train = {TRAIN_IN: str(tmp_path), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    tiny_study(tmp_path, seeds=1)  # writes its text
    flag, address = "--xla_force_host_platform_device_count", free_address()
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    assert worker(url(folders[0]), folders[0], XLA_FLAGS=f"{flag}=2", **train).wait(timeout=240) == 0
    peers = [worker(url(folders[1]), folders[1], address, str(rank), XLA_FLAGS=f"{flag}=1", **train) for rank in (0, 1)]
    try:
        assert [peer.wait(timeout=240) for peer in peers] == [0, 0]
    finally:
        for peer in peers:
            peer.kill()
    one, two = [], []
    for folder, found in zip(folders, (one, two), strict=True):
        with TrialStore(url(folder), "tiny/cpu") as kept:
            found += kept.outcomes()
    assert [o.arm for o in two] == ["low", "high", "bad"] and [o.diverged for o in two] == [False, False, True]
    for alone, together in zip(one, two, strict=True):
        assert (together.id, together.diverged) == (alone.id, alone.diverged)
        assert together.figures == pytest.approx(alone.figures, rel=1e-5)
        for name, curve in alone.curves.items():
            assert together.curves[name] == pytest.approx(curve, rel=2e-5), name  # six digits
    assert one[0].figures["bits_per_byte"] != one[1].figures["bits_per_byte"]


def test_storages_that_cannot_be_used_are_refused_by_name(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="cannot be opened"):
        TrialStore("postgresql+nodriver://user:secret@127.0.0.1:1/x", "s")
    (tmp_path / "file").write_text("text")
    with pytest.raises(StudyError, match="choose another file"):
        TrialStore(f"sqlite:///{tmp_path}/file/trials.db", "s")
    with pytest.raises(StudyError, match="cannot be opened"):
        TrialStore(f"sqlite:///{tmp_path}", "s")
    store(tmp_path)
    monkeypatch.setattr(storage, "RECIPE", 2)
    with pytest.raises(StudyError, match="recorded with recipe 1, and this code has recipe 2"):
        store(tmp_path)
    with sqlite3.connect(tmp_path / "trials.db") as database:
        database.execute("update alembic_version set version_num = 'v2.6.0.a'")
    with pytest.raises(StudyError, match="optuna storage upgrade"):
        store(tmp_path)


def test_passwords_are_not_shown():
    with pytest.raises(StudyError) as error:
        TrialStore("postgresql+nodriver://user:secret@127.0.0.1:1/x", "s")
    assert "secret" not in str(error.value)
