"""Random batches of packed and unpacked rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from data.batch import Batch

FIRST_TEXT_ID = 11  # smaller ids are special tokens


def packed_windows(
    seed: int, rows: int, width: int, vocab: int, longest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens, segment_ids), int32 [rows, width], of random segments up to `longest`, some rows with padding."""
    draw = np.random.default_rng(seed)
    segment_ids = np.zeros((rows, width), np.int32)
    for row in segment_ids:
        end = width if draw.random() < 0.5 else int(draw.integers(0, width + 1))
        at, segment = 0, 1
        while at < end:
            size = int(draw.integers(1, (longest or width) + 1))
            row[at : min(at + size, end)] = segment
            at, segment = at + size, segment + 1
    tokens = draw.integers(FIRST_TEXT_ID, vocab, (rows, width)).astype(np.int32)
    return np.where(segment_ids > 0, tokens, 0), segment_ids


def whole_windows(seed: int, rows: int, width: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `packed_windows` in which each row is one segment."""
    tokens = np.random.default_rng(seed).integers(FIRST_TEXT_ID, vocab, (rows, width)).astype(np.int32)
    return tokens, np.ones((rows, width), np.int32)


def packed_batch(seed: int, rows: int, width: int, vocab: int, longest: int | None = None) -> Batch:
    """Return the batch of `packed_windows`."""
    return Batch.of_windows(*packed_windows(seed, rows, width, vocab, longest))


def whole_rows(seed: int, rows: int, width: int, vocab: int) -> Batch:
    """Return the batch of `whole_windows`."""
    return Batch.of_windows(*whole_windows(seed, rows, width, vocab))


def weighted(batch: Batch, weights_BT: np.ndarray | float = 1.0) -> Batch:
    """Return `batch` with its loss weights multiplied by `weights_BT`."""
    return replace(batch, loss_weights=batch.loss_weights * np.float32(weights_BT))
