"""Held-out bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from data.pipeline import heldout_windows
from data.prepare import Prepared
from data.tokenizer import byte_lengths
from model.balance import max_violation
from model.transformer import Transformer
from sharding.mesh import put_batch
from train.objectives import Objective

ROUTED = ("load_LE", "dropped_L")  # means over the routed tokens of a batch


class Evaluation(NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    bytes: int
    # Of a mixture of experts, over the whole set, a mean over its layers: how far the most loaded expert is above the
    # mean (Wang et al. 2024: MaxVio_global), and the part of the choices that found no place.
    max_violation: float | None = None
    dropped_fraction: float | None = None

    def row(self) -> dict[str, float]:
        """What there is, by name."""
        return {name: value for name, value in self._asdict().items() if value is not None}


class Score(NamedTuple):
    """Of one batch."""

    loss: Float[Array, ""]  # sum over the scored tokens, nats
    tokens: Float[Array, ""]
    routed: Float[Array, ""]  # tokens that were no padding
    load_LE: (
        Float[Array, "L E"] | None
    )  # of a mixture of experts: each layer's choices over its experts, summing to one
    dropped_L: Float[Array, "L"] | None


def evaluate(
    score: Callable[[Transformer, dict], Score],
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
    """Loss and bits per byte of a held-out set; `score` is a jitted `make_score`. `between` is called after each batch.

    Every token of every document is predicted once, ends of documents included, and the bytes are those of the tokens
    predicted: with `max_windows` None, of all the held-out files. An objective that predicts some of them alone
    (masked) is scored as if the others cost the same.
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
        if len(pending) > 1:  # read one batch late, so that the device never waits
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
        max_violation=float(max_violation(total.load_LE).mean()),
        dropped_fraction=float((total.dropped_L / total.routed).mean()),
    )


def make_score(objective: Objective) -> Callable[[Transformer, dict], Score]:
    """`score(model, batch)` by the objective without its auxiliary losses."""

    def score(model, batch):
        # The objectives that draw at random draw the same for every batch of an evaluation.
        loss = objective(model, batch, jax.random.key(0))
        routed = (batch["segment_ids"][:, :-1] > 0).sum().astype(jnp.float32)
        load, dropped = (loss.metrics.get(name) for name in ("expert_load", "expert_dropped"))
        return Score(loss.metrics["loss"] * loss.count, loss.count, routed, load, dropped)

    return score


def _add_targets(batch: dict, lengths: np.ndarray, size: int, targets: int) -> tuple[int, int]:
    """`size` and `targets` with the bytes and the number of the batch's scored tokens added."""
    scored = batch["weights"] > 0
    return size + int((lengths[batch["tokens"][:, 1:]] * scored).sum()), targets + int(scored.sum())
