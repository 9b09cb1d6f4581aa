"""Our train step as a contestant: python -m experiments.bench.train_step dense|moe"""

from __future__ import annotations

import sys
import time

import jax

from experiments.bench.contest import serve
from experiments.bench.models import DENSE, MOE, batch, experiment
from train.host_memory import keep_freed_memory
from train.program import build


def main(kind: str) -> None:
    keep_freed_memory()
    program = build(experiment({"dense": DENSE, "moe": MOE}[kind]))
    state, rows = jax.jit(program.make_state)(), jax.device_put(batch())
    start = time.perf_counter()
    step = jax.jit(program.step, donate_argnums=0).lower(state, rows, program.hyper).compile()
    compile_seconds = time.perf_counter() - start
    memory = step.memory_analysis()
    assert memory is not None
    facts = {
        "compile_seconds": compile_seconds,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves((state.model, state.optimizer))),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.model)),
    }

    def work() -> None:
        nonlocal state
        state, metrics = step(state, rows, program.hyper)
        jax.block_until_ready(metrics)
        facts["loss"] = float(metrics["loss"])

    serve(work, facts)


if __name__ == "__main__":
    main(sys.argv[1])
