"""The lease on a run folder: no job takes over from a live holder, and a dead holder locks nobody out."""

import itertools
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.paths import is_local
from tests.fake_bucket import use_fake_bucket
from tests.gcs_server import Fault
from train.lease import LeaseTiming, _lock_of, hold_lease
from train.run_folder import RunFolder, RunFolderError

QUICK = LeaseTiming(heartbeat=0.05, lease=0.4)
PATIENT = LeaseTiming(heartbeat=0.05, lease=600)


@pytest.fixture(params=["local", "bucket"])
def run(request, tmp_path):
    if request.param == "bucket":
        use_fake_bucket()
        return RunFolder(f"gs://bucket/{tmp_path.name}")
    return RunFolder(tmp_path)


def take(run, timing=QUICK):
    """Take the lease and release it. Return the notices."""
    notices: list[str] = []
    with hold_lease(run, notices.append, timing=timing):
        record = json.loads(run.lock.read_bytes())
        assert record["pid"] == os.getpid()
    assert run.lock.read_bytes().strip() == b""
    return notices


def replace_record(run, record) -> None:
    """Overwrite a record in one write, as a job does, so that no heartbeat finds half of each."""
    content = json.dumps(record).encode().ljust(511) + b"\n"
    if is_local(run.lock):
        descriptor = os.open(run.lock, os.O_RDWR)
        os.pwrite(descriptor, content, 0)
        os.close(descriptor)
    else:
        run.lock.write_bytes(content)


def record_of(run) -> dict:
    with hold_lease(run, print, timing=QUICK):
        return json.loads(run.lock.read_bytes())


def test_a_holder_is_named_while_it_holds_and_frees_the_folder(run):
    with hold_lease(run, print, timing=QUICK):
        with pytest.raises(RunFolderError, match=rf"in use by process {os.getpid()} on .* since 2.* delete .*\.lock"):
            take(run)
    assert take(run) == []


@pytest.mark.parametrize("change", [{"start": "1"}, {"pid": 2**22 + 1}])
def test_a_dead_holder_on_this_machine_is_replaced_at_once(run, change):
    """A pid that was reused, and one that does not exist."""
    run.lock.write_text(json.dumps(record_of(run) | change))
    (notice,) = take(run, PATIENT)
    assert "took over the lock" in notice and "dead on this host" in notice


@pytest.mark.parametrize(
    "change",
    [
        {"host": "elsewhere"},
        {"machine": "a container of the same name"},
        "garbage",
        "[]",
        '{"pid": "x"}',
        '{"pid": -1, "start": null, "host": "h", "since": 1}',
        '{"pid": 1, "start": null, "host": "h", "since": 1e99}',
        "[" * 100_000,
        "\0\0",
    ],
)
def test_a_silent_or_unreadable_holder_is_taken_over_after_the_lease(run, change):
    run.lock.write_text(json.dumps(record_of(run) | change) if isinstance(change, dict) else change)
    before = time.monotonic()
    watching, taken = take(run)
    assert "watching its heartbeat" in watching and "without a heartbeat" in taken
    assert time.monotonic() - before >= QUICK.lease


def test_a_job_is_refused_once_a_holder_elsewhere_sends_a_heartbeat(run):
    record = record_of(run) | {"host": "elsewhere"}
    run.lock.write_text(json.dumps(record))
    refused = threading.Event()

    def beat():
        for count in itertools.count(1):
            if refused.wait(0.1):
                return
            replace_record(run, record | {"beat": count})

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(RunFolderError, match=r"on elsewhere .*which is alive"):
            take(run, PATIENT)
    finally:
        refused.set()
        heart.join()
    assert json.loads(run.lock.read_bytes())["host"] == "elsewhere"


class Clock:
    """The module `time` of a machine whose wall clock is off by some seconds."""

    def __init__(self, offset: float):
        self._offset = offset

    def time(self) -> float:
        return time.time() + self._offset

    def __getattr__(self, name: str):
        return getattr(time, name)


@pytest.mark.parametrize("offset", [-2e8, 2e8])  # more than six years
def test_clocks_that_differ_decide_nothing(run, monkeypatch, offset):
    """A live holder is not taken over, and a silent one is after the lease, however far its clock is off."""
    monkeypatch.setattr("train.lease.time", Clock(offset))
    with hold_lease(run, print, timing=QUICK):
        record = json.loads(run.lock.read_bytes())
        assert abs(record["since"] - time.time() - offset) < 60
        monkeypatch.undo()
        # The contender sees another machine, so that it must watch the heartbeats.
        monkeypatch.setattr(
            "train.lease._describe_process", lambda: record | {"id": "b", "host": "b", "since": time.time()}
        )
        with pytest.raises(RunFolderError, match="which is alive"):
            take(run, PATIENT)
    replace_record(run, record)
    began = time.monotonic()
    assert "without a heartbeat" in take(run)[-1]
    assert QUICK.lease <= time.monotonic() - began < 30


def test_heartbeats_continue_after_any_failure(tmp_path):
    store = use_fake_bucket()
    run = RunFolder(f"gs://bucket/{tmp_path.name}")
    denied = Fault(f"POST bucket/{tmp_path.name}", 403, times=2)
    with hold_lease(run, print, timing=QUICK):
        store.faults.append(denied)
        deadline = time.monotonic() + 10
        beat = json.loads(run.lock.read_bytes())["beat"]
        while json.loads(run.lock.read_bytes())["beat"] <= beat + 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert denied.seen == 2, "the thread stopped after the first failure"
    denied.times = None
    with pytest.raises(OSError, match="permission denied"):
        hold_lease(run, print, timing=QUICK).__enter__()
    store.faults.remove(denied)


def test_of_two_jobs_that_find_a_bucket_free_one_gets_it(tmp_path):
    """All read before any writes."""
    store = use_fake_bucket()
    run = RunFolder(f"gs://bucket/{tmp_path.name}")
    jobs = [(_lock_of(run), record | {"id": name}) for record in [record_of(run)] for name in "abcdefgh"]
    all_read = threading.Barrier(len(jobs))
    store.before = lambda request: all_read.wait(20) if request == f"POST bucket/{tmp_path.name}/.lock" else None
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(lambda job: job[0].take(job[1], None), jobs))
    store.before = None
    winners = [record["id"] for (_, record), other in zip(jobs, found, strict=True) if other is None]
    assert winners == [json.loads(run.lock.read_bytes())["id"]]
    assert all(json.loads(other)["id"] == winners[0] for other in found if other is not None)


def test_a_holder_of_older_code_sends_no_heartbeat_and_is_not_taken_over(run):
    record = {"pid": 1, "start": None, "host": "elsewhere", "since": 1.0}
    run.lock.write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match=r"no heartbeat; .* delete .*\.lock"):
        take(run)


def test_heartbeats_survive_the_deletion_of_the_file(run):
    beats = set()
    with hold_lease(run, print, timing=QUICK):
        deadline = time.monotonic() + 10
        while len(beats) < 3 and time.monotonic() < deadline:
            beats.add(json.loads(run.lock.read_bytes())["beat"])
            time.sleep(0.02)
        run.lock.unlink()
        while not (run.lock.exists() and run.lock.read_bytes().strip()) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(beats) >= 3 and json.loads(run.lock.read_bytes())["pid"] == os.getpid()


def test_a_holder_that_lost_its_lease_notices_and_writes_nothing(run):
    lost: list[str] = []
    with hold_lease(run, print, timing=QUICK, on_lost=lost.append):
        other = json.loads(run.lock.read_bytes()) | {"id": "another", "host": "elsewhere"}
        replace_record(run, other)
        deadline = time.monotonic() + 10
        while not lost and time.monotonic() < deadline:
            time.sleep(0.02)
    assert len(lost) == 1 and "taken over by process" in lost[0] and "on elsewhere" in lost[0]
    assert json.loads(run.lock.read_bytes()) == other
