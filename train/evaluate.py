"""Held-out bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from data.batch import Batch
from data.pipeline import heldout_windows
from data.prepare import Prepared
from data.tokenizer import byte_lengths
from model.transformer import Transformer
from sharding.mesh import put_batch, use_mesh
from train.objectives import Objective

if TYPE_CHECKING:
    from train.program import Network

ROUTED = ("load_LE", "dropped_L")  # means over the routed tokens of a batch


class Evaluation(NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    bytes: int
    # For a mixture of experts, over the whole set and averaged over its layers: how far the most loaded expert exceeds
    # the mean load (Wang et al. 2024: MaxVio_global), and the fraction of the choices that were dropped.
    max_violation: float | None = None
    dropped_fraction: float | None = None

    def row(self) -> dict[str, float]:
        """Return the figures that are not None, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Score(NamedTuple):
    """Figures of one batch."""

    loss: Float[Array, ""]  # sum over the scored tokens, nats
    tokens: Float[Array, ""]  # that were scored
    routed: Float[Array, ""]  # tokens without padding
    # For a mixture of experts: the share of each expert in its layer's choices, and the share of dropped choices.
    load_LE: Float[Array, "L E"] | None
    dropped_L: Float[Array, "L"] | None


def evaluate(
    score: Callable[[Transformer, Batch], Score],
    model: Transformer,
    prepared: Prepared,
    name: str,
    *,
    batch_size: int,
    stride: int | None = None,
    max_windows: int | None = None,
    mesh: Mesh | None = None,
    spec: PartitionSpec | None = None,
    between: Callable[[], object] = lambda: None,
) -> Evaluation:
    """Return the loss and bits per byte of a held-out set.

    `score` is a jitted `make_score`; `between` is called after each batch. Every token of every document is predicted
    once, including the ends of documents, and the bytes are those of the predicted tokens: of all held-out files if
    `max_windows` is None. An objective that predicts only some tokens (masked) is scored as if the others had the same
    loss.
    """
    lengths = byte_lengths(prepared.tokenizer)
    total: Score | None = None
    size = targets = 0
    pending: list[Score] = []

    def read() -> None:
        nonlocal total
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(pending.pop(0)))
        found = found._replace(**{k: getattr(found, k) * found.routed for k in ROUTED if getattr(found, k) is not None})
        total = found if total is None else jax.tree.map(np.add, total, found)

    for batch in heldout_windows(
        prepared,
        name,
        batch_size=batch_size,
        stride=stride,
        max_windows=max_windows,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        if jax.process_count() == 1:
            size, targets = _add_targets(batch, lengths, size, targets)
        pending.append(score(model, put_batch(batch, mesh, spec)))
        if len(pending) > 1:  # read each score one batch later, so that the device never waits
            read()
        between()
    while pending:
        read()
    if jax.process_count() > 1:
        for batch in heldout_windows(prepared, name, batch_size=batch_size, stride=stride, max_windows=max_windows):
            size, targets = _add_targets(batch, lengths, size, targets)
    assert total is not None, "a held-out set has at least one window"
    loss = float(total.loss / total.tokens)
    found = Evaluation(loss, loss / math.log(2) * targets / size, int(total.tokens), size)
    if total.load_LE is None or total.dropped_L is None:
        return found
    return found._replace(
        max_violation=float(max_violation(np.asarray(total.load_LE)).mean()),
        dropped_fraction=float((total.dropped_L / total.routed).mean()),
    )


def evaluate_all(
    network: Network,
    model: Transformer,
    prepared: Prepared,
    *,
    full: bool,
    between: Callable[[], object] = lambda: None,
) -> dict[str, Evaluation]:
    """Return the figures of every held-out set, on `train.eval_windows` windows of each or, with `full`, on all."""
    config = network.experiment.train
    with use_mesh(network.mesh):
        return {
            name: evaluate(
                network.score,
                model,
                prepared,
                name,
                batch_size=network.experiment.data.batch_size,
                stride=config.eval_stride,
                max_windows=None if full else config.eval_windows,
                mesh=network.mesh,
                spec=network.batch_spec,
                between=between,
            )
            for name in prepared.heldout_names
        }


def make_score(objective: Objective) -> Callable[[Transformer, Batch], Score]:
    """Return `score(model, batch)`, which applies the objective without its auxiliary losses."""

    def score(model: Transformer, batch: Batch) -> Score:
        # A constant key: random objectives make the same draws for every batch of an evaluation.
        loss = objective(model, None, batch, jax.random.key(0))
        routed = (batch.segment_ids > 0).sum().astype(jnp.float32)
        dropped = loss.metrics.get("expert_dropped")
        return Score(loss.metrics["loss"] * loss.count, loss.count, routed, loss.expert_load, dropped)

    return score


def max_violation(load_LE: np.ndarray) -> np.ndarray:
    """Return MaxVio (Wang et al. 2024, eq. 4) of each layer on the host: largest load / mean load - 1."""
    return load_LE.max(-1) / load_LE.mean(-1) - 1.0


def _add_targets(batch: Batch, lengths: np.ndarray, size: int, targets: int) -> tuple[int, int]:
    """Return `size` plus the bytes of the batch's scored tokens, and `targets` plus their number."""
    scored = batch.loss_weights > 0
    return size + int((lengths[batch.targets] * scored).sum()), targets + int(scored.sum())
