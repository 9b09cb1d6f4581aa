"""Both packings and every stride predict each token exactly once, and segments are documents."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.packing import (
    best_fit,
    concatenate,
    cut,
    packed_blocks,
    positions_of,
    split_offsets,
    target_weights,
    token_dtype,
)

END = 1
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=20)
lengths = st.integers(3, 17)


def stream_of(sizes):
    """Return a stream of unique content tokens, so that a pair of tokens identifies a prediction."""
    ids = np.arange(2, 2 + sum(sizes))
    return concatenate(np.split(ids, np.cumsum(sizes)[:-1]), END, END, np.dtype(np.int32))


def expected_pairs(stream, starts):
    return Counter(
        pair
        for a, b in pairwise(starts)
        for pair in zip(stream[a : b - 1].tolist(), stream[a + 1 : b].tolist(), strict=True)
    )


def scored_pairs(tokens, weights):
    return Counter(zip(tokens[:, :-1][weights > 0].tolist(), tokens[:, 1:][weights > 0].tolist(), strict=True))


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@given(sizes=sizes, length=lengths, block=st.integers(1, 9))
def test_every_token_is_predicted_once(packing, sizes, length, block):
    stream, starts = stream_of(sizes)
    count, blocks = packed_blocks(stream, starts, length, packing, block)
    tokens, segment_ids = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    assert tokens.shape == segment_ids.shape == (count, length) and tokens.dtype == segment_ids.dtype == np.int32
    assert scored_pairs(tokens, target_weights(segment_ids)) == expected_pairs(stream, starts)
    assert np.all((segment_ids == 0) == (tokens == 0))


@given(sizes=sizes, length=lengths, block=st.integers(1, 9))
def test_consecutive_windows_equal_those_cut_one_by_one(sizes, length, block):
    stream, starts = stream_of(sizes)
    count, blocks = packed_blocks(stream, starts, length, "split", block)
    found = [np.concatenate(arrays) for arrays in zip(*blocks, strict=True)]
    expected = cut(stream, starts, split_offsets(len(stream), length, length - 1), length)
    assert count == len(found[0])
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype and one.shape == other.shape


@given(sizes=sizes, length=lengths, data=st.data())
def test_every_stride_scores_every_token_once(sizes, length, data):
    stream, starts = stream_of(sizes)
    stride = data.draw(st.integers(1, length - 1))
    offsets = split_offsets(len(stream), length, stride)
    tokens, segment_ids = cut(stream, starts, offsets, length)
    weights = target_weights(segment_ids)
    weights[1:, : length - 1 - stride] = 0
    assert scored_pairs(tokens, weights) == expected_pairs(stream, starts)


@pytest.mark.parametrize("packing", ["split", "best_fit"])
@given(sizes=sizes, length=lengths)
def test_a_segment_is_a_run_of_one_document(packing, sizes, length):
    stream, starts = stream_of(sizes)
    _, blocks = packed_blocks(stream, starts, length, packing)
    for tokens, segment_ids in blocks:
        positions = positions_of(segment_ids)
        for row, segments, row_positions in zip(tokens, segment_ids, positions, strict=True):
            used = segments[segments > 0]
            assert list(dict.fromkeys(used)) == list(range(1, used.max() + 1))  # from 1, in order, padding last
            assert not np.any(np.diff((segments > 0).astype(int)) > 0)
            for segment in range(1, used.max() + 1):
                run = row[segments == segment]
                assert row_positions[segments == segment].tolist() == list(range(len(run)))
                content = run[run > END]
                # Content ids are 2, 3, ... over the whole stream, so cumulative sizes give their documents.
                assert len(set(np.searchsorted(np.cumsum(sizes), content - 2, side="right"))) <= 1
                assert np.all(np.diff(content) == 1) and np.all(run[1:-1] > END)  # end tokens only at the edges


@given(sizes=sizes, length=lengths)
def test_best_fit_keeps_short_documents_whole_and_wastes_little(sizes, length):
    _, starts = stream_of(sizes)
    windows = best_fit(starts, length)
    spans = [span for window in windows for span in window]
    for a, b in pairwise(starts.tolist()):
        if b - a <= length:
            assert (a, b) in spans
    assert all(b - a > 1 for a, b in spans)  # a lone token predicts nothing
    filled = sorted(sum(end - start for start, end in window) for window in windows)
    assert filled[-1] <= length
    assert len(windows) < 2 or filled[0] + filled[1] > length  # no two windows would fit in one


def test_positions_and_weights_match_a_worked_example():
    segment_ids = np.array([[1, 1, 1, 2, 2, 0]])
    assert positions_of(segment_ids).tolist() == [[0, 1, 2, 0, 1, 0]]
    assert target_weights(segment_ids).tolist() == [[1, 1, 0, 1, 0]]


def test_tokens_are_stored_in_the_smallest_dtype():
    assert token_dtype(2**16) == np.uint16 and token_dtype(2**16 + 1) == np.int32
