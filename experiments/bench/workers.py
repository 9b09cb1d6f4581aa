"""One worker for each core, compared with one run on all cores, as a ratio in one run.

    python -m experiments.bench.workers [--experts] [--rounds N]

The network is that of the studies (experiments/studies/bases.py). In a round, the workers train at the same time for
some seconds, then the run on all cores does. Ratios above 1 mean that a worker for each core trains more steps.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import numpy as np

from experiments.cpu_devices import cores

SECONDS = 8.0  # of training in a turn


def train_when_told(kind: str, devices: int) -> None:
    """Print a line once ready. For each line on stdin, train for `SECONDS` and print the steps a second."""
    import jax

    from experiments.bench.together import batches, trial
    from sharding.mesh import put_batch, put_replicated, use_mesh
    from train.program import build

    experiment = trial(kind, 0)
    program = build(experiment, devices=jax.devices()[:devices])
    rows = itertools.cycle(batches(experiment))
    with use_mesh(program.mesh):
        hyper = put_replicated(program.hyper, program.mesh)
        state, step = jax.jit(program.make_state)(hyper), jax.jit(program.step, donate_argnums=0)
        for ready in itertools.count():
            began, steps = time.monotonic(), 0
            while steps < 2 or (ready and time.monotonic() - began < SECONDS):
                state, _ = step(state, put_batch(next(rows), program.mesh, program.batch_spec), hyper)
                jax.block_until_ready(state)
                steps += 1
            print(steps / (time.monotonic() - began), flush=True)
            if not sys.stdin.readline():
                return


class Side:
    """Processes that train at the same time."""

    def __init__(self, kind: str, shares: Sequence[Sequence[int]]):
        self._processes = []
        for share in shares:
            flags = f"--xla_force_host_platform_device_count={len(share)} --xla_cpu_multi_thread_eigen=false"
            command = [sys.executable, "-m", "experiments.bench.workers", "--serve", kind, ",".join(map(str, share))]
            environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True,
            )  # fmt: skip
            self._processes.append(process)
        self._lines()

    def _lines(self) -> list[str]:
        return [process.stdout.readline() for process in self._processes if process.stdout is not None]

    def turn(self) -> float:
        """Return the steps a second of all processes together."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return sum(map(float, self._lines()))

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.bench.workers", description=__doc__)
    parser.add_argument("--experts", action="store_true", help="a mixture of experts in place of the dense network")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side [default: 7]")
    args = parser.parse_args()
    kind, all_cores = "moe" if args.experts else "dense", list(range(cores()))
    sides = Side(kind, [[core] for core in all_cores]), Side(kind, [all_cores])
    ratios = []
    for _ in range(args.rounds):
        workers, whole = (side.turn() for side in sides)
        ratios.append(workers / whole)
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    print(f"{kind}: {len(all_cores)} workers of one core train {middle:.2f} times the steps of one run on all cores "
          f"(quartiles {low:.2f} to {high:.2f}, {args.rounds} rounds)")  # fmt: skip
    for side in sides:
        side.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        share = [int(core) for core in sys.argv[3].split(",")]
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, share)
        train_when_told(sys.argv[2], len(share))
    else:
        main()
