"""Start processes that prepare data together (tests.data.preparing_peer)."""

import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from data.config import DataConfig

ROOT = Path(__file__).parents[2]


def start(folder: Path, configs: Sequence[DataConfig], scenarios: dict[int, str] | None = None, *before: str):
    """Start one process per config. `scenarios`: by process. `before`: a command that runs each process."""
    store = folder / "store"
    store.mkdir()
    peers = []
    for index, config in enumerate(configs):
        path = folder / f"config{index}"
        path.write_bytes(pickle.dumps(config))
        command = [*before, sys.executable, "-m", "tests.data.preparing_peer"]
        arguments = [str(index), str(len(configs)), str(store), str(path), (scenarios or {}).get(index, "")]
        peers.append(subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True))
    return peers


def results(peers: Sequence[subprocess.Popen], timeout: float = 60) -> list[dict]:
    """Wait for the processes and return each one's last line of output."""
    try:
        return [json.loads(peer.communicate(timeout=timeout)[0].splitlines()[-1]) for peer in peers]
    finally:
        for peer in peers:
            with peer:  # closes its pipe and waits for it
                peer.kill()
