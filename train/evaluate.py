"""Held-out bits per byte."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from data.pipeline import heldout_windows
from data.prepare import Prepared
from data.tokenizer import byte_lengths
from model.transformer import Transformer
from sharding.mesh import put_batch
from train.objectives import Objective


class Evaluation(NamedTuple):
    loss: float  # nats per token
    bits_per_byte: float
    tokens: int
    bytes: int


def evaluate(
    score: Callable[[Transformer, dict], tuple[jax.Array, jax.Array]],
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
    predicted: with `max_windows` None, of all the held-out files. An objective that predicts some of them alone (masked)
    is scored as if the others cost the same.
    """
    lengths = byte_lengths(prepared.tokenizer)
    loss = count = 0.0
    size = targets = 0
    parts = []
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
        parts.append(score(model, put_batch(batch, mesh, spec)))
        if len(parts) > 1:  # read one batch late, so that the device never waits
            total, tokens = parts.pop(0)
            loss, count = loss + float(total), count + float(tokens)
        between()
    for total, tokens in parts:
        loss, count = loss + float(total), count + float(tokens)
    if jax.process_count() > 1:
        for batch in heldout_windows(prepared, name, batch_size=batch_size, stride=stride, max_windows=max_windows):
            size, targets = _add_targets(batch, lengths, size, targets)
    return Evaluation(loss / count, loss / count / math.log(2) * targets / size, int(count), size)


def make_score(objective: Objective) -> Callable[[Transformer, dict], tuple[jax.Array, jax.Array]]:
    """`score(model, batch) -> (sum of losses in nats, tokens)` of the objective without its auxiliary losses."""

    def score(model, batch):
        # The objectives that draw at random draw the same for every batch of an evaluation.
        loss = objective(model, batch, jax.random.key(0))
        return loss.metrics["loss"] * loss.count, loss.count

    return score


def _add_targets(batch: dict, lengths: np.ndarray, size: int, targets: int) -> tuple[int, int]:
    """`size` and `targets` with the bytes and the number of the batch's scored tokens added."""
    scored = batch["weights"] > 0
    return size + int((lengths[batch["tokens"][:, 1:]] * scored).sum()), targets + int(scored.sum())
