"""Run folders survive crashes and refuse a second writer, and their metrics read back as one timeline."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fake_bucket import use_fake_bucket
from tests.gcs_server import Fault
from train.config_io import load_json
from train.records import (
    MetricsWriter,
    RunFolder,
    RunFolderError,
    code_version,
    describe_environment,
    open_run,
    read_metrics,
    write_environment,
    write_samples,
)


@dataclass(frozen=True)
class Config:
    steps: int = 10
    rate: float = 0.1


def test_a_new_folder_holds_its_config_and_is_released(tmp_path):
    with open_run(tmp_path / "runs" / "a", Config(rate=0.3), overrides=["rate=0.3"]) as run:
        assert json.loads(run.overrides.read_text()) == ["rate=0.3"]
        assert load_json(Config, run.config) == Config(rate=0.3)
        assert run.checkpoints.is_dir()
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on .* since 2"):
            open_run(run.path, Config(rate=0.3)).__enter__()
    with open_run(run.path, Config(rate=0.3)):
        pass
    assert run.lock.read_text() == ""


def test_an_exception_propagates_and_releases_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError), open_run(tmp_path / "a", Config()) as run:
        (run.path / "missing").read_text()
    assert run.lock.read_text() == ""


HOLDER = """
import sys, time
from pathlib import Path
from tests.train.test_records import Config
from train.records import open_run
with open_run(Path(sys.argv[1]), Config()):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="zombies are recognized by Linux's /proc")
def test_a_live_job_keeps_its_folder_and_a_killed_one_loses_it(tmp_path):
    folder = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"in use by process {job.pid}"):
            open_run(folder, Config()).__enter__()
        job.send_signal(signal.SIGKILL)
        # The job is not reaped: a zombie still has its pid, but it is dead.
        while Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        notices = []
        with open_run(folder, Config(), log=notices.append):
            pass
        job.wait()
    assert len(notices) == 1 and f"process {job.pid} on " in notices[0] and "dead on this host" in notices[0]


def test_an_untrained_folder_accepts_another_config(tmp_path):
    """A start that failed later, for example on a wrong path, does not claim the name."""
    with open_run(tmp_path, Config()):
        pass
    with open_run(tmp_path, Config(rate=0.2)) as run:
        assert not run.begun and load_json(Config, run.config) == Config(rate=0.2)
        begin(run)
    with pytest.raises(RunFolderError, match="belongs to another config"):
        open_run(tmp_path, Config()).__enter__()


def begin(run):
    with MetricsWriter(run) as metrics:
        metrics.write({"kind": "event", "step": 0, "event": "started"})


def test_a_changed_config_is_refused_unless_overridden(tmp_path):
    with open_run(tmp_path, Config()) as run:
        begin(run)
    with pytest.raises(RunFolderError, match=r"rate: 0\.1 -> 0\.2.*--run NEWNAME.*--override"):
        open_run(tmp_path, Config(steps=11, rate=0.2), may_differ={"steps"}.__contains__).__enter__()
    assert load_json(Config, tmp_path / "config.json") == Config()
    notices = []
    with open_run(tmp_path, Config(steps=11), may_differ={"steps"}.__contains__, log=notices.append):
        pass
    with open_run(tmp_path, Config(steps=11, rate=0.2), override=True, log=notices.append) as run:
        pass
    assert notices == ["config changed: steps: 10 -> 11", "config changed: rate: 0.1 -> 0.2"]
    assert load_json(Config, run.config) == Config(11, 0.2)
    run.config.write_text('{"steps": ')
    with pytest.raises(RunFolderError, match="cannot read"):
        open_run(tmp_path, Config()).__enter__()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"file.* cannot be written .*--run"):
        open_run(tmp_path / "file", Config()).__enter__()


def test_environment_records_this_start_and_keeps_earlier_ones(tmp_path):
    run = RunFolder(tmp_path)
    first = describe_environment()
    assert first["packages"]["jax"] and first["devices"] and first["process_count"] == 1
    assert first["python"].startswith("3.")
    for i in range(3):
        write_environment(run, {**first, "start_time": i})
    written = json.loads(run.environment.read_text())
    assert written["start_time"] == 2 and [e["start_time"] for e in written["earlier"]] == [1, 0]
    assert written["command"] == sys.argv


@pytest.mark.parametrize(("value", "recorded"), [(None, None), ("2", 2), ("two", None)])
def test_environment_records_how_often_the_launcher_restarted_the_job(monkeypatch, value, recorded):
    monkeypatch.delenv("MESHWORK_RESTART", raising=False)
    if value is not None:
        monkeypatch.setenv("MESHWORK_RESTART", value)
    assert describe_environment()["restart"] == recorded


def test_the_version_of_the_code_changes_with_any_source_file(tmp_path):
    files = [tmp_path / "train" / "a.py", tmp_path / "model" / "deep" / "b.py"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("x = 1\n")
    before = code_version(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert code_version(tmp_path) == before and "jax 0." in before and "commit " in before
    for change in (lambda: files[1].write_text("x = 2\n"), lambda: files[0].rename(tmp_path / "train" / "c.py")):
        last = code_version(tmp_path)
        change()
        assert code_version(tmp_path) != last


# ---- metrics ----


def commit(run, step):
    (run.checkpoints / str(step)).mkdir(parents=True, exist_ok=True)
    (run.checkpoints / str(step) / "commit.json").write_text("{}")


def rows_of(tmp_path, *rows):
    run = RunFolder(tmp_path)
    with MetricsWriter(run) as writer:
        for row in rows:
            writer.write(row)
    return read_metrics(run.metrics)


def test_arrays_become_numbers_and_lists(tmp_path):
    load = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
    row = {"kind": "train", "step": np.int64(3), "loss": jnp.float32(1.5), "lr": jnp.bfloat16(0.5), "expert_load": load}
    (back,) = rows_of(tmp_path, row)
    assert abs(back.pop("time") - time.time()) < 60
    assert back == {"kind": "train", "step": 3, "loss": 1.5, "lr": 0.5, "expert_load": load.tolist()}
    with pytest.raises(TypeError, match="thing is a object"):
        rows_of(tmp_path, {"kind": "train", "step": 0, "thing": object()})


def test_nonfinite_numbers_become_null_and_are_named(tmp_path):
    row = {"kind": "train", "step": 1, "loss": np.float32("nan"), "norm": float("-inf"), "x": [1.0, float("inf")]}
    (back,) = rows_of(tmp_path, row)
    assert back["loss"] is None and back["norm"] is None and back["x"] == [1.0, None]
    assert back["nonfinite"] == {"loss": "nan", "norm": "-inf", "x": "inf"}
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


@given(cut=st.integers(0, 200), more=st.integers(0, 3))
def test_a_truncated_file_keeps_its_whole_lines_and_can_be_continued(tmp_path_factory, cut, more):
    run = RunFolder(tmp_path_factory.mktemp("run"))
    with MetricsWriter(run) as writer:
        for step in range(3):
            writer.write({"kind": "train", "step": step, "time": 0, "loss": step / 7})
    whole = run.metrics.read_bytes()
    torn = whole[: len(whole) - min(cut, len(whole))]
    run.metrics.write_bytes(torn)
    steps = [row["step"] for row in read_metrics(run.metrics)]
    assert steps in (list(range(torn.count(b"\n"))), list(range(torn.count(b"\n") + 1)))
    with MetricsWriter(run) as writer:
        for step in range(10, 10 + more):
            writer.write({"kind": "train", "step": step})
    assert [row["step"] for row in read_metrics(run.metrics)] == [*steps, *range(10, 10 + more)]


def test_damage_in_the_middle_is_named(tmp_path):
    rows_of(tmp_path, {"kind": "train", "step": 0}, {"kind": "train", "step": 1})
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"train"', b'"tra\xff', 1))
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 1: not a metrics row"):
        read_metrics(path)


def test_a_full_disk_leaves_no_partial_line(tmp_path, monkeypatch):
    run = RunFolder(tmp_path)
    with MetricsWriter(run) as writer:
        writer.write({"kind": "train", "step": 0})
        write = os.write

        def full(file, data):
            if len(data) > 10:
                return write(file, data[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            writer.write({"kind": "train", "step": 1})
        monkeypatch.undo()
        writer.write({"kind": "train", "step": 2})
    assert [row["step"] for row in read_metrics(run.metrics)] == [0, 2]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=5))
def test_metrics_of_a_resumed_run_read_as_one_timeline(tmp_path_factory, sessions):
    """Each session resumes at or before the last step and overwrites later rows; the reader returns one timeline."""
    run, now, truth, events = RunFolder(tmp_path_factory.mktemp("run")), 0, {}, 0
    run.checkpoints.mkdir()
    with MetricsWriter(run) as writer:
        for number, (back, forward) in enumerate(sessions):
            now = max(0, now - back)
            writer.write({"kind": "event", "event": "resumed", "step": now})
            truth = {k: v for k, v in truth.items() if k[1] <= now and k[0] != "final"}
            events += 1
            for step in range(now + 1, now + forward + 1):
                writer.write({"kind": "train", "step": step, "session": number})
                writer.write({"kind": "eval", "step": step, "set": "a", "session": number})
                writer.write({"kind": "eval", "step": step, "set": "b", "session": number})
                truth |= {(kind, step, name): number for kind, name in (("train", None), ("eval", "a"), ("eval", "b"))}
            now += forward
            writer.write({"kind": "final", "step": now, "session": number})
            truth["final", now, None] = number
    rows = read_metrics(run.metrics)
    kept = {(r["kind"], r["step"], r.get("set")): r["session"] for r in rows if r["kind"] != "event"}
    assert kept == truth
    assert sum(r["kind"] == "event" for r in rows) == events
    steps = [r["step"] for r in rows if r["kind"] == "train"]
    assert steps == sorted(set(steps))
    assert not run.finished  # its last checkpoint is missing
    commit(run, now - 1)
    assert not run.finished
    commit(run, now)
    assert run.finished == bool(sessions)


def test_repeated_rows_keep_the_last_and_all_events_stay(tmp_path):
    event = {"kind": "event", "step": 1, "event": "stopped"}
    rows = rows_of(tmp_path, {"kind": "train", "step": 1, "x": 1}, event, event, {"kind": "train", "step": 1, "x": 2})
    assert [(r["kind"], r.get("x")) for r in rows] == [("event", None), ("event", None), ("train", 2)]


def test_threads_write_whole_rows_even_on_a_full_disk(tmp_path, monkeypatch):
    """The thread of a checkpoint warns while the loop writes, and each write of the thread finds a full disk."""
    run, write = RunFolder(tmp_path), os.write
    failing = threading.local()

    def full_for_one(file, data):
        if not getattr(failing, "full", False) or len(data) > 40:
            return write(file, data[:40])
        time.sleep(0.001)  # lets the other thread run
        raise OSError(28, "No space left on device")

    def fail(writer):
        failing.full = True
        for step in range(100):
            with pytest.raises(OSError, match="No space left"):
                writer.write({"kind": "event", "step": step})

    monkeypatch.setattr(os, "write", full_for_one)
    with MetricsWriter(run) as writer:
        thread = threading.Thread(target=fail, args=(writer,))
        thread.start()
        for step in range(300):
            writer.write({"kind": "train", "step": step, "text": "x" * 50})
        thread.join()
    monkeypatch.undo()
    assert [row["step"] for row in read_metrics(run.metrics)] == list(range(300))


def test_a_bucket_receives_events_at_once_and_rows_periodically(tmp_path):
    use_fake_bucket()
    run = RunFolder(f"gs://bucket/{tmp_path.name}")
    with MetricsWriter(run, rewrite_seconds=3600) as writer:
        writer.write({"kind": "train", "step": 1})
        assert not run.metrics.exists()
        writer.write({"kind": "event", "step": 1, "event": "warning"})
        assert [row["kind"] for row in read_metrics(run.metrics)] == ["train", "event"]
        writer.write({"kind": "train", "step": 2})
    assert len(read_metrics(run.metrics)) == 3
    run.metrics.write_bytes(run.metrics.read_bytes()[:-5])  # a truncated line, as another tool may leave
    with MetricsWriter(run, rewrite_seconds=0.02) as writer:
        writer.write({"kind": "train", "step": 3})
        deadline = time.monotonic() + 10
        while len(read_metrics(run.metrics)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [row["step"] for row in read_metrics(run.metrics)] == [1, 1, 3]


def test_a_failed_upload_is_reported_and_repeated(tmp_path):
    store = use_fake_bucket()
    run = RunFolder(f"gs://bucket/{tmp_path.name}")
    store.faults.append(denied := Fault(f"POST bucket/{tmp_path.name}", 403))
    with MetricsWriter(run, rewrite_seconds=3600) as writer:
        with pytest.raises(OSError, match="was not uploaded"):
            writer.write({"kind": "event", "step": 1})
        store.faults.remove(denied)
        writer.write({"kind": "event", "step": 2})
    assert [row["step"] for row in read_metrics(run.metrics)] == [1, 2]
    with pytest.raises(OSError, match="was not uploaded"), MetricsWriter(run, rewrite_seconds=3600) as writer:
        writer.write({"kind": "train", "step": 3})
        store.faults.append(denied)
    store.faults.remove(denied)


def test_a_run_in_a_bucket_can_be_reopened(tmp_path):
    use_fake_bucket()
    path = f"gs://bucket/{tmp_path.name}/runs/a"
    for _ in range(2):
        with open_run(path, Config(rate=0.3), overrides=["rate=0.3"]) as run:
            assert load_json(Config, run.config) == Config(rate=0.3)
            write_samples(run, [{"prompt": "a", "completion": "", "reference": "", "file": "f.py"}])
            write_environment(run, {"start_time": 1})
            with MetricsWriter(run) as writer:
                writer.write({"kind": "train", "step": 1})
    assert len(json.loads(run.environment.read_bytes())["earlier"]) == 1
    assert [row["step"] for row in read_metrics(run.metrics)] == [1] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x" * 300, "300 bytes, but file systems allow at most 255"),
        ("s3://b/a", "not s3://"),
        ("a\0b", "not a valid file name"),
    ],
)
def test_a_path_that_cannot_name_a_run_is_refused(tmp_path, monkeypatch, path, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunFolderError, match=f"run = .*{words}"):
        open_run(path, Config()).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_recorded_steps_without_a_checkpoint_give_a_warning(tmp_path):
    with open_run(tmp_path, Config()) as run, MetricsWriter(run) as writer:
        writer.write({"kind": "train", "step": 40})
    commit(run, 40)
    notices: list[str] = []
    with open_run(tmp_path, Config(), log=notices.append):
        pass
    assert notices == []
    shutil.rmtree(run.checkpoints)
    with open_run(tmp_path, Config(), log=notices.append):
        pass
    assert len(notices) == 1 and "records steps up to 40" in notices[0] and "starts at step 0" in notices[0]


@pytest.mark.parametrize("content", ["[]", "3", '{"earlier": 3}', '"text"', "{", "[" * 100_000, b"\xff"])
def test_a_malformed_environment_is_named(tmp_path, content):
    run = RunFolder(tmp_path)
    run.environment.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunFolderError, match=r"environment\.json: not an environment .* delete it"):
        write_environment(run, {"start_time": 1})


@pytest.mark.parametrize(
    "line",
    ["[1]", "3", '{"kind": []}', '{"kind": "train", "step": {}}', '{"kind": "event", "event": "resumed"}', "[" * 9999],
)
def test_a_malformed_line_is_named(tmp_path, line):
    rows_of(tmp_path, {"kind": "train", "step": 0})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + line + "\n" + path.read_text())
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl, line 2: not a metrics row"):
        read_metrics(path)


def test_runs_of_the_same_name_have_different_lasting_ids(tmp_path, monkeypatch):
    """Weights & Biases merges runs with the same id, and folders of the same name in two places are two runs."""
    seen = []

    class Module:
        @staticmethod
        def init(**fields):
            seen.append(fields)

            class Job:
                log = staticmethod(lambda row, step: None)
                finish = staticmethod(lambda: None)

            return Job

    monkeypatch.setitem(sys.modules, "wandb", Module)
    for place in ("a", "b", "a"):
        run = RunFolder(tmp_path / place / "smoke")
        run.path.mkdir(parents=True, exist_ok=True)
        with MetricsWriter(run, sinks=["wandb"]):
            pass
    first, second, again = (fields["id"] for fields in seen)
    assert first == again != second and {fields["name"] for fields in seen} == {"smoke"}
    run.wandb_id.write_text("../x\n")
    with pytest.raises(RunFolderError, match="not a Weights & Biases id"):
        MetricsWriter(run, sinks=["wandb"])


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(RunFolder(tmp_path), process_index=1, sinks=["wandb"]) as writer:
        writer.write({"kind": "train", "step": 1})
    assert list(tmp_path.iterdir()) == []


def test_sinks_receive_scalars_and_a_missing_one_is_named(tmp_path, monkeypatch):
    seen = []

    class Module:
        class SummaryWriter:
            def __init__(self, logdir):
                seen.append(logdir)

            def add_scalar(self, key, value, step, walltime):
                seen.append((key, value, step, walltime))

            def close(self):
                seen.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboardX", Module)
    with MetricsWriter(RunFolder(tmp_path), sinks=["tensorboard"]) as writer:
        writer.write({"kind": "eval", "set": "s", "step": 4, "time": 5.0, "loss": 2.0, "expert_load": [[1.0]]})
    assert seen == [str(tmp_path / "tensorboard"), ("eval/s/loss", 2.0, 4, 5.0), "closed"]

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RunFolderError, match=r"train.sinks = 'wandb': .* pip install wandb"):
        MetricsWriter(RunFolder(tmp_path), sinks=["wandb"])
    with pytest.raises(RunFolderError, match="'tensorbord': unknown sink"):
        MetricsWriter(RunFolder(tmp_path), sinks=["tensorbord"])


def test_samples_are_replaced(tmp_path):
    run = RunFolder(tmp_path)
    for text in ("a\nb", "ü"):
        write_samples(run, [{"prompt": text, "completion": "", "reference": "", "file": "f.py"}] * 3)
    assert [json.loads(line)["prompt"] for line in run.samples.read_text().splitlines()] == ["ü"] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]
