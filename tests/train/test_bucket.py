"""Runs and checkpoints in a bucket whose server refuses or loses requests; the clients are the real ones."""

import json
import re

import jax
import pytest

from data.paths import list_files, list_names
from data.prepare import prepare
from tests.data.conftest import byte_config, write_corpus
from tests.fake_bucket import use_fake_bucket
from tests.gcs_server import PAGE, Fault
from tests.train.checkpoints import mesh_of, random_state, same_bits
from tests.train.small_runs import bits, experiment, run, train_rows
from train.bucket import ABSENT, BucketError, BucketObject, check_bucket
from train.checkpoint import Checkpointer, CheckpointError
from train.program import build
from train.run_folder import RunFolder, read_metrics

STEPS = 8


@pytest.fixture
def store():
    store = use_fake_bucket()
    yield store
    store.faults.clear()
    store.before = None
    assert store.unknown == []


@pytest.fixture
def folder(store, tmp_path):
    return RunFolder(f"gs://bucket/{tmp_path.name}").path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(program, prepared data, the trained state and train rows of an undisturbed run on a disk)."""
    root = tmp_path_factory.mktemp("tiny")
    data = byte_config(root, write_corpus(root / "text", 20))
    config = experiment(data, steps=STEPS, checkpoint_every=2, eval_every=100, keep_last=2)
    program, prepared = build(config, devices=jax.devices()[:1]), prepare(data)
    trained = run(program, prepared, root / "whole")
    return program, prepared, bits(trained.state), train_rows(root / "whole")


# ---- objects ----


def test_an_object_is_written_only_over_the_generation_that_was_read(folder):
    first, second = BucketObject(folder / "a"), BucketObject(folder / "a")
    assert first.read() == second.read() == (b"", ABSENT)
    generation = first.write(b"1", ABSENT)
    assert generation and second.write(b"2", ABSENT) is None
    assert second.read() == (b"1", generation)
    assert first.write(b"3", generation) and second.write(b"4", generation) is None
    assert (folder / "a").read_bytes() == b"3"


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (403, "permission denied .* role Storage Object User"),
        (401, "permission denied"),
        pytest.param(503, "cannot be reached", marks=pytest.mark.slow),
    ],
)
def test_a_refused_request_says_why(store, folder, status, expected):
    store.faults.append(Fault(f"{folder.name}/", status))
    with pytest.raises(BucketError, match=expected):
        BucketObject(folder / "a").write(b"1", ABSENT)


def test_a_request_is_repeated_after_a_transient_failure(store, folder):
    store.faults += [Fault(f"{folder.name}/", 503, times=1), Fault(f"{folder.name}/", 429, times=1)]
    assert BucketObject(folder / "a").write(b"1", ABSENT)
    assert [fault.seen for fault in store.faults] == [1, 1]


def test_a_bucket_is_asked_once(store, folder):
    for _ in range(2):
        check_bucket(folder)
    before = len(store.requests)
    check_bucket(folder / "other")
    assert len(store.requests) == before


def test_a_folder_in_a_bucket_is_renamed_and_listed(folder):
    for name in ("a", "d/b", "d~/c"):
        (folder / "old" / name).write_text(name)
    (folder / "old").rename(folder / "new")
    assert list_files(folder) == ["new/a", "new/d/b", "new/d~/c"] and list_names(folder) == ["new"]
    for count in range(2 * PAGE):
        (folder / f"{count:03}").write_text("")
    assert len(list_names(folder)) == 2 * PAGE + 1


# ---- checkpoints ----


def test_steps_in_a_bucket_restore_bit_for_bit_and_old_ones_are_deleted(store, folder):
    with Checkpointer(folder, keep_last=1) as checkpoints:
        for step in (1, 2):
            state = random_state(step, mesh_of(4, 2))
            assert checkpoints.save(step, state, metadata={"position": step}, wait=True)
        assert checkpoints.steps() == [2]
    with Checkpointer(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore(random_state(0))
    assert restored is not None and (restored.step, restored.metadata) == (2, {"position": 2})
    assert same_bits(restored.state, random_state(2))
    assert not [name for name in store.buckets["bucket"] if name.startswith(f"{folder.name}/1/")]


def test_a_save_whose_job_died_is_ignored_and_removed(store, folder):
    with Checkpointer(folder) as checkpoints:
        for step in (1, 2):
            assert checkpoints.save(step, random_state(step), metadata={}, wait=True)
    objects = store.buckets["bucket"]
    del objects[f"{folder.name}/2/commit.json"]
    with Checkpointer(folder) as checkpoints:
        restored = checkpoints.restore(random_state(0))
        assert restored is not None and restored.step == 1
    assert not [name for name in objects if name.startswith(f"{folder.name}/2/")]


def test_a_changed_object_is_damage_and_an_unreadable_one_is_not(store, folder):
    with Checkpointer(folder) as checkpoints:
        for step in (1, 2):
            assert checkpoints.save(step, random_state(step), metadata={}, wait=True)
    template, warnings = random_state(0), list[str]()
    store.faults.append(Fault(f"GET bucket/{folder.name}/2/manifest", 403))
    with Checkpointer(folder, read_only=True, log=warnings.append, retry_waits=(0.01,)) as checkpoints:
        with pytest.raises(CheckpointError, match=r"step 2 .* could not be read in 2 tries: .*proves no damage"):
            checkpoints.restore(template)
    store.faults.clear()
    (folder / "2" / "manifest.ocdbt").write_bytes(b"damaged")
    with Checkpointer(folder, read_only=True, log=warnings.append) as checkpoints:
        restored = checkpoints.restore(template)
    assert restored is not None and restored.step == 1
    assert len(warnings) == 1 and "step 2, manifest.ocdbt" in warnings[0] and "falling back to step 1" in warnings[0]


# ---- runs ----


@pytest.mark.slow
def test_a_run_continues_through_transient_failures(store, folder, tiny):
    """Of every kind of request, two are refused during the save of each step."""
    program, prepared, whole, rows = tiny
    for pattern in ("POST .*/checkpoints/4/", "POST .*/checkpoints/6/", "GET .*/checkpoints/6", "POST .*/metrics"):
        store.faults += [Fault(pattern, 503, times=1), Fault(pattern, 429, times=1)]
    recorded = {}

    def look(request):
        if match := re.search(r"POST .*/checkpoints/(\d+)/commit.json", request):
            recorded[int(match[1])] = [row["step"] for row in read_metrics(folder / "metrics.jsonl")]

    store.before = look
    notices: list[str] = []
    trained = run(program, prepared, folder, notices)
    # A job that is killed after a commit does not make the rows before it again.
    assert {step: {*range(step + 1)} <= {*steps} for step, steps in recorded.items()} == dict.fromkeys(
        (2, 4, 6, 8), True
    )
    assert all(fault.seen == 1 for fault in store.faults)
    assert bits(trained.state) == whole and train_rows(folder) == rows
    assert not [notice for notice in notices if "warning" in notice]


@pytest.mark.slow
def test_a_run_that_loses_its_permission_trains_to_its_end(store, folder, tiny):
    """Its last checkpoint is lost, so the run ends with an error that names the last good step."""
    program, prepared, whole, rows = tiny
    denied = Fault("(POST|DELETE) bucket/", 403)

    def revoke(request):
        if not store.faults and f"{folder.name}/checkpoints/4/commit.json" in store.buckets["bucket"]:
            store.faults.append(denied)

    store.before = revoke
    notices: list[str] = []
    with pytest.raises(CheckpointError) as ended:
        run(program, prepared, folder, notices)
    assert re.search(r"the checkpoint of step 8 was not written, .*; step 4 is the last good one", str(ended.value))
    assert any(re.search("save of step 6 failed: .*permission.*; last good step 4", n) for n in notices), notices
    assert any("metrics of step" in notice and "were not written" in notice for notice in notices), notices
    store.before = None
    store.faults.clear()  # the permission is back: the same command ends like the undisturbed run
    assert bits(run(program, prepared, folder).state) == whole
    assert train_rows(folder)[-4:] == rows[-4:]
    assert json.loads((folder / "checkpoints" / "8" / "commit.json").read_bytes())["body"]["step"] == STEPS
