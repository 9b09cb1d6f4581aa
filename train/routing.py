"""What routers choose for the same held-out tokens as training goes on: kept in the run folder at every evaluation, for
the report (experiments/routing.py).

Shapes: L MoE layers, B batch, T time, N tokens, C choices of a token.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

from data.pipeline import heldout_windows
from data.prepare import Prepared
from model.transformer import Transformer, forward
from sharding.mesh import put_batch
from train.config import Experiment
from train.records import RunFolder

PROBE_TOKENS = 2048


def make_probe(
    experiment: Experiment, prepared: Prepared, run: RunFolder, mesh: Mesh | None, spec: PartitionSpec
) -> Callable[[Transformer, int], None]:
    """`probe(model, step)` writes the choices for the first windows of the first held-out set to RUN/routing/STEP.npz:
    `choices` int16 [L, N, C], the number of experts where a token has none (padding, or less than C)."""
    T = experiment.data.sequence_length
    rows = max(1, min(experiment.data.batch_size, PROBE_TOKENS // T))
    batch = next(
        heldout_windows(
            prepared,
            prepared.heldout_names[0],
            batch_size=experiment.data.batch_size,
            max_windows=experiment.data.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
    )

    @jax.jit
    def choices(model: Transformer, batch: dict[str, jax.Array]) -> jax.Array:
        out = forward(
            model,
            batch["tokens"][:, :-1],
            positions_BT=batch["positions"][:, :-1],
            segment_ids_BT=batch["segment_ids"][:, :-1],
        )
        assert out.router is not None
        return out.router.choices_BTC

    def probe(model: Transformer, step: int) -> None:
        found_LBTC = choices(model, put_batch(batch, mesh, spec))
        if jax.process_count() > 1:
            found_LBTC = multihost_utils.process_allgather(found_LBTC, tiled=True)
        kept = np.asarray(found_LBTC)[:, :rows].astype(np.int16)
        if jax.process_index() == 0:
            run.routing.mkdir(exist_ok=True)
            np.savez_compressed(run.routing / f"{step:08d}.npz", choices=kept.reshape(len(kept), -1, kept.shape[-1]))

    return probe


def read_choices(run: RunFolder, log: Callable[[str], None] = lambda text: None) -> dict[int, np.ndarray]:
    """Return the choices [L, N, C] by step, in order; those of the last shape alone, should the run's network have
    changed. A damaged file is left out, and `log` receives a line that names it."""
    found = {}
    for path in sorted(run.routing.glob("*.npz")) if run.routing.is_dir() else ():
        try:
            with np.load(io.BytesIO(path.read_bytes())) as file:  # of a torn file numpy would leave its own open
                choices = file["choices"].astype(np.int32)
            if choices.ndim != 3:
                raise ValueError(f"choices of shape {choices.shape}")
            found[int(path.stem)] = choices
        except Exception as error:  # numpy, zipfile and zlib each have errors of their own for a torn file
            log(f"routing/{path.name} left out: {type(error).__name__}: {error}")
    shape = next(reversed(found.values())).shape if found else None
    return {step: choices for step, choices in found.items() if choices.shape == shape}
