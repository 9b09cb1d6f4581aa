"""From tensors on disk to the shards of a mesh, a few megabytes at a time.

Each device's shards are allocated once; a tensor is a view of its file, cut along its first dimension, and every slice is
converted and copied to where it belongs. Beside the shards the host holds `SLICE_BYTES`, whatever the size of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from model.config import ModelConfig
from model.cost import abstract_model
from model.hf.pieces import Piece
from model.transformer import Transformer
from sharding.mesh import concrete_shardings, use_mesh
from sharding.rules import ShardingRules

SLICE_BYTES = 8 << 20  # of a tensor, as converted, that is on its way at once


class ModelFilesError(ValueError):
    """Files of a model that are damaged, incomplete, or do not belong together; the message names file, tensor and fix."""


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: str  # as NumPy and ml_dtypes name it
    file: str


class Source(Protocol):
    """Tensors of a published checkpoint, by the names of its family, read from files that were checked on opening."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """The tensor; where its format allows, a memory-mapped view that costs nothing until it is copied."""
        ...

    def release(self) -> None:
        """Gives the pages that were read back to the system."""
        ...


def abstract(config: ModelConfig, rules: ShardingRules, mesh: Mesh | None, dtype: str = "float32") -> Transformer:
    """Shapes and shardings of the weights, stored as `dtype`."""
    with use_mesh(mesh):
        model = concrete_shardings(abstract_model(config, rules), mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), model)


def named(model: Transformer) -> dict[str, Any]:
    """Weights by the paths that pieces name: 'stacks/0/0/attention/q'."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(model)
    return {jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"): leaf for path, leaf in leaves}


def load(
    source: Source, pieces: list[Piece], config: ModelConfig, rules: ShardingRules, mesh: Mesh | None = None, *,
    dtype: str = "float32", progress: Callable[[Piece, int], object] = lambda piece, size: None,
) -> Transformer:  # fmt: skip
    """The network with its weights on `mesh`, or on the default device, in `dtype`.

    `source` must hold all `pieces` in their shapes (`check.py`). `progress` is called after each with its elements.
    Raises ModelFilesError for a weight that is not finite.
    """
    model = abstract(config, rules, mesh, dtype)
    filling = {path: _Filling(leaf) for path, leaf in named(model).items()}
    for piece in sorted(pieces, key=lambda p: (source.tensors[p.name].file, p.name)):
        tensor = source.read(piece.name)
        filling[piece.leaf].put(piece, tensor)
        del tensor
        source.release()
        progress(piece, int(np.prod(piece.part(np.broadcast_to(np.int8(0), piece.shape)).shape)))
    return jax.tree.unflatten(jax.tree.structure(model), [filling[path].finish() for path in named(model)])


class _Filling:
    """One weight in the making: its shard on each device of this process."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        self.leaf = leaf
        self.indices = leaf.sharding.addressable_devices_indices_map(leaf.shape)
        self.shards = {
            device: _zeros(tuple(s.stop - s.start for s in self._whole(index)), leaf.dtype, device)
            for device, index in self.indices.items()
        }

    def _whole(self, index: tuple[slice, ...]) -> list[slice]:
        return [slice(*s.indices(size)[:2]) for s, size in zip(index, self.leaf.shape, strict=True)]

    def put(self, piece: Piece, tensor: np.ndarray) -> None:
        """Copies the part of `tensor` into every shard that holds some of it."""
        part = piece.part(tensor)
        at = (*piece.at, *(slice(None),) * (len(self.leaf.shape) - len(piece.at)))
        bounds = [slice(i, i + 1) if isinstance(i, int) else slice(*i.indices(n)[:2]) for i, n in zip(at, self.leaf.shape, strict=True)]
        shape = tuple(b.stop - b.start for b in bounds)
        part = part.reshape(shape)  # the dimensions that an int took away are back; a view
        # Their first dimension, along which the file is read in its own order.
        kept = [d for d, i in enumerate(at) if not isinstance(i, int)]
        along = kept[int(np.argmin(piece.order))] if piece.order else (kept[0] if kept else 0)
        for device, index in self.indices.items():
            shard = self._whole(index)
            low = [max(b.start, s.start) for b, s in zip(bounds, shard, strict=True)]
            high = [min(b.stop, s.stop) for b, s in zip(bounds, shard, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            rest = np.prod([b - a for d, (a, b) in enumerate(zip(low, high, strict=True)) if d != along], dtype=np.int64)
            step = max(1, SLICE_BYTES // max(1, int(rest) * self.leaf.dtype.itemsize))
            for first in range(low[along], high[along], step):
                start, stop = list(low), list(high)
                start[along], stop[along] = first, min(first + step, high[along])
                view = part[tuple(slice(a - b.start, z - b.start) for a, z, b in zip(start, stop, bounds, strict=True))]
                values = np.ascontiguousarray(view, self.leaf.dtype)
                if not np.isfinite(values.sum(dtype=np.float32)) and not np.isfinite(values).all():
                    raise ModelFilesError(f"{piece.name}: holds a value that is not finite; the file is damaged or was trained to ruin")
                offset = np.asarray([a - s.start for a, s in zip(start, shard, strict=True)], np.int32)
                self.shards[device] = _write(self.shards[device], values, offset)
            self.shards[device].block_until_ready()  # or slices would wait in a queue, all in memory

    def finish(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.leaf.shape, self.leaf.sharding, list(self.shards.values()))


def _zeros(shape: tuple[int, ...], dtype: Any, device: jax.Device) -> jax.Array:
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=SingleDeviceSharding(device))()


@partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, values: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, values, tuple(offset[d] for d in range(shard.ndim)))
