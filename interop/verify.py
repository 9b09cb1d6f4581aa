"""Check that weights in memory equal those on disk, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from interop.load import SLAB_BYTES, ModelFilesError, converted, named
from interop.published import Published, open_published
from interop.slabs import check_cover, elements, fetch, slabs
from interop.tensor_map import TensorEntry
from model.transformer import Transformer

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Verified(NamedTuple):
    tensors: int  # on disk
    weights: int  # arrays in the model
    elements: int  # elements compared


def verify(
    model: Transformer,
    published: Published,
    dtype: str,
    progress: Callable[[TensorEntry, int], object] = lambda entry, size: None,
) -> Verified:
    """Compare every element of every weight, bit by bit, with its tensor on disk, both as `dtype`.

    Every weight must be fully addressable from this host. `progress` is called after each entry with its number of
    elements. Raises ModelFilesError with the first tensor that differs, the number of differing elements and the
    largest difference.
    """
    weights = named(model)
    if not all(weight.is_fully_addressable for weight in weights.values()):
        raise ModelFilesError(
            "the weights are spread over several hosts, and one host cannot compare them with the files. Verify on a "
            "single host"
        )
    check_cover(published.tensor_map, weights)
    source, kind, count = published.source, np.dtype(dtype), 0
    bits = UNSIGNED[kind.itemsize]
    ordered = sorted(published.tensor_map, key=lambda p: (source.tensors[p.name].file, p.name))
    for name, group in groupby(ordered, key=lambda p: p.name):
        tensor = source.read(name)
        for entry in group:
            weight, wrong, largest = weights[entry.leaf], 0, 0.0
            for slab in slabs(entry, tensor, weight.shape, SLAB_BYTES):
                wanted = converted(slab.values, kind, name)
                found = converted(fetch(weight, slab.low, slab.high), kind, entry.leaf)
                different = wanted.view(bits) != found.view(bits)
                if different.any():
                    wrong += int(different.sum())
                    largest = max(largest, float(np.abs(wanted.astype(np.float64) - found.astype(np.float64)).max()))
                source.release()
            if wrong:
                raise ModelFilesError(
                    f"{name} ({source.tensors[name].file}): {wrong} of {elements(entry)} elements differ from the "
                    f"weight {entry.leaf} as {dtype}, by up to {largest:g}. The files or the memory changed in "
                    "between. Repeat the conversion"
                )
            count += elements(entry)
            progress(entry, elements(entry))
        del tensor, slab
        source.release()
    return Verified(len({entry.name for entry in ordered}), len(weights), count)


def verify_saved(
    model: Transformer,
    folder: Path,
    dtype: str,
    progress: Callable[[TensorEntry, int], object] = lambda entry, size: None,
) -> Verified:
    """Open a folder that `save_published` wrote, as a reader would, and `verify` the model against it."""
    return verify(model, open_published(folder), dtype, progress)
