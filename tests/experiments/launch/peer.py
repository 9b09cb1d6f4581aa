"""A program that the tests launch: python -m tests.experiments.launch.peer SCENARIO FOLDER."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def add(folder: Path) -> None:
    """Join jax.distributed, and print the sum of 1, 2, ... over the processes. Process 1 of the first attempt dies
    before, if FOLDER has a file `die`."""
    restart = os.environ["MESHWORK_RESTART"]
    if restart == "0" and os.environ.get("JAX_PROCESS_ID") == "1" and (folder / "die").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    from experiments.commands import join_processes

    join_processes()
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Explicit,))
    ranks = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(mesh, P("data")), lambda _: jnp.array([jax.process_index() + 1.0])
    )
    add_up = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))
    print(f"sum {int(add_up(ranks)[0])} of {jax.process_count()} processes, restart {restart}", flush=True)


def say(folder: Path) -> None:
    """Print what the launcher has set. Process 1 of the first attempt dies before."""
    restart, index = os.environ["MESHWORK_RESTART"], os.environ["JAX_PROCESS_ID"]
    if restart == "0":
        if index == "0":
            wait(folder)
        until = time.monotonic() + 20.0
        while not (folder / "waiting-0").exists() and time.monotonic() < until:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    print(f"process {index} of {os.environ['JAX_NUM_PROCESSES']}, restart {restart}", flush=True)


def wait(folder: Path) -> None:
    """Wait for SIGTERM, write the fact, and exit as a run does."""
    name = os.environ.get("JAX_PROCESS_ID", "0")

    def stop(*_: object) -> None:
        (folder / f"stopped-{name}").write_text("")
        os._exit(143)

    signal.signal(signal.SIGTERM, stop)
    (folder / f"waiting-{name}").write_text(str(os.getpid()))
    print("waiting", flush=True)
    time.sleep(60)


def fail(folder: Path) -> None:
    """Process 1 ends as the file `fail` says: an exit code, and a text for stderr. The others wait for SIGTERM."""
    if os.environ.get("JAX_PROCESS_ID", "1") != "1":
        wait(folder)
    code, _, text = (folder / "fail").read_text().partition(" ")
    print(text, file=sys.stderr, flush=True)
    time.sleep(0.2)
    os._exit(int(code))


if __name__ == "__main__":
    {"add": add, "say": say, "wait": wait, "fail": fail}[sys.argv[1]](Path(sys.argv[2]))
