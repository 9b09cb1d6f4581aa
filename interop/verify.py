"""Whether weights in memory are those on disk: each element, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from interop.load import SLAB_BYTES, ModelFilesError, converted, named
from interop.pieces import Piece
from interop.published import Published, open_published
from interop.slabs import check_cover, elements, fetch, slabs
from model.transformer import Transformer

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Verified(NamedTuple):
    tensors: int  # on disk
    weights: int  # arrays of the model
    elements: int  # numbers compared


def verify(
    model: Transformer,
    published: Published,
    dtype: str,
    progress: Callable[[Piece, int], object] = lambda piece, size: None,
) -> Verified:
    """Compares every weight with its tensor on disk, both as `dtype`: the same bits, each element once.

    Of a mesh over several hosts, each compares with what it holds whole; a weight that lies partly elsewhere is
    refused. `progress` is called after each piece with its elements. Raises ModelFilesError, which names the first
    tensor that differs, how many of its elements do and by how much at most.
    """
    weights = named(model)
    if not all(weight.is_fully_addressable for weight in weights.values()):
        raise ModelFilesError(
            "the weights lie on several hosts; one host cannot compare them with the files: verify on one host"
        )
    check_cover(published.pieces, weights)
    source, kind, count = published.source, np.dtype(dtype), 0
    bits = UNSIGNED[kind.itemsize]
    ordered = sorted(published.pieces, key=lambda p: (source.tensors[p.name].file, p.name))
    for name, group in groupby(ordered, key=lambda p: p.name):
        tensor = source.read(name)
        for piece in group:
            weight, wrong, largest = weights[piece.leaf], 0, 0.0
            for slab in slabs(piece, tensor, weight.shape, SLAB_BYTES):
                wanted = converted(slab.values, kind, name)
                found = converted(fetch(weight, slab.low, slab.high), kind, piece.leaf)
                different = wanted.view(bits) != found.view(bits)
                if different.any():
                    wrong += int(different.sum())
                    largest = max(largest, float(np.abs(wanted.astype(np.float64) - found.astype(np.float64)).max()))
                source.release()
            if wrong:
                raise ModelFilesError(
                    f"{name} ({source.tensors[name].file}): {wrong} of {elements(piece)} elements are not those of "
                    f"the weight {piece.leaf} as {dtype}; they differ by up to {largest:g}. The files or the memory "
                    "changed on the way: repeat the conversion"
                )
            count += elements(piece)
            progress(piece, elements(piece))
        del tensor, slab
        source.release()
    return Verified(len({piece.name for piece in ordered}), len(weights), count)


def verify_saved(
    model: Transformer, folder: Path, dtype: str, progress: Callable[[Piece, int], object] = lambda piece, size: None
) -> Verified:
    """Opens what `save_published` wrote, as a reader would, and compares it with the network as `verify` does."""
    return verify(model, open_published(folder), dtype, progress)
