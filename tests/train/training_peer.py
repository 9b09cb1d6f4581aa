"""A program, started by test_loop, that is one of two processes which train the run of `small_runs` together.

    python -m tests.train.training_peer ADDRESS RANK FOLDER TERM_AT

Rank 1 sends itself SIGTERM at step TERM_AT (0: never). FOLDER.data.json is the config of the data that the test
prepared.
"""

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

from data.config import DataConfig
from data.prepare import prepare
from sharding.mesh import MeshConfig
from tests.train.small_runs import experiment, run
from train.config_io import load_json
from train.peer_watch import join
from train.program import build
from train.signals import StopSignal


def main(address: str, rank: int, folder: Path, term_at: int) -> None:
    join(2, rank, address=address)
    data = load_json(DataConfig, folder.with_suffix(".data.json"))

    class Stop(StopSignal):
        def agreed(self, step):
            if term_at:
                time.sleep(0.2)  # gives the peers time to agree before the run ends
            if rank == 1 and step == term_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().agreed(step)

    program = build(dataclasses.replace(experiment(data, microbatches=1), mesh=MeshConfig(fsdp=8)))
    with Stop() as stop:
        trained = run(program, prepare(data), folder, stop=stop)
    print("finished" if trained.finished else "stopped", trained.step, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
