"""Our train step as a contestant: python -m experiments.bench.train_step dense|moe [DEVICES]

DEVICES: simulated devices, which divide the batch; default: as `train` chooses, one for each core.
"""

from __future__ import annotations

import os
import sys
import time

import jax

from experiments.bench.contest import serve
from experiments.bench.models import DENSE, MOE, batch, experiment
from experiments.cpu_devices import best_count, cores, use_devices
from sharding.mesh import put_batch, put_replicated, use_mesh
from train.host_memory import keep_freed_memory
from train.program import build


def main(kind: str, devices: str | None = None) -> None:
    keep_freed_memory()
    config = experiment({"dense": DENSE, "moe": MOE}[kind])
    # JAX reads the flags when its backend starts, which no import does.
    use_devices(os.environ, best_count(config, cores()) if devices is None else int(devices))
    program = build(config)
    with use_mesh(program.mesh):
        state, rows = jax.jit(program.make_state)(), put_batch(batch(), program.mesh, program.batch_spec)
        hyper = put_replicated(program.hyper, program.mesh)
        start = time.perf_counter()
        step = jax.jit(program.step, donate_argnums=0).lower(state, rows, hyper).compile()
        compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    assert memory is not None
    facts = {
        "devices": jax.device_count(),
        "compile_seconds": compile_seconds,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves((state.model, state.optimizer))),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.model)),
    }

    def work() -> None:
        nonlocal state
        state, metrics = step(state, rows, hyper)
        jax.block_until_ready(metrics)
        facts["loss"] = float(metrics["loss"])

    serve(work, facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
