"""Random packed batches, and the network's predictions on them."""

from __future__ import annotations

import numpy as np

from data.packing import positions_of

FIRST_TEXT_ID = 11  # ids below are specials


def packed_batch(seed: int, rows: int, width: int, vocab: int, longest: int | None = None) -> dict[str, np.ndarray]:
    """`tokens`, `segment_ids`, `positions` int32 [rows, width]: segments of random sizes up to `longest`, padding at
    some ends."""
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
    return {
        "tokens": np.where(segment_ids > 0, tokens, 0),
        "segment_ids": segment_ids,
        "positions": positions_of(segment_ids),
    }


def whole_rows(seed: int, rows: int, width: int, vocab: int) -> dict[str, np.ndarray]:
    """As `packed_batch`, each row one segment."""
    tokens = np.random.default_rng(seed).integers(FIRST_TEXT_ID, vocab, (rows, width)).astype(np.int32)
    segment_ids = np.ones((rows, width), np.int32)
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions_of(segment_ids)}
