"""Several real processes train as one, each with its part of the data; bad hosts are named."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data.config import DataConfig
from data.pipeline import train_batches
from data.prepare import prepare
from sharding.mesh import MeshConfig
from tests.data.conftest import byte_config, write_corpus
from tests.train.hosts_peer import HUNG_STEP, SLOW_SECONDS, recorded
from tests.train.small_runs import TINY, run
from train.config import Experiment, OptimizerConfig, TrainConfig
from train.config_io import save_json
from train.peer_watch import EXIT_PEER_LOST, REMEDY
from train.program import build
from train.records import read_metrics
from train.signals import EXIT_HUNG

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
STEPS, SAVED = 12, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("hosts")
    return byte_config(root, write_corpus(root / "large", 30), write_corpus(root / "small", 8))


def experiment(data: DataConfig, devices: int, **train: object) -> Experiment:
    """Return an experiment that compiles in a second; the processes, not the network, are tested here."""
    fields = dict(steps=STEPS, eval_every=0, checkpoint_every=SAVED, log_every=1) | train
    return Experiment(
        name="tiny",
        model=dataclasses.replace(TINY, num_layers=1),
        data=data,
        mesh=MeshConfig(fsdp=devices),
        optimizer=OptimizerConfig(learning_rate=0.01, schedule="inverse_sqrt", warmup_steps=3),
        train=TrainConfig(**fields),
    )


def train_on(count: int, e: Experiment, folder: Path, fault: str = "none") -> tuple[list[int], list[str]]:
    """Train in `count` processes with the devices of the mesh. Return their exit codes and outputs."""
    save_json(e, folder.with_suffix(".experiment.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    devices = e.mesh.fsdp // count
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.train.hosts_peer", address]
    peers = [
        subprocess.Popen(
            [*command, str(rank), str(count), str(folder), fault], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        outputs = [peer.communicate(timeout=400)[0] for peer in peers if fault != "stopped" or peer is not peers[1]]
    finally:
        for peer in peers:
            with peer:
                peer.kill()
    return [peer.returncode for peer in peers], outputs


@pytest.mark.slow
def test_a_lost_job_continues_with_one_and_with_four_processes(data, tmp_path):
    """The losses are those of one process throughout, and each process reads its rows of the same global batches."""
    e = experiment(data, devices=4)
    program, prepared = build(e, devices=jax.devices()[:4]), prepare(data)
    run(program, prepared, tmp_path / "whole")
    codes, outputs = train_on(2, e, tmp_path / "two", "killed")
    assert codes == [EXIT_PEER_LOST, -signal.SIGKILL], outputs
    last = outputs[0].strip().splitlines()[-1]
    assert last.startswith(f"error: process 1 (host {HOST}) of 2 was lost: ") and last.endswith(REMEDY), outputs
    for name in ("four", "one"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
    run(program, prepared, tmp_path / "one")
    codes, outputs = train_on(4, e, tmp_path / "four")
    assert codes == [0] * 4 and all(f"finished {STEPS}" in output for output in outputs), outputs
    assert not any("the clock of" in output for output in outputs), outputs
    whole = losses(tmp_path / "whole")
    for name in ("one", "four"):
        events = [row["message"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["kind"] == "event"]
        assert f"from step {SAVED}" in events
        found = losses(tmp_path / name)
        np.testing.assert_array_equal(found[:, 0], np.arange(1, STEPS + 1))
        np.testing.assert_allclose(found[:, 1], whole[:, 1], rtol=1e-5)  # losses
        np.testing.assert_allclose(found[:, 2], whole[:, 2], rtol=1e-4)  # gradient norms
    rows = data.batch_size // 4
    expected = windows_of_steps(data, SAVED, STEPS)
    for rank in range(4):
        path = tmp_path / f"four.reads-4-{rank}.json"
        reads = [tuple(each) for each in json.loads(path.read_text())]
        own = [each for step in expected for each in step[rank * rows : (rank + 1) * rows]]
        assert len(own) == (STEPS - SAVED) * rows
        # Before the stream moves to the checkpoint, it prefetches first batches, which it discards.
        assert contains(reads, own), (rank, reads, own)
        assert len(reads) <= len(own) + 2 * (data.prefetch + 2) * rows


def losses(folder: Path) -> np.ndarray:
    """Return (step, loss, gradient norm) for each step of a run, [steps, 3]."""
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    return np.array([[row[name] for name in ("step", "loss", "grad_norm")] for row in rows])


def contains(reads: list, own: list) -> bool:
    """Return whether `own` is a contiguous part of `reads`."""
    return any(reads[at : at + len(own)] == own for at in range(len(reads) - len(own) + 1))


def windows_of_steps(data, first: int, last: int) -> list[list[tuple[str, int]]]:
    """Return the windows of each global batch from step `first` to `last`, in the order of its rows."""
    prepared = recorded(prepare(data))
    with train_batches(prepared, data) as batches:
        found = []
        for step in range(first, last):
            begun = len(prepared.reads)
            batches.batch_at(step)
            found.append([(name, window) for _, name, window in prepared.reads[begun:]])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["data", "stopped"])
def test_a_slow_host_and_a_hung_host_are_named(data, tmp_path, fault):
    seconds = 5.0 if fault == "data" else 10.0  # of which six without a heartbeat are silence
    e = experiment(data, devices=2, checkpoint_every=1000, steps=1000, watchdog_seconds=seconds)
    codes, outputs = train_on(2, e, tmp_path / "run", fault)
    assert codes == ([EXIT_HUNG] * 2 if fault == "data" else [EXIT_HUNG, -signal.SIGKILL]), outputs
    name = rf"process 1 \(host {HOST}\)"
    if fault == "data":
        hang = rf"no step for 5 s; {name} last dispatched step {HUNG_STEP - 1} and has been reading its data for \d+ s"
        pattern = rf"{name} takes (0\.\d\d) s a step to read its data, the others 0\.\d\d s; all wait for it"
        warned = re.findall(f"^warning: {pattern}$", outputs[0], re.MULTILINE)
        assert len(warned) == 1 and SLOW_SECONDS <= float(warned[0]) < 2 * SLOW_SECONDS, outputs[0]
        events = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row.get("event") == "straggler"]
        assert len(events) == 1 and re.fullmatch(pattern, events[0]["message"])
    else:
        hang = rf"no step for 10 s; {name} sends no heartbeat, and last reported step \d; the others have come to "
    for output in outputs:
        last = output.strip().splitlines()[-1]
        assert re.search(hang, last) and last.endswith(REMEDY), output


@pytest.mark.slow
def test_a_device_that_turns_wrong_ends_every_process_of_a_run(data, tmp_path):
    e = experiment(data, devices=2, steps=1000)
    codes, outputs = train_on(2, e, tmp_path / "run", "wrong")
    assert codes[0] and codes[1] and codes != [EXIT_PEER_LOST] * 2, outputs
    assert re.search(
        rf"DeviceError: the devices differ after step {2 * SAVED}: process 0 \(host {HOST}\), device 0: computes "
        rf"\w{{8}}, and no majority of 2 agrees; process 1 \(host {HOST}\), device 0: computes 00000000, and no .*"
        rf"They agreed after step {SAVED}, so later checkpoints may be damaged",
        "".join(outputs),
    ), outputs
