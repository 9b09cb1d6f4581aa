"""Load tensors from disk into the shards of a mesh, a few megabytes at a time.

Each device's shards are allocated once. A tensor is a view of its file and is cut into slabs along its first dimension;
each slab is converted and copied to its place. Besides the shards, the host holds a few slabs of `SLAB_BYTES` (or of
one row of the first dimension, for example one of several stacked experts) and the file pages of the current slab,
which it then releases. A tensor that is stored quantized is first decoded as a whole.
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

from interop.slabs import Box, Slab, check_cover, elements, slabs
from interop.tensor_map import TensorEntry
from model.config import ModelConfig, layer_specs
from model.cost import abstract_model
from model.transformer import Transformer
from model.weights import named_weights
from sharding.mesh import concrete_shardings, off_mesh, use_mesh
from sharding.rules import ShardingRules

SLAB_BYTES = 8 << 20  # size of a slab after conversion
SMALL_BYTES = 1 << 20  # weights up to this size are assembled on the host, without compiling a program


class ModelFilesError(ValueError):
    """Model files that are damaged, incomplete or do not belong together; the message names file, tensor and fix."""


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    dtype: str  # NumPy or ml_dtypes name
    file: str


class Source(Protocol):
    """Tensors of a published checkpoint under the family's names, in files that were checked when opened."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str) -> np.ndarray:
        """Return the tensor, as a memory-mapped view if the format allows it."""
        ...

    def release(self) -> None:
        """Release the file pages that were read."""
        ...


def abstract(config: ModelConfig, rules: ShardingRules, mesh: Mesh | None, dtype: str = "float32") -> Transformer:
    """Return the weights' shapes and shardings in `dtype`. Raises ValueError if `mesh` does not divide them."""
    if mesh is not None:
        check_mesh(config, rules, dict(mesh.shape))
    with use_mesh(mesh):
        model = concrete_shardings(abstract_model(config, rules), mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), model)


def check_mesh(config: ModelConfig, rules: ShardingRules, mesh: dict[str, int]) -> None:
    """Raise ValueError if a weight's dimension does not divide over its devices. `mesh`: devices along each axis."""
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
    """Return the device counts below `most` that divide `size`: '1, 2 or 4'."""
    *first, last = (str(n) for n in range(1, most) if size % n == 0)
    return f"{', '.join(first)} or {last}" if first else last


def named(model: Transformer) -> dict[str, Any]:
    """Return the weights' values by `TensorEntry.leaf` path: 'stacks/0/0/attention/q'.

    Raises ValueError for a quantised or adapted weight, whose value alone is not the weight.
    """
    weights = {path.replace(".", "/"): weight for path, weight in named_weights(model)}
    for path, weight in weights.items():
        if weight.scale is not None or weight.adapter is not None:
            what = "is quantised" if weight.scale is not None else "has an adapter"
            raise ValueError(f"{path} {what}: published formats hold dense weights; convert with dense_weights(model)")
    return {path: weight.value for path, weight in weights.items()}


def load(
    source: Source, tensor_map: list[TensorEntry], config: ModelConfig, rules: ShardingRules,
    mesh: Mesh | None = None, *,
    dtype: str = "float32", progress: Callable[[TensorEntry, int], object] = lambda entry, size: None,
) -> Transformer:  # fmt: skip
    """Return the network with its weights in `dtype` on `mesh`, or on the default device.

    `source` must hold all tensors of `tensor_map` with their shapes (`check.py` checks this). `progress` is called
    after each entry with its number of elements. Raises ModelFilesError if a weight is not finite.
    """
    model = abstract(config, rules, mesh, dtype)
    weights = named(model)
    check_cover(tensor_map, weights)
    large = {path: leaf for path, leaf in weights.items() if leaf.size * leaf.dtype.itemsize > SMALL_BYTES}
    filling: dict[str, _Large | _Small] = {path: _Large(array) for path, array in _zeros(large).items()}
    filling |= {path: _Small(leaf) for path, leaf in weights.items() if path not in large}
    ordered = sorted(tensor_map, key=lambda p: (source.tensors[p.name].file, p.name))
    for name, group in groupby(ordered, key=lambda p: p.name):
        tensor = source.read(name)
        for entry in group:
            for slab in slabs(entry, tensor, weights[entry.leaf].shape, SLAB_BYTES, np.dtype(dtype).itemsize):
                filling[entry.leaf].put(slab, name)
                source.release()
            progress(entry, elements(entry))
        del tensor, slab
        source.release()
    return jax.tree.unflatten(jax.tree.structure(model), [filling.pop(path).finish() for path in weights])


def converted(values: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return `values` of the tensor `name` as a contiguous array of `dtype`. Raises ModelFilesError if one is not
    finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        if values.itemsize <= dtype.itemsize:  # transposing the smaller of the two is twice as fast
            new = np.ascontiguousarray(values).astype(dtype, copy=False)
        else:
            new = np.ascontiguousarray(values.astype(dtype))
        if np.isfinite(new.sum(dtype=np.float32)) or np.isfinite(new).all():
            return new
    bad = ~np.isfinite(values)
    if bad.any():
        raise ModelFilesError(
            f"{name}: holds {values[bad].flat[0]}; {bad.sum()} of the {values.size} values checked are not finite. The "
            "file is damaged, or the training run diverged. Use another copy or an earlier checkpoint"
        )
    largest = np.abs(values.astype(np.float64)).max()
    raise ModelFilesError(
        f"{name}: holds a value of magnitude {largest:g}, above the {dtype.name} maximum of "
        f"{float(jnp.finfo(dtype).max):g}. Use bfloat16 or float32"
    )


class _Small:
    """A small weight that is assembled on the host."""

    def __init__(self, leaf: jax.ShapeDtypeStruct):
        self.leaf, self.array = leaf, np.zeros(leaf.shape, leaf.dtype)

    def put(self, slab: Slab, name: str) -> None:
        at = tuple(slice(a, b) for a, b in zip(slab.low, slab.high, strict=True))
        self.array[at] = converted(slab.values, self.array.dtype, name)

    def finish(self) -> jax.Array:
        return jax.make_array_from_callback(self.leaf.shape, self.leaf.sharding, lambda index: self.array[index])


class _Large:
    """A weight that is assembled in its shards on the devices of this process."""

    def __init__(self, zeros: jax.Array):
        self.shape, self.sharding, self.dtype = zeros.shape, zeros.sharding, zeros.dtype
        self.shards = [shard.data for shard in zeros.addressable_shards]
        self.regions: dict[Box, list[int]] = {}  # part of the weight: indices of the shards that hold a copy of it
        for i, shard in enumerate(zeros.addressable_shards):
            low, high, _ = zip(*(s.indices(n) for s, n in zip(shard.index, zeros.shape, strict=True)), strict=True)
            self.regions.setdefault((low, high), []).append(i)

    def put(self, slab: Slab, name: str) -> None:
        """Copy the slab into every shard that overlaps it. No other part of the tensor is read."""
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
            shard.block_until_ready()  # otherwise slabs would queue up in memory

    def finish(self) -> jax.Array:
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, self.shards)


def _zeros(leaves: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return zeros with these shapes, dtypes and shardings, made by one program."""
    if not leaves:
        return {}
    shardings = {path: leaf.sharding for path, leaf in leaves.items()}
    return jax.jit(lambda: {path: jnp.zeros(x.shape, x.dtype) for path, x in leaves.items()}, out_shardings=shardings)()


@partial(jax.jit, donate_argnums=0)
def _write(shard: jax.Array, values: jax.Array, offset: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, values, tuple(offset[d] for d in range(shard.ndim)))
