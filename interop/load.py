"""From tensors on disk to the shards of a mesh, a few megabytes at a time.

Each device's shards are allocated once; a tensor is a view of its file, cut along its first dimension, and every slab
is converted and copied to where it belongs. Beside the shards the host holds a few slabs, of `SLAB_BYTES` or of one row
of the first dimension (an expert, where they are stacked), and the pages of the file that the slab was read from, which
it gives back. A tensor that is stored quantized is decoded whole first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from interop.pieces import Piece
from interop.slabs import Box, Slab, check_cover, elements, slabs
from model.config import ModelConfig, layer_specs
from model.cost import abstract_model
from model.transformer import Transformer
from model.weights import named_weights
from sharding.mesh import concrete_shardings, off_mesh, use_mesh
from sharding.rules import ShardingRules

SLAB_BYTES = 8 << 20  # of a tensor, as converted, that is on its way at once
SMALL_BYTES = 1 << 20  # weights up to this size are put together on the host: nothing is compiled for them


class ModelFilesError(ValueError):
    """Files of a model that are damaged, incomplete, or do not belong together; the message names file, tensor and
    fix."""


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
    """Return shapes and shardings of the weights, stored as `dtype`. Raises ValueError if `mesh` does not divide
    them."""
    if mesh is not None:
        check_mesh(config, rules, dict(mesh.shape))
    with use_mesh(mesh):
        model = concrete_shardings(abstract_model(config, rules), mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), model)


def check_mesh(config: ModelConfig, rules: ShardingRules, mesh: dict[str, int]) -> None:
    """Raise ValueError, which names field, value and fix, if a dimension of a weight does not divide over its devices.
    `mesh`: devices along each axis."""
    a, moe = config.attention, config.moe
    sizes = [
        ("vocab_size", "vocab", config.vocab_size),
        ("embed_dim", "embed", config.embed_dim),
        ("attention.num_heads", "heads", a.num_heads),
        ("attention.num_kv_heads", "kv_heads", a.num_kv_heads),
    ]
    if a.latent is not None:
        sizes.append(("attention.latent.kv_rank", "embed", a.latent.kv_rank))
        sizes.append(("attention.latent.q_rank", "embed", a.latent.q_rank or config.embed_dim))
    if any(not spec.moe for spec in layer_specs(config)):
        sizes.append(("mlp.hidden_dim", "mlp", config.mlp.hidden_dim))
    if moe is not None:
        sizes += [("moe.num_experts", "expert", moe.num_experts), ("moe.hidden_dim", "mlp", moe.hidden_dim)]
    for field, axis, size in sizes:
        axes = getattr(rules.weights, axis)
        devices = math.prod(mesh[name] for name in axes)
        if size % devices:
            raise ValueError(
                f"model.{field} = {size}: does not divide over the {devices} devices of mesh axes {axes} "
                f"(sharding.weights.{axis}). Try a mesh with {_divisors(size, devices)} devices there, or "
                f"sharding.weights.{axis} = ()"
            )


def _divisors(size: int, most: int) -> str:
    """Return the counts of devices, fewer than `most`, that divide `size`: '1, 2 or 4'."""
    *first, last = (str(n) for n in range(1, most) if size % n == 0)
    return f"{', '.join(first)} or {last}" if first else last


def named(model: Transformer) -> dict[str, Any]:
    """Return the stored values by the paths that pieces name: 'stacks/0/0/attention/q'.

    Raises ValueError for a quantised or adapted weight: its value is not the weight.
    """
    weights = {path.replace(".", "/"): weight for path, weight in named_weights(model)}
    for path, weight in weights.items():
        if weight.scale is not None or weight.adapter is not None:
            what = "is quantised" if weight.scale is not None else "has an adapter"
            raise ValueError(f"{path} {what}: published formats hold dense weights; convert with dense_weights(model)")
    return {path: weight.value for path, weight in weights.items()}


def load(
    source: Source, pieces: list[Piece], config: ModelConfig, rules: ShardingRules, mesh: Mesh | None = None, *,
    dtype: str = "float32", progress: Callable[[Piece, int], object] = lambda piece, size: None,
) -> Transformer:  # fmt: skip
    """The network with its weights on `mesh`, or on the default device, in `dtype`.

    `source` must hold all `pieces` in their shapes (`check.py`). `progress` is called after each with its elements.
    Raises ModelFilesError for a weight that is not finite.
    """
    model = abstract(config, rules, mesh, dtype)
    weights = named(model)
    check_cover(pieces, weights)
    large = {path: leaf for path, leaf in weights.items() if leaf.size * leaf.dtype.itemsize > SMALL_BYTES}
    filling: dict[str, _Large | _Small] = {path: _Large(array) for path, array in _zeros(large).items()}
    filling |= {path: _Small(leaf) for path, leaf in weights.items() if path not in large}
    ordered = sorted(pieces, key=lambda p: (source.tensors[p.name].file, p.name))
    for name, group in groupby(ordered, key=lambda p: p.name):
        tensor = source.read(name)
        for piece in group:
            for slab in slabs(piece, tensor, weights[piece.leaf].shape, SLAB_BYTES, np.dtype(dtype).itemsize):
                filling[piece.leaf].put(slab, name)
                source.release()
            progress(piece, elements(piece))
        del tensor, slab
        source.release()
    return jax.tree.unflatten(jax.tree.structure(model), [filling.pop(path).finish() for path in weights])


def converted(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """`values` of the tensor `name` as a contiguous array of `dtype`. Raises ModelFilesError where one is not
    finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if values.itemsize <= dtype.itemsize:  # the smaller of both is transposed: twice as fast
            new = np.ascontiguousarray(values).astype(dtype, copy=False)
        else:
            new = np.ascontiguousarray(values.astype(dtype))
        if np.isfinite(new.sum(dtype=np.float32)) or np.isfinite(new).all():
            return new
    bad = ~np.isfinite(values)
    if bad.any():
        raise ModelFilesError(
            f"{name}: holds {values[bad].flat[0]}, {bad.sum()} of the {values.size} values looked at are not finite: "
            "the file is damaged, or the training that wrote it went astray; take another copy or an earlier "
            "checkpoint"
        )
    largest = np.abs(values.astype(np.float64)).max()
    raise ModelFilesError(
        f"{name}: holds a value of size {largest:g}, more than {dtype.name} can say "
        f"({float(jnp.finfo(dtype).max):g}); choose bfloat16 or float32"
    )


class _Small:
    """A small weight in the making, on the host."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        self.leaf, self.array = leaf, np.zeros(leaf.shape, leaf.dtype)

    def put(self, slab: Slab, name: str) -> None:
        at = tuple(slice(a, b) for a, b in zip(slab.low, slab.high, strict=True))
        self.array[at] = converted(slab.values, self.array.dtype, name)

    def finish(self) -> jax.Array:
        return jax.make_array_from_callback(self.leaf.shape, self.leaf.sharding, lambda index: self.array[index])


class _Large:
    """A weight in the making: its shard on each device of this process."""

    def __init__(self, zeros: jax.Array):
        self.shape, self.sharding, self.dtype = zeros.shape, zeros.sharding, zeros.dtype
        self.shards = [shard.data for shard in zeros.addressable_shards]
        self.regions: dict[Box, list[int]] = {}  # the shards that are copies of each part
        for i, shard in enumerate(zeros.addressable_shards):
            low, high, _ = zip(*(s.indices(n) for s, n in zip(shard.index, zeros.shape, strict=True)), strict=True)
            self.regions.setdefault((low, high), []).append(i)

    def put(self, slab: Slab, name: str) -> None:
        """Copies the slab into every shard that holds some of it; of the tensor, nothing else is read."""
        for (first, last), copies in self.regions.items():
            low, high = np.maximum(slab.low, first), np.minimum(slab.high, last)
            if (low >= high).any():
                continue
            cut = tuple(slice(a, b) for a, b in zip(low - slab.low, high - slab.low, strict=True))
            values = converted(slab.values[cut], self.dtype, name)
            with off_mesh():
                for i in copies:
                    self.shards[i] = _write(self.shards[i], values, (low - first).astype(np.int32))
        for shard in self.shards:
            shard.block_until_ready()  # or slabs would wait in a queue, all in memory

    def finish(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, self.shards)


def _zeros(leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Zeros of these shapes, dtypes and shardings, by one program."""
    if not leaves:
        return {}
    shardings = {path: leaf.sharding for path, leaf in leaves.items()}
    return jax.jit(lambda: {path: jnp.zeros(x.shape, x.dtype) for path, x in leaves.items()}, out_shardings=shardings)()


@partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, values: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, values, tuple(offset[d] for d in range(shard.ndim)))
