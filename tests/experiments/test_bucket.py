"""The command line on runs in a bucket: refusals before anything is compiled, and a run that moves between machines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments.resolve import resolve
from tests.experiments.command_line import call, printed_bits, refusal, tiny_overrides, write_folder
from tests.fake_bucket import use_fake_bucket
from tests.gcs_server import Fault, client_environment, free_port
from train.records import MetricsWriter, RunFolder, describe_environment, open_run, read_metrics, write_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    store = use_fake_bucket()
    store.buckets.setdefault(tmp_path.name.replace("_", "-"), {})
    yield store
    store.faults.clear()
    store.before = None
    assert store.unknown == []


@pytest.fixture
def bucket(store, tmp_path):
    """A bucket that this process has not asked yet."""
    return tmp_path.name.replace("_", "-")


@pytest.fixture
def no_compilation(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("compiled, or prepared data, before the bucket was checked")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    monkeypatch.setattr("experiments.run.prepare", refuse)
    monkeypatch.setattr("experiments.run.build", refuse)


# ---- refusals ----


@pytest.mark.parametrize("command", ["train smoke --run", "eval", "report"])
def test_a_bucket_that_does_not_exist_is_named(store, no_compilation, capsys, command):
    message = refusal(capsys, *command.split(), "gs://absent-bucket/run")
    assert "'gs://absent-bucket/run': the bucket does not exist; check its name" in message


@pytest.mark.parametrize("command", ["train smoke --run", "eval"])
def test_a_bucket_that_may_not_be_read_is_named(store, bucket, no_compilation, capsys, command):
    store.faults.append(Fault(f" {bucket}/", 403))
    message = refusal(capsys, *command.split(), f"gs://{bucket}/run")
    assert f"gs://{bucket}/run" in message and "permission denied" in message and "Storage Object User" in message


def test_a_bucket_that_may_not_be_written_is_named_before_training(store, bucket, no_compilation, capsys):
    store.faults.append(Fault(f"(POST|PUT|DELETE) {bucket}/", 403))
    message = refusal(capsys, "train", "smoke", "--run", f"gs://{bucket}/run")
    assert f"run folder gs://{bucket}/run cannot be written" in message and "permission denied" in message
    assert store.buckets[bucket] == {}


def test_a_bucket_whose_objects_may_not_be_replaced_is_named_before_training(store, bucket, no_compilation, capsys):
    """The role Storage Object Creator: a heartbeat could not be written."""

    def protect(request):
        if not store.faults and f"POST {bucket}/run/.lock" in store.requests:
            store.faults.append(Fault(rf"POST {bucket}/run/\.lock", 403))

    store.before = protect
    message = refusal(capsys, "train", "smoke", "--run", f"gs://{bucket}/run")
    assert f"run folder gs://{bucket}/run cannot be written" in message and "permission denied" in message


@pytest.mark.parametrize("command", ["train smoke --run", "generate --prompt x"])
def test_a_bucket_that_cannot_be_reached_is_an_error_within_seconds(
    store, bucket, no_compilation, capsys, monkeypatch, command
):
    for name, value in client_environment(free_port()).items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    message = refusal(capsys, *command.split(), f"gs://{bucket}/run")
    assert time.monotonic() - began < 20
    assert f"'gs://{bucket}/run': the bucket cannot be reached" in message and "check the network" in message


def test_a_failure_in_the_middle_of_a_command_is_one_paragraph(store, bucket, capsys):
    with open_run(f"gs://{bucket}/run", resolve("smoke", ["data.tokenizer.kind=byte"], 1)) as run:
        write_environment(run, describe_environment())
    store.faults.append(Fault(rf"GET {bucket}/run/environment", 401))
    assert "permission denied" in refusal(capsys, "report", f"gs://{bucket}/run")
    store.faults[:] = [Fault(f"POST {bucket}/run/report.html", 403)]
    assert "report.html cannot be written" in refusal(capsys, "report", f"gs://{bucket}/run")


def test_a_run_of_newer_code_is_refused_with_the_name_of_that_code(store, bucket, no_compilation, capsys):
    path = f"gs://{bucket}/run"
    with open_run(path, resolve("smoke", ["data.tokenizer.kind=byte"], 1)) as run, MetricsWriter(run) as metrics:
        metrics.write({"kind": "train", "step": 1, "loss": 1.0})
        packages = {"meshwork": "9.0.0", "jax": "0.99"}
        write_environment(run, describe_environment() | {"git_commit": "0123456789abcdef", "packages": packages})
    config = json.loads(run.config.read_bytes())
    config["model"]["ternary"] = True
    run.config.write_text(json.dumps(config))
    again = ["train", "smoke", "--set", "data.tokenizer.kind=byte", "--run", path]
    for command in (["eval", path], ["train", path], again):
        message = refusal(capsys, *command)
        assert "unknown field 'model.ternary'" in message
        assert "last written by meshwork 9.0.0, jax 0.99, commit 0123456789ab; this code is meshwork" in message


# ---- a run that moves ----


def start(folder: Path, *arguments: object) -> subprocess.Popen:
    """Start a command on a machine whose home, caches and working folder are `folder`."""
    folder.mkdir(exist_ok=True)
    flags = "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *map(str, arguments)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(folder), "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses(path: str) -> list[tuple]:
    rows = read_metrics(RunFolder(path).metrics)
    return [tuple(row[name] for name in ("step", "loss", "grad_norm")) for row in rows if row["kind"] == "train"]


def checksums(path: str, step: int) -> dict:
    return json.loads((RunFolder(path).checkpoints / str(step) / "commit.json").read_bytes())["body"]["leaves"]


@pytest.mark.slow
def test_a_run_killed_in_a_save_continues_on_another_machine_bit_for_bit(store, tmp_path, capsys):
    corpus = write_folder(tmp_path / "corpus")
    whole, moved = (f"gs://bucket/{tmp_path.name}/{name}" for name in ("whole", "moved"))

    def train(machine: str, run: str) -> subprocess.Popen:
        folder = tmp_path / machine
        more = ("train.checkpoint_every=4", "train.log_every=1", "train.eval_every=100", "samples.count=0")
        settings = [argument for setting in more for argument in ("--set", setting)]
        return start(folder, "train", "smoke", "--run", run, *tiny_overrides(folder, corpus), *settings)

    with train("vm1", whole) as job:
        assert job.wait(timeout=300) == 0, job.stderr.read()
    with train("vm1", moved) as job:
        # Kill the job when half of a step is in the bucket.
        half = f"POST bucket/{tmp_path.name}/moved/checkpoints/8/ocdbt.process_0/manifest.ocdbt"
        store.before = lambda request: job.send_signal(signal.SIGKILL) if request.startswith(half) else None
        assert job.wait(timeout=300) == -signal.SIGKILL, job.stderr.read()
    store.before = None
    left = [name for name in store.buckets["bucket"] if name.startswith(f"{tmp_path.name}/moved/checkpoints/")]
    assert any("/8/" in name for name in left) and not any("/8/commit.json" in name for name in left)
    with train("vm2", moved) as job:
        out, err = job.communicate(timeout=300)
        assert job.returncode == 0, err
    assert "resuming from step 4" in out and "took over the lock" in out
    assert losses(moved) == losses(whole) and len(losses(whole)) == 12
    assert checksums(moved, 12) == checksums(whole, 12)
    assert list(tmp_path.rglob("checkpoints")) == [] and (tmp_path / "vm2" / "cache").is_dir()

    code, out, err = call(capsys, "eval", moved)
    assert code == 0 and re.search("weights of step 12", out), err
    final = next(row for row in read_metrics(RunFolder(moved).metrics) if row["kind"] == "final")
    assert printed_bits(out) == pytest.approx(final["sets"]["folder"]["bits_per_byte"], abs=2e-4)
    code, out, err = call(capsys, "generate", moved, "--prompt", "def ", "--max-new-tokens", 4)
    assert code == 0 and "[4 tokens, finished by length]" in out, err
    code, out, err = call(capsys, "report", moved)
    assert code == 0 and out.splitlines()[-1] == f"{moved}/report.html" and RunFolder(moved).report.exists(), err
    code, out, err = call(capsys, "compare", moved, whole, "--to", tmp_path / "page.html")
    assert code == 0 and "moved" in (tmp_path / "page.html").read_text(), err
