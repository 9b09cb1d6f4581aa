"""Cut the entries of a tensor map into slabs: shared by reading, writing and comparing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from interop.tensor_map import TensorEntry
from sharding.mesh import off_mesh

Box = tuple[tuple[int, ...], tuple[int, ...]]  # first and last + 1 along each dimension of a weight


class Slab(NamedTuple):
    """Values of weight[low:high], as a view of the tensor (in its dtype, and writable if it is)."""

    low: tuple[int, ...]
    high: tuple[int, ...]
    values: np.ndarray


def box(entry: TensorEntry, shape: tuple[int, ...]) -> Box:
    """Return the entry's bounds in a weight of `shape`."""
    at = (*entry.at, *(slice(None),) * (len(shape) - len(entry.at)))
    bounds = [(i, i + 1) if isinstance(i, int) else i.indices(n)[:2] for i, n in zip(at, shape, strict=True)]
    return tuple(low for low, _ in bounds), tuple(high for _, high in bounds)


def slabs(
    entry: TensorEntry, tensor: np.ndarray, shape: tuple[int, ...], slab_bytes: int, itemsize: int = 4
) -> Iterator[Slab]:
    """Yield the entry in slabs of about `slab_bytes` (at `itemsize` bytes per element), in the tensor's order on disk.
    `shape`: the weight's shape."""
    low, high = box(entry, shape)
    part = entry.part(tensor).reshape(
        [b - a for a, b in zip(low, high, strict=True)]
    )  # restores dimensions that an int index removed
    kept = [d for d in range(len(shape)) if d >= len(entry.at) or not isinstance(entry.at[d], int)]
    if not kept:
        yield Slab(low, high, part)
        return
    along = kept[int(np.argmin(entry.order))] if entry.order else kept[0]  # the first dimension of the tensor
    rows = part.shape[along]
    step = _step(rows, slab_bytes // max(1, part.size // max(1, rows) * itemsize))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        cut = (*(slice(None),) * along, slice(first, last))
        start, stop = list(low), list(high)
        start[along], stop[along] = low[along] + first, low[along] + last
        yield Slab(tuple(start), tuple(stop), part[cut])


def _step(rows: int, most: int) -> int:
    """Return the rows of a slab: at most `most`, and a divisor of `rows` if one is above most / 2, because each slab
    shape compiles a program."""
    most = max(1, min(most, rows))
    return next((step for step in range(most, most // 2, -1) if rows % step == 0), most)


def check_cover(tensor_map: Iterable[TensorEntry], weights: Mapping[str, Any]) -> None:
    """Raise AssertionError unless the tensor map covers every element of every weight and of every tensor once.

    A failure is an error in a family's table, not in a file. `weights`: by path, anything with a shape.
    """
    boxes: dict[str, list[Box]] = defaultdict(list)
    tensors: dict[str, list[TensorEntry]] = defaultdict(list)
    for entry in tensor_map:
        assert entry.leaf in weights, f"{entry.name}: there is no weight {entry.leaf}"
        boxes[entry.leaf].append(box(entry, weights[entry.leaf].shape))
        tensors[entry.name].append(entry)
    for path, weight in weights.items():
        covered, size = (
            sum(math.prod(np.subtract(high, low).tolist()) for low, high in boxes[path]),
            math.prod(weight.shape),
        )
        assert covered == size, f"{path}: the entries hold {covered} of its {size} elements"
        assert _disjoint(boxes[path]), f"{path}: two entries hold the same elements"
    for name, parts in tensors.items():
        taken, size = sum(elements(entry) for entry in parts), math.prod(parts[0].shape)
        assert taken == size, f"{name}: the entries take {taken} of its {size} elements"


def elements(entry: TensorEntry) -> int:
    """Return the number of elements in the entry."""
    return entry.part(np.broadcast_to(np.int8(0), entry.shape)).size


def _disjoint(boxes: list[Box]) -> bool:
    if len(boxes) < 2:
        return True
    low, high = np.asarray([b[0] for b in boxes]), np.asarray([b[1] for b in boxes])
    size = high - low
    if (size == size[0]).all() and (low % np.maximum(size[0], 1) == 0).all():  # on a grid: layers, experts, gates
        return len(np.unique(low, axis=0)) == len(low)
    return all(
        not ((low[i + 1 :] < high[i]) & (high[i + 1 :] > low[i])).all(axis=1).any() for i in range(len(boxes) - 1)
    )


def fetch(weight: jax.Array, low: tuple[int, ...], high: tuple[int, ...]) -> np.ndarray:
    """Return weight[low:high] on the host, fetching only those parts of the shards. The weight must be on one host."""
    assert weight.is_fully_addressable, "a part of the weight is on another host"
    found = np.empty(np.subtract(high, low), weight.dtype)
    visited = set()
    for shard in weight.addressable_shards:
        corner = tuple(s.indices(n)[0] for s, n in zip(shard.index, weight.shape, strict=True))
        if corner in visited:  # a copy
            continue
        visited.add(corner)
        start = np.maximum(low, corner)
        stop = np.minimum(high, np.add(corner, shard.data.shape))
        if (start >= stop).any():
            continue
        part = _part(shard.data, tuple((start - corner).tolist()), tuple((stop - start).tolist()))
        found[tuple(slice(a, b) for a, b in (np.stack([start, stop]) - low).T.tolist())] = part
    return found


def _part(data: jax.Array, offset: tuple[int, ...], size: tuple[int, ...], on_host: bool | None = None) -> np.ndarray:
    """Return data[offset : offset + size]. `on_host`: index the array in host memory, as a CPU backend allows (the
    default there); otherwise slice it on the device first."""
    if on_host if on_host is not None else next(iter(data.devices())).platform == "cpu":
        return np.asarray(data)[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))]
    with off_mesh():
        return np.asarray(_cut(data, np.asarray(offset, np.int32), size))


@partial(jax.jit, static_argnums=2)
def _cut(data: jax.Array, offset: jax.Array, size: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(data, tuple(offset[d] for d in range(data.ndim)), size)
