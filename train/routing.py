"""The router probe, which records the experts chosen for a fixed set of held-out tokens at every evaluation.

The report reads these choices (experiments/routing.py) to show how they change during training.

Shapes: L MoE layers, B batch, T time, R rows kept, N tokens, C choices of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from data.array_files import read_arrays, write_arrays
from data.batch import Batch
from data.pipeline import heldout_windows
from data.prepare import Prepared
from model.transformer import Transformer, forward
from sharding.mesh import put_batch, use_mesh
from sharding.rules import no_mesh
from train.hooks import Evaluator
from train.program import Network
from train.records import RunFolder

PROBE_TOKENS = 2048  # tokens whose choices are recorded


class RouterProbe(Evaluator):
    """Writes the routers' choices for the first windows of the first held-out set to RUN/routing/STEP.npz.

    `choices` is int16 [L, N, C]; it equals the number of experts where a token has no choice (padding, or fewer than C
    choices). Only the recorded rows are copied from the devices. A full disk loses the file but does not stop the run.
    """

    at_end = True

    def __init__(
        self, network: Network, prepared: Prepared, run: RunFolder, log: Callable[[str], None],
        tokens: int = PROBE_TOKENS,
    ):  # fmt: skip
        self._network, self._run, self._log = network, run, log
        data, mesh = network.experiment.data, network.mesh
        self.rows = max(1, min(data.batch_size, tokens // data.sequence_length))
        slices = network.experiment.sharding.batch_slices(mesh)
        size = min(data.batch_size, -(-self.rows // slices) * slices)  # fewest rows that divide over the mesh
        self.batch = next(
            heldout_windows(
                prepared,
                prepared.heldout_names[0],
                batch_size=size,
                max_windows=data.batch_size,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        self.choices = jax.jit(self._choices)

    def _choices(self, model: Transformer, batch: Batch) -> Array:
        """Return the choices [L, R, T, C], replicated on every device."""
        out = forward(model, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
        assert out.router is not None
        return first_rows(out.router.choices_BTC, self.rows)

    def __call__(self, model: Transformer, step: int) -> list[dict[str, Any]]:
        network = self._network
        with use_mesh(network.mesh):
            found_LRTC = self.choices(model, put_batch(self.batch, network.mesh, network.batch_spec))
        kept = np.asarray(found_LRTC).astype(np.int16)
        if jax.process_index() == 0:
            path = self._run.routing / f"{step:08d}.npz"
            try:
                self._run.routing.mkdir(exist_ok=True)
                write_arrays(path, {"choices": kept.reshape(len(kept), -1, kept.shape[-1])}, compress=True)
            except OSError as error:
                self._log(f"the routers' choices at step {step} were not written ({error})")
        return []


def first_rows(x_LBTC: Array, rows: int) -> Array:
    """Return the first `rows` of the second dimension, replicated on every device. No other row is sent."""
    if no_mesh():
        return x_LBTC[:, :rows]
    # Each device contributes the rows that it holds, and the sum over devices has the size of the result.
    pick_RB = jnp.arange(rows)[:, None] == jnp.arange(x_LBTC.shape[1])
    picked = jnp.where(pick_RB[None, :, :, None, None], x_LBTC[:, None], 0).sum(2)
    return jax.sharding.reshard(picked, P(*(None,) * picked.ndim))


def read_choices(run: RunFolder, log: Callable[[str], None] = lambda text: None) -> dict[int, np.ndarray]:
    """Return the choices [L, N, C] by step, in order.

    If the shape changed during the run, only choices of the last shape are returned. A damaged file is skipped, and
    `log` receives a line that names it.
    """
    found = {}
    for path in sorted(run.routing.glob("*.npz")) if run.routing.is_dir() else ():
        try:
            choices = read_arrays(path)["choices"].astype(np.int32)
            if choices.ndim != 3:
                raise ValueError(f"choices of shape {choices.shape}")
            found[int(path.stem)] = choices
        except Exception as error:  # numpy, zipfile and zlib raise different errors for a truncated file
            log(f"routing/{path.name} left out: {type(error).__name__}: {error}")
    shape = next(reversed(found.values())).shape if found else None
    return {step: choices for step, choices in found.items() if choices.shape == shape}
