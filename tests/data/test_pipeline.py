"""The stream of batches depends only on seed and step, for any number of hosts and threads and after interruptions."""

import dataclasses
import gc
import itertools
import json
import subprocess
import sys
import threading
from collections import Counter

import jax
import numpy as np
import pytest

from data.batch import Batch
from data.config import DataError
from data.pipeline import heldout_windows, mixture, train_batches
from data.prepare import heldout_files, prepare
from data.tokenizer import byte_lengths
from tests.data.conftest import byte_config, write_corpus


def take(stream, count):
    with stream:
        return list(itertools.islice(stream, count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name, array in a.arrays().items():
            np.testing.assert_array_equal(array, getattr(b, name))


def joined(parts):
    """Join several hosts' batches of one step into one batch."""
    return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)


def windows_of(batch):
    """Return the rows as windows of T + 1 tokens."""
    return np.concatenate([batch.tokens, batch.targets[:, -1:]], axis=1)


def test_batches_have_the_documented_shapes_and_dtypes(two_sources):
    prepared, config = two_sources
    for batch in take(train_batches(prepared, config), 3):
        for name, array in batch.arrays().items():
            assert array.shape == (8, 32) and array.dtype == (np.float32 if name == "loss_weights" else np.int32)
        assert batch.tokens.max() < prepared.vocab_size
        np.testing.assert_array_equal(batch.targets[:, :-1], batch.tokens[:, 1:])


def test_loss_weights_mark_targets_in_the_document_of_their_input():
    """`window` restores the window, and `with_window` replaces only its tokens."""
    tokens = np.array([[5, 6, 7, 8, 9, 0]], np.int32)
    segment_ids = np.array([[1, 1, 2, 2, 2, 0]], np.int32)
    batch = Batch.of_windows(tokens, segment_ids)
    np.testing.assert_array_equal(batch.targets, [[6, 7, 8, 9, 0]])
    np.testing.assert_array_equal(batch.loss_weights, [[1, 0, 1, 1, 0]])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 0, 1, 2]])
    half = Batch.of_windows(tokens, segment_ids, np.full((1, 5), 0.5, np.float32))
    np.testing.assert_array_equal(half.loss_weights, [[0.5, 0, 0.5, 0.5, 0]])
    for got, given in zip(batch.window(), (tokens, segment_ids), strict=True):
        np.testing.assert_array_equal(got, given)
    moved = batch.with_window(np.arange(6)[None])
    np.testing.assert_array_equal(moved.tokens, [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(moved.targets, [[1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(moved.loss_weights, batch.loss_weights)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_get_the_batches_of_one_host(two_sources, hosts):
    prepared, config = two_sources
    alone = take(train_batches(prepared, config), 5)
    parts = [take(train_batches(prepared, config, process_index=i, process_count=hosts), 5) for i in range(hosts)]
    assert_equal([joined([p[t] for p in parts]) for t in range(5)], alone)


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_a_restored_stream_equals_an_uninterrupted_one(two_sources, prefetch):
    prepared, config = two_sources
    config = dataclasses.replace(config, prefetch=prefetch)
    whole = take(train_batches(prepared, dataclasses.replace(config, prefetch=2)), 12)
    for k in range(8):
        stream = train_batches(prepared, config)
        with stream:
            assert_equal(list(itertools.islice(stream, k)), whole[:k])
            state = json.loads(json.dumps(stream.get_state()))
        assert state["step"] == k
        fresh = train_batches(prepared, config)
        next(fresh)  # restoring also works after the stream has moved
        fresh.set_state(state)
        assert_equal(take(fresh, 12 - k), whole[k:])
        assert_equal(take(train_batches(prepared, config, start_step=k), 2), whole[k : k + 2])


def test_batch_at_returns_any_step(two_sources):
    prepared, config = two_sources
    stream = train_batches(prepared, config)
    whole = take(stream, 6)
    assert_equal([stream.batch_at(t) for t in (5, 0)], [whole[5], whole[0]])


@pytest.mark.parametrize("name", ["seed", "batch_size", "identity", "mixture", "sequence_length"])
def test_a_state_of_another_stream_is_refused_with_both_values(two_sources, name):
    prepared, config = two_sources
    with train_batches(prepared, config) as stream:
        state = stream.get_state()
        for wrong in ("other", None):
            with pytest.raises(DataError, match=rf"{name} = {wrong!r}, but this run has"):
                stream.set_state({**state, name: wrong})
        for step in (-1, "3", None):
            with pytest.raises(DataError, match="step ="):
                stream.set_state({**state, "step": step})
        next(stream)  # a refusal does not change the stream


def one_source(tmp_path, **changes):
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 9), **changes)
    return prepare(config), config


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_every_epoch_is_another_permutation_of_all_windows(tmp_path, packing):
    prepared, config = one_source(tmp_path, packing=packing, batch_size=1, prefetch=0)
    windows = [row.tobytes() for row in prepared.array("train.s.tokens").astype(np.int32)]
    rows = [windows_of(batch)[0].tobytes() for batch in take(train_batches(prepared, config), 3 * len(windows))]
    epochs = [rows[i * len(windows) : (i + 1) * len(windows)] for i in range(3)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(windows)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != windows
    reseeded = dataclasses.replace(config, seed=1)
    assert [windows_of(b)[0].tobytes() for b in take(train_batches(prepared, reseeded), len(windows))] != epochs[0]


def test_a_stream_can_repeat_one_window(tmp_path):
    prepared, config = one_source(tmp_path, sequence_length=100_000, batch_size=2)
    batch = take(train_batches(prepared, config), 2)[1]
    assert prepared.counts("s").windows == 1 and np.array_equal(batch.tokens[0], batch.tokens[1])


def shares_seen(prepared, config, steps=200):
    small = {row.tobytes() for row in prepared.array("train.small.tokens").astype(np.int32)}
    rows = [row.tobytes() for b in take(train_batches(prepared, config), steps) for row in windows_of(b)]
    return sum(row in small for row in rows) / len(rows)


def test_the_stream_follows_the_mixture(two_sources):
    prepared, config = two_sources
    large, small = (prepared.counts(name).train_tokens for name in ("large", "small"))
    weighted = dataclasses.replace(
        config, sources=(config.sources[0], dataclasses.replace(config.sources[1], weight=3.0))
    )
    for settings, expected in [
        (config, small / (large + small)),
        (dataclasses.replace(config, temperature=1e6), 0.5),
        (dataclasses.replace(config, temperature=2.0), small**0.5 / (large**0.5 + small**0.5)),
        (weighted, 3 * small / (large + 3 * small)),
    ]:
        assert mixture(prepared, settings)["small"] == pytest.approx(expected, rel=1e-4)
        assert shares_seen(prepared, settings) == pytest.approx(expected, rel=0.02)
    assert mixture(prepared, dataclasses.replace(config, temperature=0.01))["large"] == pytest.approx(1)


def test_configs_that_do_not_match_the_data_are_refused(two_sources):
    prepared, config = two_sources
    with pytest.raises(DataError, match="batch_size = 8 over 3 processes"):
        train_batches(prepared, config, process_count=3)
    with pytest.raises(DataError, match="processes are numbered from 0"):
        train_batches(prepared, config, process_index=2, process_count=2)
    with pytest.raises(DataError, match="sequence_length = 16"):
        train_batches(prepared, dataclasses.replace(config, sequence_length=16))
    with pytest.raises(DataError, match=r"data\.sources"):
        train_batches(prepared, dataclasses.replace(config, sources=config.sources[:1]))


def test_threads_end_with_their_stream(two_sources):
    prepared, config = two_sources
    before = threading.active_count()
    closed, dropped = train_batches(prepared, config), train_batches(prepared, config)
    next(closed), next(dropped)
    assert threading.active_count() == before + 2
    closed.close()
    del dropped
    gc.collect()
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(closed)


@pytest.mark.parametrize("stride", [None, 32, 7, 1])
def test_heldout_windows_score_every_byte_once(two_sources, stride):
    prepared, _ = two_sources
    lengths = byte_lengths(prepared.tokenizer)
    for name in prepared.heldout_names:
        counts = prepared.counts(name)
        batches = list(heldout_windows(prepared, name, batch_size=4, stride=stride))
        targets = [b.targets[b.loss_weights > 0] for b in batches]
        scored = np.concatenate(targets)
        assert len(scored) == counts.heldout_tokens - counts.heldout_documents
        assert lengths[scored].sum() == counts.heldout_bytes
        # In order, the scored targets decode to the files.
        assert prepared.tokenizer.decode(scored) == "".join(text for _, text in heldout_files(prepared, name))
        for batch in batches:
            assert {array.shape for array in batch.arrays().values()} == {(4, 32)}
        if stride in (
            7,
            1,
        ):  # all but the first window have T - stride tokens of context, unless a document begins there
            weights = batches[1].loss_weights
            assert weights.any() and np.all(np.argmax(weights > 0, axis=1)[weights.any(1)] >= 32 - stride)


def test_heldout_windows_can_be_limited_and_split_over_hosts(two_sources):
    prepared, _ = two_sources
    whole = list(heldout_windows(prepared, "large", batch_size=4))
    parts = [list(heldout_windows(prepared, "large", batch_size=4, process_index=i, process_count=2)) for i in range(2)]
    assert_equal([joined([p[t] for p in parts]) for t in range(len(whole))], whole)
    some = list(heldout_windows(prepared, "large", batch_size=4, max_windows=6))
    rows = {row.tobytes() for batch in whole for row in batch.tokens}
    assert len(some) == 2 and sum(row.tobytes() in rows for batch in some for row in batch.tokens if row.any()) == 6


def test_heldout_errors_name_the_value(two_sources):
    prepared, _ = two_sources
    for wrong, message in [
        ({"stride": 33}, "stride = 33"),
        ({"stride": 0}, "stride = 0"),
        ({"process_count": 3}, "3 hosts"),
    ]:
        with pytest.raises(DataError, match=message):
            heldout_windows(prepared, "large", **{"batch_size": 4, **wrong})
    with pytest.raises(DataError, match="no source named"):
        heldout_windows(prepared, "x", batch_size=4)


def test_an_open_stream_does_not_disturb_program_exit(two_sources):
    prepared, _ = two_sources
    program = (
        "import sys; from data.config import *; from data.prepare import open_prepared; from data.pipeline import *\n"
        "prepared = open_prepared(sys.argv[1])\n"
        "sources = tuple(SourceConfig(name=name) for name in prepared.train_names)\n"
        "stream = train_batches(prepared, DataConfig(sources=sources, sequence_length=32)); next(stream)\n"
    )
    command = [sys.executable, "-W", "error", "-c", program, str(prepared.directory)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
