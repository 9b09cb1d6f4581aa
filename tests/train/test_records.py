"""Run folders survive crashes, refuse to be shared, and their metrics read back as one timeline."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config_io import load_json
from train.records import (
    MetricsWriter,
    RunFolder,
    RunFolderError,
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


def test_a_new_folder_holds_its_config_and_is_free_again(tmp_path):
    with open_run(tmp_path / "runs" / "a", Config(rate=0.3), overrides=["rate=0.3"]) as run:
        assert json.loads(run.overrides.read_text()) == ["rate=0.3"]
        assert load_json(Config, run.config) == Config(rate=0.3)
        assert run.checkpoints.is_dir()
        with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} on .* since 2"):
            open_run(run.path, Config(rate=0.3)).__enter__()
    with open_run(run.path, Config(rate=0.3)):
        pass
    assert run.lock.read_text() == ""


def test_an_exception_inside_is_passed_on_and_frees_the_folder(tmp_path):
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


def test_a_live_job_keeps_its_folder_and_a_killed_one_gives_it_up(tmp_path):
    folder = tmp_path / "a"
    with subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError, match=f"in use by process {job.pid}"):
            open_run(folder, Config()).__enter__()
        job.send_signal(signal.SIGKILL)
        # Not waited for: a zombie still has its pid, but it is dead.
        while Path(f"/proc/{job.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        notices = []
        with open_run(folder, Config(), notice=notices.append):
            pass
        job.wait()
    assert len(notices) == 1 and f"process {job.pid}, dead" in notices[0]


@pytest.mark.parametrize(
    ("change", "taken_over"),
    [({"start": "1"}, True), ({"pid": 2**22 + 1}, True), ({"host": "elsewhere"}, False), ({}, False), (None, False)],
)
def test_who_may_take_over_a_lock(tmp_path, change, taken_over):
    """A reused pid and a dead one are taken over; another host, a live process and a garbled lock are not."""
    with open_run(tmp_path, Config()) as run:
        holder = json.loads(run.lock.read_text())
    run.lock.write_text("garbage" if change is None else json.dumps(holder | change))
    notices = []
    if taken_over:
        with open_run(tmp_path, Config(), notice=notices.append):
            assert json.loads(run.lock.read_text())["pid"] == os.getpid()
        assert len(notices) == 1
    else:
        with pytest.raises(RunFolderError, match=r"in use .* delete .*\.lock"):
            open_run(tmp_path, Config()).__enter__()


def test_another_config_is_refused_with_its_difference_unless_accepted(tmp_path):
    with open_run(tmp_path, Config()):
        pass
    with pytest.raises(RunFolderError, match=r"rate: 0\.1 -> 0\.2.*--run NEWNAME.*--override"):
        open_run(tmp_path, Config(steps=11, rate=0.2), may_differ={"steps"}.__contains__).__enter__()
    assert load_json(Config, tmp_path / "config.json") == Config()
    notices = []
    with open_run(tmp_path, Config(steps=11), may_differ={"steps"}.__contains__, notice=notices.append):
        pass
    with open_run(tmp_path, Config(steps=11, rate=0.2), override=True, notice=notices.append) as run:
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


def test_environment_says_what_ran_and_keeps_earlier_starts(tmp_path):
    run = RunFolder(tmp_path)
    first = describe_environment()
    assert first["packages"]["jax"] and first["devices"] and first["process_count"] == 1
    assert first["python"].startswith("3.")
    for i in range(3):
        write_environment(run, {**first, "start_time": i})
    written = json.loads(run.environment.read_text())
    assert written["start_time"] == 2 and [e["start_time"] for e in written["earlier"]] == [1, 0]
    assert written["command"] == sys.argv


# ---- metrics ----


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


def test_nonfinite_numbers_leave_valid_json_and_a_name(tmp_path):
    row = {"kind": "train", "step": 1, "loss": np.float32("nan"), "norm": float("-inf"), "x": [1.0, float("inf")]}
    (back,) = rows_of(tmp_path, row)
    assert back["loss"] is None and back["norm"] is None and back["x"] == [1.0, None]
    assert back["nonfinite"] == {"loss": "nan", "norm": "-inf", "x": "inf"}
    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))


@given(cut=st.integers(0, 200), more=st.integers(0, 3))
def test_any_prefix_of_the_file_reads_as_its_whole_lines_and_can_be_continued(tmp_path_factory, cut, more):
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
def test_a_resumed_run_reads_as_if_it_had_never_stopped(tmp_path_factory, sessions):
    """Each session resumes at a step not beyond the last, overwrites, runs on; the reader sees one timeline."""
    run, now, truth, events = RunFolder(tmp_path_factory.mktemp("run")), 0, {}, 0
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
    assert run.finished == bool(sessions)


def test_rows_written_twice_keep_the_last_and_two_events_of_one_step_stay(tmp_path):
    event = {"kind": "event", "step": 1, "event": "stopped"}
    rows = rows_of(tmp_path, {"kind": "train", "step": 1, "x": 1}, event, event, {"kind": "train", "step": 1, "x": 2})
    assert [(r["kind"], r.get("x")) for r in rows] == [("event", None), ("event", None), ("train", 2)]


def test_other_processes_write_nothing(tmp_path):
    with MetricsWriter(RunFolder(tmp_path), process_index=1, sinks=["wandb"]) as writer:
        writer.write({"kind": "train", "step": 1})
    assert list(tmp_path.iterdir()) == []


def test_sinks_get_the_scalars_and_a_missing_one_is_named(tmp_path, monkeypatch):
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
    with pytest.raises(RunFolderError, match=r"'wandb' was asked for .* pip install wandb"):
        MetricsWriter(RunFolder(tmp_path), sinks=["wandb"])
    with pytest.raises(RunFolderError, match="'tensorbord' is unknown"):
        MetricsWriter(RunFolder(tmp_path), sinks=["tensorbord"])


def test_samples_are_replaced_whole(tmp_path):
    run = RunFolder(tmp_path)
    for text in ("a\nb", "ü"):
        write_samples(run, [{"prompt": text, "completion": "", "reference": "", "file": "f.py"}] * 3)
    assert [json.loads(line)["prompt"] for line in run.samples.read_text().splitlines()] == ["ü"] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["samples.jsonl"]
