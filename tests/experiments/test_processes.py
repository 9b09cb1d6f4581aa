"""Processes under jax.distributed prepare data once, through their shared key-value store."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from data.config import SourceConfig
from tests.data.conftest import byte_config, write_corpus

ROOT = Path(__file__).parents[2]
PEER = """
import dataclasses, json, os, pickle, sys, time
import jax
from data.config import DataError
from data.prepare import prepare
from experiments import processes as processes_module
from experiments.processes import agree, agree_on_code, agree_on_devices, all_processes, barrier, compare_clocks
from train.config_io import ConfigError
from train.device_check import DeviceError, measure

jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
for path in sys.argv[3:]:
    lines = []
    try:
        processes = all_processes(poll_seconds=0.05)  # several polls in one wait
        found = prepare(pickle.loads(open(path, "rb").read()), lines.append, processes=processes).identity
    except DataError as error:
        found = str(error)
    print(json.dumps([found, lines]), flush=True)
barrier()
for digest in ("0123456789abcdef", sys.argv[2] * 16):
    try:
        agree(digest, "were started with different configs", "start every one with the same --set")
        found = "agreed"
    except ConfigError as error:
        found = str(error)
    print(json.dumps([found, []]), flush=True)
for versions in (("same", "same"), ("first", "second")):
    processes_module.code_version = lambda: versions[int(sys.argv[2])]
    try:
        agree_on_code()
        found = "same code"
    except ConfigError as error:
        found = str(error)
    print(json.dumps([found, []]), flush=True)
def damaged():
    return [dataclasses.replace(each, checksum="0000" + sys.argv[2] * 4) for each in measure()]
for readings in (measure, damaged):
    lines = []
    try:
        agree_on_devices(lines.append, readings)
        found = "same bits"
    except DeviceError as error:
        found = str(error)
    print(json.dumps([found, lines]), flush=True)
for ahead in (0.0, 60.0):
    lines = []
    compare_clocks(lines.append, lambda: time.time() + ahead * int(sys.argv[2]))
    print(json.dumps(["clocks", lines]), flush=True)
jax.distributed.shutdown()
"""


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_processes_with_different_configs_are_refused(tmp_path):
    """Through the command line, before any data is read."""
    address = free_address()
    peers = [
        subprocess.Popen(
            [sys.executable, "-m", "experiments", "train", "smoke", "--run", str(tmp_path / "run"), "--distributed"]
            + ["--set", f"train.seed={rank}"],
            cwd=ROOT,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(rank), "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
            },
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        errors = [peer.communicate(timeout=150)[1] for peer in peers]
    finally:
        for peer in peers:
            with peer:
                peer.kill()
    assert [peer.returncode for peer in peers] == [1, 1], errors
    assert all("error: the processes were started with different configs" in error for error in errors), errors
    assert not any("Traceback" in error for error in errors), errors


def test_one_process_prepares_data_and_shares_its_error(tmp_path):
    (tmp_path / "empty").mkdir()
    configs = {
        "good": byte_config(tmp_path, write_corpus(tmp_path / "s", 6)),
        "empty": byte_config(tmp_path, SourceConfig(name="none", path=str(tmp_path / "empty"))),
    }
    for name, config in configs.items():
        (tmp_path / name).with_suffix(".pickle").write_bytes(pickle.dumps(config))
    address = free_address()
    paths = [str((tmp_path / name).with_suffix(".pickle")) for name in configs]
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", PEER, address, str(rank), *paths],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [peer.communicate(timeout=200)[0] for peer in peers]
    finally:
        for peer in peers:
            with peer:
                peer.kill()
    host = socket.gethostname()
    (first, error, *compared), (waited, other, *also) = (
        list(map(json.loads, output.splitlines())) for output in outputs
    )
    assert compared == also
    *compared, same_bits, other_bits, same_clocks, other_clocks = compared
    assert same_bits == ["same bits", []] and same_clocks == ["clocks", []]
    assert other_bits[0].startswith(
        f"process 0 (host {host}), device 0: computes 00000000, and no majority of 2 agrees; process 1 (host {host}), "
        "device 0: computes 00001111, and no majority of 2 agrees. Take the host out of the job"
    )
    assert re.match(rf"warning: the clock of process 1 \(host {host}\) is (59|60)\.\d s ahead of", other_clocks[1][0])
    assert first[0] == waited[0] and len(first[1]) == 2 and len(waited[1]) == 1
    assert waited[1][0].startswith("process 0 prepares the data")
    assert "source 'none' is empty" in error[0]
    assert other[0] == f"process 0 failed while preparing the data: {error[0]}"
    assert [text for text, _ in compared] == [
        "agreed",
        "the processes were started with different configs (hashes 00000000, 11111111 by process); "
        "start every one with the same --set",
        "same code",
        f"the processes run different versions of the code (process 0 on {host}: first; process 1 on {host}: "
        "second); check out the same commit on every host, and install the same packages",
    ]
