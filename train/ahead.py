"""Compilation of the train step in a thread, while the main thread prepares the data and the weights."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from data.batch import Batch
from sharding.mesh import put_replicated, use_mesh
from train.program import Program

THREAD = "compile the train step"


class StepCompilation:
    """The train step of a program, compiled in a thread for the shapes that its config determines."""

    def __init__(self, program: Program):
        self.seconds = 0.0  # that the compilation took
        self._arguments: Any = None
        self._compiled: Future = Future()
        threading.Thread(target=self._run, args=(program,), name=THREAD, daemon=True).start()

    def result(self, *arguments: Any) -> jax.stages.Compiled | None:
        """Wait for the compilation, and raise its error if it failed. Return the step, or None if it was compiled for
        other arguments than these (state, batch, hyper)."""
        compiled = self._compiled.result()
        return compiled if _types(arguments) == _types(self._arguments) else None

    def _run(self, program: Program) -> None:
        began = time.monotonic()
        try:
            with use_mesh(program.mesh):
                hyper = put_replicated(program.hyper, program.mesh)
                self._arguments = program.abstract_state, abstract_batch(program), hyper
                compiled = jax.jit(program.step, donate_argnums=0).lower(*self._arguments).compile()
        except BaseException as error:
            self._compiled.set_exception(error)
        else:
            self.seconds = time.monotonic() - began
            self._compiled.set_result(compiled)


def in_progress() -> bool:
    """Return whether a step is being compiled. The interpreter must then not wait for its threads when it exits."""
    return any(thread.name == THREAD for thread in threading.enumerate())


def abstract_batch(program: Program) -> Batch:
    """Return the shapes, dtypes and shardings of the batches that `put_batch` makes for the program."""
    data, mesh = program.experiment.data, program.mesh
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = device if mesh is None else NamedSharding(mesh, program.batch_spec)
    ids, weights = (
        jax.ShapeDtypeStruct((data.batch_size, data.sequence_length), dtype, sharding=sharding)
        for dtype in (jnp.int32, jnp.float32)
    )
    return Batch(tokens=ids, targets=ids, loss_weights=weights, positions=ids, segment_ids=ids)


def _types(arguments: Any) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(x.shape, x.dtype, x.sharding.devices_indices_map(x.shape)) for x in leaves]
