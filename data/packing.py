"""Pack documents into windows and define which tokens are predicted.

A document is an opening token (`<end>`, or a published tokenizer's start token), its content and `<end>`. It forms one
segment; tokens attend and are predicted only within their segment. Either packing predicts every token exactly once,
except for each document's opening token.

Letters: N windows, T predicted tokens per window (of T + 1), M tokens in a stream, D documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def token_dtype(limit: int) -> np.dtype:
    """Return uint16 if it holds all values below `limit`, else int32."""
    return np.dtype(np.uint16 if limit <= 2**16 else np.int32)


def concatenate(
    documents: Iterable[np.ndarray], start: int, end: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Join contents into one stream: tokens `dtype` [M] and starts int64 [D + 1].

    Document d is tokens starts[d] to starts[d + 1], with `start` before its content and `end` after it.
    """
    contents = list(documents)
    starts = np.cumsum([0] + [len(content) + 2 for content in contents], dtype=np.int64)
    stream = np.empty(starts[-1], dtype)
    stream[starts[:-1]], stream[starts[1:] - 1] = start, end
    for first, content in zip(starts.tolist(), contents, strict=False):
        stream[first + 1 : first + 1 + len(content)] = content
    return stream, starts


class Stream(Protocol):
    """A stream of tokens [M] that returns those at indices [N, L], each row of which is nearly consecutive."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: np.ndarray, /) -> np.ndarray: ...


def cut(stream_M: Stream, starts: np.ndarray, offsets_N: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the stream's windows at each offset as (tokens, segment_ids), both int32 [N, length].

    Segments are numbered from 1 in every window. Past the end of the stream, both arrays are 0.
    """
    index = offsets_N[:, None] + np.arange(length)
    inside = index < len(stream_M)
    index = np.minimum(index, len(stream_M) - 1)
    document = np.searchsorted(starts, index, side="right").astype(np.int32)
    return (
        np.where(inside, stream_M[index], 0).astype(np.int32),
        np.where(inside, document - document[:, :1] + 1, 0).astype(np.int32),
    )


def split_offsets(tokens: int, length: int, stride: int) -> np.ndarray:
    """Return the starts int64 [N] of windows that together predict all tokens but the first.

    The first window predicts T = length - 1 tokens. Every later one predicts its last `stride` tokens, with the others
    as context.
    """
    later = -(-max(0, tokens - length) // stride)
    return np.arange(1 + later, dtype=np.int64) * stride


def best_fit(starts: np.ndarray, length: int) -> list[list[tuple[int, int]]]:
    """Return windows as lists of (start, end) spans of the stream, by best-fit packing (Ding et al. 2024,
    arXiv:2404.10830).

    Documents are placed largest first, each in the window that it leaves with the least room. A document longer than a
    window is cut into pieces that overlap by one token.
    """
    pieces = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        pieces += [(first, min(first + length, end)) for first in range(start, end - 1, length - 1)]
    pieces.sort(key=lambda piece: piece[0] - piece[1])  # stable: equal sizes stay in stream order
    windows: list[list[tuple[int, int]]] = []
    open_by_room: list[list[int]] = [[] for _ in range(length + 1)]
    rooms = 0  # bit r is set when a window with room for exactly r tokens is open
    for start, end in pieces:
        size = end - start
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            window = open_by_room[room].pop()
            if not open_by_room[room]:
                rooms ^= 1 << room
        else:
            room, window = length, len(windows)
            windows.append([])
        windows[window].append((start, end))
        open_by_room[room - size].append(window)
        rooms |= 1 << (room - size)
    return windows


def fill(stream_M: np.ndarray, windows: list[list[tuple[int, int]]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the windows of `best_fit` as (tokens, segment_ids), both int32 [N, length]."""
    tokens = np.zeros((len(windows), length), np.int32)
    segment_ids = np.zeros((len(windows), length), np.int32)
    for row, spans in enumerate(windows):
        at = 0
        for segment, (start, end) in enumerate(spans, 1):
            tokens[row, at : at + end - start] = stream_M[start:end]
            segment_ids[row, at : at + end - start] = segment
            at += end - start
    return tokens, segment_ids


def packed_blocks(
    stream_M: np.ndarray, starts: np.ndarray, length: int, packing: str, block: int = 4096
) -> tuple[int, Iterator[tuple[np.ndarray, np.ndarray]]]:
    """Pack a stream for training. Return N and blocks of (tokens, segment_ids), each int32 [<= block, length].

    Blocks of long windows have fewer rows, so that a block holds at most about 2**20 tokens.
    """
    block = max(1, min(block, 2**20 // length))
    if packing == "split":
        count = len(split_offsets(len(stream_M), length, length - 1))
        return count, (_rows(stream_M, starts, i, min(i + block, count), length) for i in range(0, count, block))
    windows = best_fit(starts, length)
    return len(windows), (fill(stream_M, windows[i : i + block], length) for i in range(0, len(windows), block))


def _rows(
    stream_M: np.ndarray, starts: np.ndarray, first: int, last: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return what `cut` does for the windows `first` to `last` of the packing 'split', several times as fast."""
    begin, end = first * (length - 1), last * (length - 1) + 1
    inside = min(end, len(stream_M)) - begin
    tokens, documents = np.zeros((2, end - begin), np.int32)
    tokens[:inside] = stream_M[begin : begin + inside]
    low, high = np.searchsorted(starts, [begin, begin + inside - 1], side="right")
    edges = np.clip(starts[low - 1 : high + 1] - begin, 0, inside)
    documents[:inside] = np.repeat(np.arange(1, high - low + 2, dtype=np.int32), np.diff(edges))
    windows = [sliding_window_view(array, length)[:: length - 1] for array in (tokens, documents)]
    return windows[0].copy(), np.where(windows[1] > 0, windows[1] - windows[1][:, :1] + 1, 0).astype(np.int32)


def positions_of(segment_ids: np.ndarray) -> np.ndarray:
    """Return the position of each token within its segment of the window, int32 [..., L]; 0 for padding."""
    index = np.broadcast_to(np.arange(segment_ids.shape[-1], dtype=np.int32), segment_ids.shape)
    first = np.ones(segment_ids.shape, bool)
    first[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    start = np.maximum.accumulate(np.where(first, index, 0), axis=-1)
    return np.where(segment_ids > 0, index - start, 0).astype(np.int32)


def target_weights(segment_ids: np.ndarray) -> np.ndarray:
    """Return float32 [..., L - 1]: 1 where token t + 1 is in the same segment as token t, else 0."""
    target = segment_ids[..., 1:]
    return ((target > 0) & (target == segment_ids[..., :-1])).astype(np.float32)
