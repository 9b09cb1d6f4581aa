"""Processes under jax.distributed prepare data once, through the key-value store that they share."""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

from data.config import SourceConfig
from tests.data.conftest import byte_config, write_corpus

ROOT = Path(__file__).parents[2]
PEER = """
import json, os, pickle, sys
import jax
from data.config import DataError
from data.prepare import prepare
from experiments.processes import all_processes

jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
for path in sys.argv[3:]:
    lines = []
    try:
        processes = all_processes(poll_seconds=0.05)  # several polls in one wait
        found = prepare(pickle.loads(open(path, "rb").read()), lines.append, processes=processes).identity
    except DataError as error:
        found = str(error)
    print(json.dumps([found, lines]), flush=True)
jax.distributed.shutdown()
"""


def test_one_process_prepares_and_its_error_is_the_others(tmp_path):
    (tmp_path / "empty").mkdir()
    configs = {
        "good": byte_config(tmp_path, write_corpus(tmp_path / "s", 6)),
        "empty": byte_config(tmp_path, SourceConfig(name="none", path=str(tmp_path / "empty"))),
    }
    for name, config in configs.items():
        (tmp_path / name).with_suffix(".pickle").write_bytes(pickle.dumps(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
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
        outputs = [peer.communicate(timeout=60)[0] for peer in peers]
    finally:
        for peer in peers:
            with peer:
                peer.kill()
    (first, error), (waited, other) = (list(map(json.loads, output.splitlines())) for output in outputs)
    assert first[0] == waited[0] and len(first[1]) == 2 and len(waited[1]) == 1
    assert waited[1][0].startswith("process 0 prepares the data")
    assert "source 'none' is empty" in error[0]
    assert other[0] == f"process 0 failed while it prepared the data: {error[0]}"
