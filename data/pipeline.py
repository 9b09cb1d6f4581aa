"""Batches: an endless training stream that depends only on seed and step, and held-out windows in order.

Letters: B windows in this host's batch, T predicted tokens per window of T + 1.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import weakref
from collections.abc import Iterator
from typing import Self

import grain
import numpy as np

from data.batch import Batch
from data.config import DataConfig, DataError
from data.packing import cut, split_offsets
from data.prepared import Prepared, Windows
from data.ranges import RangeReader


def mixture(prepared: Prepared, config: DataConfig) -> dict[str, float]:
    """Return each training source's share of the stream: weight * tokens^(1/temperature), normalized."""
    weights = {source.name: source.weight for source in config.sources}
    if set(prepared.train_names) != set(weights):
        raise DataError(
            f"data.sources names {sorted(weights)}, but the prepared data has {sorted(prepared.train_names)}"
        )
    log_tokens = {name: np.log(prepared.counts(name).train_tokens) / config.temperature for name in weights}
    largest = max(log_tokens.values())  # avoids overflow of powers of token counts at low temperatures
    shares = {name: weight * np.exp(log_tokens[name] - largest) for name, weight in weights.items()}
    return {name: float(share / sum(shares.values())) for name, share in shares.items()}


def _source_order(source: int, name: str, windows: int, seed: int) -> grain.MapDataset:
    """Return an endless dataset of (source, window), with a new permutation of the windows in every epoch."""
    # The seed depends on the name, so that a source keeps its order when others are added.
    key = hashlib.sha256(f"{seed} {name}".encode()).digest()
    shuffled = grain.MapDataset.range(windows).shuffle(seed=int.from_bytes(key[:4], "little"))
    return shuffled.repeat().map(lambda window: (source, window))


def _batch_at(
    sources: list[Windows],
    reader: RangeReader,
    order: grain.MapDataset,
    batch_size: int,
    first_row: int,
    rows: int,
    step: int,
) -> Batch:
    chosen = [order[int(step) * batch_size + row] for row in range(first_row, first_row + rows)]
    # All rows are requested together, so that a bucket answers them in parallel.
    contents = iter(reader.read([part for source, window in chosen for part in sources[source].ranges(window)]))
    parsed = [sources[source].parse(window, (next(contents), next(contents))) for source, window in chosen]
    tokens, segment_ids = (np.stack(arrays).astype(np.int32) for arrays in zip(*parsed, strict=True))
    return Batch.of_windows(tokens, segment_ids)


class TrainBatches(Iterator[Batch]):
    """This host's rows of the endless stream of global batches; see `train_batches`."""

    def __init__(
        self, prepared: Prepared, config: DataConfig, start_step: int, process_index: int, process_count: int
    ) -> None:
        config.validate()
        if config.batch_size % process_count or not 0 <= process_index < process_count:
            raise DataError(
                f"data.batch_size = {config.batch_size} over {process_count} processes (this one is {process_index}): "
                "the batch must divide evenly, and processes are numbered from 0. Change data.batch_size"
            )
        if config.sequence_length != prepared.sequence_length:
            raise DataError(
                f"data.sequence_length = {config.sequence_length}, but the prepared windows have "
                f"{prepared.sequence_length}. Prepare the data again with this config"
            )
        shares = mixture(prepared, config)
        self._fixed = {
            "identity": prepared.identity,
            "mixture": shares,
            "seed": config.seed,
            "batch_size": config.batch_size,
            "sequence_length": config.sequence_length,
        }
        windows = [prepared.windows(name) for name in shares]
        order = grain.MapDataset.mix(
            [_source_order(i, name, len(windows[i]), config.seed) for i, name in enumerate(shares)],
            list(shares.values()),
        )
        rows = config.batch_size // process_count
        # Not a method: the prefetching thread must not keep this stream alive, or it would never be garbage-collected.
        self._batch_at = functools.partial(
            _batch_at, windows, prepared.reader, order, config.batch_size, process_index * rows, rows
        )
        self._prefetch = config.prefetch
        self._start(start_step)

    def _start(self, step: int) -> None:
        self._step = step
        batches = grain.MapDataset.range(step, sys.maxsize).map(self._batch_at)
        # On windows of a local disk, Grain's default of 16 threads and a buffer of 500 is ten times slower than none.
        stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        if self._prefetch:
            stream = grain.experimental.ThreadPrefetchIterDataset(stream, prefetch_buffer_size=self._prefetch)
        self._live = [iter(stream)]
        self._release = weakref.finalize(self, _release, self._live)

    def batch_at(self, step: int) -> Batch:
        """Return the batch of any step without moving the stream."""
        return self._batch_at(step)

    def __next__(self) -> Batch:
        if not self._live:
            raise StopIteration
        batch = next(self._live[0])
        self._step += 1
        return batch

    def get_state(self) -> dict:
        """Return the position as JSON values: the step of the next batch and everything the stream depends on."""
        return {"step": self._step, **self._fixed}

    def set_state(self, state: dict) -> None:
        """Move to a position from `get_state`. Raises DataError if the state belongs to another stream."""
        for name, value in self._fixed.items():
            if state.get(name) != value:
                raise DataError(
                    f"the saved data position has {name} = {state.get(name)!r}, but this run has {value!r}, so the "
                    "stream cannot continue. Restore the data config, or start without the saved position"
                )
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise DataError(f"the saved data position has step = {step!r}: must be an integer of at least 0")
        self.close()
        self._start(step)

    def close(self) -> None:
        """Stop the prefetching thread. The stream yields nothing until `set_state`."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _release(live: list[grain.DatasetIterator]) -> None:
    # Also drop the iterator: Grain's __del__ fails if it runs during interpreter shutdown.
    live.pop().close()


def train_batches(
    prepared: Prepared, config: DataConfig, *, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> TrainBatches:
    """Return the endless stream of one host's batches of shape [B, T].

    Global batch t is the next `batch_size` windows from window t * batch_size of a mixture of sources, each of which is
    reshuffled every epoch. Host p of P has the p-th contiguous slice of the rows. Segment 0 is padding. Close the
    stream, or use it in `with`, to stop its thread. Raises DataError if the batch does not divide over the hosts or the
    config does not match the prepared data.
    """
    return TrainBatches(prepared, config, start_step, process_index, process_count)


def heldout_windows(
    prepared: Prepared,
    name: str,
    *,
    batch_size: int,
    stride: int | None = None,
    max_windows: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Return batches of a source's held-out documents in order, with shape [B, T].

    Every token except each document's opening token has loss weight 1 exactly once, so that the scored tokens spell
    exactly the held-out bytes (plus the end of each document, which a compressor also encodes). A window scores its
    last `stride` targets, with the others as context; None means T, without context. `max_windows` selects that many
    evenly spread windows; count their bytes with `byte_lengths`. The last batch is padded with weight 0. Hosts get
    slices of rows as in training. Raises DataError for an unknown source, a stride outside 1..T, or a batch that does
    not divide over the hosts.
    """
    length = prepared.sequence_length + 1
    stride = length - 1 if stride is None else stride
    if not 1 <= stride < length:
        raise DataError(f"stride = {stride}: a window predicts {length - 1} tokens. Set it between 1 and {length - 1}")
    if batch_size % process_count:
        raise DataError(f"batch_size = {batch_size}: does not divide over {process_count} hosts. Change it")
    if not prepared.counts(name).heldout_documents:
        raise DataError(
            f"source {name!r} has no held-out documents. Raise data.holdout_fraction, or use {prepared.heldout_names}"
        )
    return _heldout_batches(prepared, name, batch_size, stride, max_windows, process_index, process_count)


def _heldout_batches(
    prepared: Prepared,
    name: str,
    batch_size: int,
    stride: int,
    max_windows: int | None,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    length = prepared.sequence_length + 1
    stream, starts = prepared.heldout(name)
    offsets = split_offsets(len(stream), length, stride)
    if max_windows is not None and max_windows < len(offsets):
        offsets = offsets[np.arange(max_windows) * len(offsets) // max_windows]
    rows = batch_size // process_count
    for first in range(0, len(offsets), batch_size):
        mine = offsets[first : first + batch_size][process_index * rows : (process_index + 1) * rows]
        tokens, segment_ids = np.zeros((2, rows, length), np.int32)
        if len(mine):
            tokens[: len(mine)], segment_ids[: len(mine)] = cut(stream, starts, mine, length)
        scored = np.ones((rows, length - 1), np.float32)
        scored[: len(mine), : length - 1 - stride] *= (mine == 0)[:, None]  # only the first window has no predecessor
        yield Batch.of_windows(tokens, segment_ids, scored)
