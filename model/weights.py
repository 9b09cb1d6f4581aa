"""Weights: arrays with the information that their use requires.

A `Weight` holds the stored array, the logical axes of its dimensions, the number of dimensions to contract, its role
and, optionally, the scale of a quantised value and a low-rank adapter. One call creates a weight from its shape,
logical axes, standard deviation and role. It is stored in float32 and sharded by `rules.weights`. `dot` and `gathered`
cast it to the dtype of computation and reshard it by `rules.activations`, so layers never do that themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PRNGKeyArray

from model.config import ModelConfig
from sharding.manual import gather_weight
from sharding.rules import ShardingRules, activation_spec, no_mesh, reshard, weight_spec

nnx.set_graph_mode(False)  # modules are plain pytrees: no object identity, no mutation under transformations

Axes = tuple[str | None, ...]
Role = Literal[
    "matrix",  # inside the network
    "router",  # from hidden states to router logits
    "embedding",  # tokens, positions and the head: one side is the vocabulary or the context
    "vector",  # norm scales, biases, sinks
    "buffer",  # updated by the train step without a gradient (router_bias)
]
PARTS = ("value", "scale", "zero_point", "adapter")  # the fields of a Weight that hold arrays
Tree = TypeVar("Tree")


@partial(jax.tree_util.register_dataclass, data_fields=("down", "up"), meta_fields=("factor",))
@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank addition to a matrix (LoRA, Hu et al. 2021, sec. 4.1): factor * down @ up."""

    down: Array  # [(experts,) *inputs, rank]
    up: Array  # [(experts,) rank, *outputs]
    factor: float = 1.0  # alpha / rank


@nnx.register_data_type
@partial(jax.tree_util.register_dataclass, data_fields=PARTS, meta_fields=("name", "axes", "inputs", "role", "rules"))
@dataclass(frozen=True, eq=False)
class Weight:
    """An array of a network with its metadata. Stacked layers add leading dimensions, which `axes` does not name."""

    value: Array  # as stored: float, or an integer or 8-bit float with `scale`
    # Has the rank of value; each dimension is 1 or divides value's. The weight is value * scale.
    scale: Array | None = None
    zero_point: Array | None = None  # shaped like scale; the weight is then (value - zero_point) * scale
    adapter: Adapter | None = None
    name: str = ""  # "attention.q"; the same for every layer
    axes: Axes = ()  # logical axes
    inputs: int = 0  # number of dimensions to contract: the first ones after the expert dimension
    role: Role = "matrix"
    rules: ShardingRules = ShardingRules()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def ndim(self) -> int:
        return self.value.ndim

    @property
    def experts(self) -> int:
        """Number of leading expert dimensions: 0 or 1."""
        return int(self.axes[:1] == ("expert",))

    def dot(self, x: Array, x_axes: Axes, precision: jax.lax.Precision | None = None) -> Array:
        """Contract the last `inputs` dimensions of `x` with the weight, in the dtype of `x`.

        Return [*lead, *outputs], sharded by `x_axes` (the logical axes of lead) and the weight's output axes.
        `precision`: accelerators round the factors of a float32 product to bfloat16 (TPU) or TF32 (GPU) unless it is
        HIGHEST. Not for experts, which use grouped matmuls (model/experts.py).
        """
        axes = (*x_axes, *self.axes[self.inputs :])
        if self.scale is not None and self.zero_point is None and self._scale_per_output():
            w = self._reshard(self.value.astype(x.dtype), self.axes)
            names: Any = self.part_axes().scale
            scale = self._reshard(self.scale, names).reshape(self.scale.shape[self.inputs :])
            # Scale the product instead of the weight, which has more entries.
            y = (contract(x, w, self.inputs, axes, self.rules, precision) * scale).astype(x.dtype)
        else:
            y = contract(x, self._dense(x.dtype), self.inputs, axes, self.rules, precision)
        if self.adapter is None:
            return y
        down, up = (part.astype(x.dtype) for part in self._adapter_parts())
        rank = contract(x, down, self.inputs, (*x_axes, None), self.rules, precision)
        return y + self.adapter.factor * contract(rank, up, 1, axes, self.rules, precision)

    def gathered(self, dtype: jnp.dtype | type) -> Array:
        """Return the weight as one dense array of `dtype`, sharded as an activation: dequantised, with its adapter
        added."""
        w = self._dense(dtype)
        if self.adapter is None:
            return w
        delta = self._delta(*self._adapter_parts(), None if no_mesh() else self.rules.spec("activations", self.axes))
        return w + delta.astype(dtype)

    def take(self, ids: Int[Array, "*B"], axes: Axes, dtype: jnp.dtype) -> Array:
        """Return rows `ids` [*B] of an embedding [N, D] as [*B, D] of `dtype`; `axes` are the logical axes of ids."""
        # Gather the table along D first: JAX does not support a lookup in rows that are sharded.
        return self.gathered(dtype).at[ids].get(out_sharding=activation_spec(self.rules, *axes, *self.axes[1:]))

    def entering(self, dtype: jnp.dtype | type) -> tuple[Weight, Weight]:
        """Return (the weight, cast and resharded to enter shard_map, its PartitionSpecs in the same tree).

        Dimensions are sharded over the devices that compute with them and, within these, over the devices that store
        them. `local` gathers them inside shard_map, so that one collective reduces and scatters their gradients.
        """

        def cast(x: Array) -> Array:
            return x.astype(dtype) if self.scale is None and jnp.issubdtype(x.dtype, jnp.floating) else x

        weight = jax.tree.map(cast, self._without_blocks())
        specs = jax.tree.map(lambda x, names: self.rules.gathered(names)[0], weight, weight.part_axes())
        return jax.tree.map(jax.sharding.reshard, weight, specs), specs

    def local(self, dtype: jnp.dtype | type) -> Array:
        """Return, inside shard_map, this device's experts or columns as one dense array for a kernel.

        Without a mesh, return the whole weight. See `entering`.
        """
        if no_mesh():
            return self.gathered(dtype)

        def gather(x: Array, names: Axes) -> Array:
            return gather_weight(x, self.rules.gathered(names)[1])

        gathered = jax.tree.map(gather, self, self.part_axes())
        w = _dequantised(gathered.value, gathered.scale, gathered.zero_point, dtype)
        if gathered.adapter is None:
            return w
        return w + gathered._delta(gathered.adapter.down, gathered.adapter.up, None).astype(dtype)

    def matrix_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the (input, output) dimensions of the matrices in the stored value; None for vectors and buffers.

        Dimensions in neither group count matrices: stacked layers, experts, and the two projections of a gated MLP.
        """
        if self.role in ("vector", "buffer"):
            return None
        first = self.value.ndim - len(self.axes) + self.experts
        outputs = range(first + self.inputs, self.value.ndim)
        kept = tuple(d for d in outputs if self.axes[d - self.value.ndim] != "gate")
        return tuple(range(first, first + self.inputs)), kept

    def _dense(self, dtype: jnp.dtype | type) -> Array:
        """Return the value for computation, without the adapter. The cast comes before the gather, to send half the
        bytes."""
        if self.scale is None:
            return self._reshard(self.value.astype(dtype), self.axes)
        weight = replace(self._without_blocks(), adapter=None)
        weight = jax.tree.map(self._reshard, weight, weight.part_axes())
        return _dequantised(weight.value, weight.scale, weight.zero_point, dtype)

    def _without_blocks(self) -> Weight:
        """Return the weight with block scales expanded to one scale per entry, because a mesh may split a block."""
        if no_mesh() or self.scale is None:
            return self

        def expand(x: Array) -> Array:
            if all(blocks in (1, size) for blocks, size in zip(x.shape, self.shape, strict=True)):
                return x
            expanded = _expand_blocks(jax.sharding.reshard(x, P(*(None,) * x.ndim)), self.shape)
            names = tuple(a if n > 1 else None for a, n in zip(self.axes, expanded.shape, strict=True))
            return jax.sharding.reshard(expanded, self.rules.spec("weights", names))

        zero_point = None if self.zero_point is None else expand(self.zero_point)
        return replace(self, scale=expand(self.scale), zero_point=zero_point)

    def _scale_per_output(self) -> bool:
        """Return whether each output has a single scale, or all outputs share one."""
        assert self.scale is not None
        inputs, outputs = self.scale.shape[: self.inputs], self.scale.shape[self.inputs :]
        shared = all(n in (1, size) for n, size in zip(outputs, self.shape[self.inputs :], strict=True))
        return set(inputs) <= {1} and shared

    def adapter_axes(self) -> tuple[Axes, Axes]:
        """Return the logical axes of an adapter's two factors."""
        lead, rest = self.axes[: self.experts], self.axes[self.experts :]
        return (*lead, *rest[: self.inputs], None), (*lead, None, *rest[self.inputs :])

    def _adapter_parts(self) -> tuple[Array, Array]:
        assert self.adapter is not None
        down, up = self.adapter_axes()
        return self._reshard(self.adapter.down, down), self._reshard(self.adapter.up, up)

    def _delta(self, down: Array, up: Array, spec: P | None) -> Array:
        """Return factor * down @ up, for each expert."""
        assert self.adapter is not None
        lead = tuple(range(self.experts))
        dims = (((down.ndim - 1,), (self.experts,)), (lead, lead))
        return self.adapter.factor * jax.lax.dot_general(down, up, dims, out_sharding=spec)

    def part_axes(self) -> Weight:
        """Return the logical axes of every array in this weight, in the tree of the weight."""
        adapter: Any = None
        if self.adapter is not None:
            names: Any = self.adapter_axes()
            adapter = replace(self.adapter, down=names[0], up=names[1])
        axes: Any = self.axes  # takes the place of an array

        def along(part: Array | None) -> Any:
            """Return the axes of `part`. A dimension shorter than the value's is shared along it and not sharded."""
            if part is None:
                return None
            shapes = part.shape[-len(axes) :], self.shape[-len(axes) :]
            return tuple(a if n == size else None for a, n, size in zip(axes, *shapes, strict=True))

        return replace(self, value=axes, scale=along(self.scale), zero_point=along(self.zero_point), adapter=adapter)

    def _reshard(self, w: Array, axes: Axes) -> Array:
        """Reshard `w` as an activation, one dimension after the other: XLA turns a gather along two dimensions at once
        into an all-reduce, which sends twice as much."""
        if no_mesh():
            return w
        layouts = list(self.rules.spec("weights", axes)), list(self.rules.spec("activations", axes))
        stored, used = ([p if isinstance(p, tuple) else (p,) if p else () for p in layout] for layout in layouts)
        if all(more[: len(part)] == part for more, part in zip(stored, used, strict=True)):
            for dimension in reversed(range(len(axes))):
                w = jax.sharding.reshard(w, P(*layouts[0][:dimension], *layouts[1][dimension:]))
            return w
        return reshard(w, self.rules, *axes)


def normal(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    axes: Axes,
    std: float,
    rules: ShardingRules,
    *,
    name: str,
    inputs: int = 1,
    role: Role = "matrix",
) -> Weight:
    """Return a float32 weight drawn from N(0, std^2). Its values do not depend on its sharding."""
    value = jax.random.normal(key, shape, jnp.float32, out_sharding=weight_spec(rules, *axes)) * std
    return Weight(value, name=name, axes=axes, inputs=inputs, role=role, rules=rules)


def constant(
    shape: tuple[int, ...],
    axes: Axes,
    value: float,
    rules: ShardingRules,
    *,
    name: str,
    inputs: int = 0,
    role: Role = "vector",
) -> Weight:
    """Return a float32 weight filled with `value` (norm scales, biases, sinks)."""
    values = jnp.full(shape, value, jnp.float32, out_sharding=weight_spec(rules, *axes))
    return Weight(values, name=name, axes=axes, inputs=inputs, role=role, rules=rules)


def weight_std(config: ModelConfig, fan_in: int, residual: bool = False) -> float:
    """Return the standard deviation of a matrix with `fan_in` inputs; `residual`: its output is added to the residual
    stream."""
    init = config.init
    std = init.scale * fan_in**-0.5 if init.scheme == "fan_in" else init.scale
    if residual and init.residual != "none":
        std *= (2 * config.num_layers) ** -0.5 if init.residual == "depth" else 0.0
    return std


def is_weight(x: Any) -> bool:
    """Return whether `x` is a Weight: the `is_leaf` of tree functions that treat a weight as one leaf."""
    return isinstance(x, Weight)


def map_weights(f: Callable[..., Any], *models: Any) -> Any:
    """Return a tree in the structure of the first network, with `f(weight, ...)` for every Weight of the networks."""
    return jax.tree.map(f, *models, is_leaf=is_weight)


def named_weights(model: Any) -> list[tuple[str, Weight]]:
    """Return (dotted path, weight) of every Weight in order: ("stacks.0.1.attention.q", ...)."""
    found, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)
    return [(_dotted(path), weight) for path, weight in found]


def map_named_weights(f: Callable[[str, Weight], Any], model: Tree) -> Tree:
    """Return a tree in the structure of the network, with `f(dotted path, weight)` for every Weight."""
    return jax.tree_util.tree_map_with_path(lambda path, w: f(_dotted(path), w), model, is_leaf=is_weight)


def repeats(pattern: Any) -> int:
    """Return R of a stack: the repetitions of its pattern of layers, which is the leading dimension of every weight."""
    return jax.tree.leaves(pattern)[0].shape[0]


def dense_weights(model: Tree) -> Tree:
    """Return the network with every weight as one float32 array: dequantised, with its adapter added."""

    def dense(weight: Weight) -> Weight:
        if weight.scale is None and weight.adapter is None:
            return weight
        gathered: Callable[[Weight], Array] = lambda w: w.gathered(jnp.float32)
        for _ in range(weight.ndim - len(weight.axes)):  # stacked layers
            gathered = jax.vmap(gathered)
        value = gathered(weight)
        if not no_mesh():
            value = jax.sharding.reshard(value, jax.typeof(weight.value).sharding)
        return replace(weight, value=value, scale=None, zero_point=None, adapter=None)

    return map_weights(dense, model)


def split(model: Tree, rule: Callable[[str, Weight, str], bool]) -> tuple[Tree, Tree]:
    """Return (the arrays that `rule(path, weight, part)` selects, the rest): two trees in the model's structure, each
    with None for the arrays of the other. `path` is dotted; `part` is one of PARTS."""

    def side(wanted: bool) -> Tree:
        def parts(path: str, weight: Weight) -> Weight:
            kept = {part: bool(rule(path, weight, part)) == wanted for part in PARTS}
            keep = lambda part: jax.tree.map(lambda x: x if kept[part] else None, getattr(weight, part))
            return replace(weight, **{part: keep(part) for part in PARTS})

        return map_named_weights(parts, model)

    return side(True), side(False)


def merge(selected: Tree, rest: Tree) -> Tree:
    """Return the model that `split` divided: the inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda x: x is None)


def _dotted(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _dequantised(value: Array, scale: Array | None, zero_point: Array | None, dtype: jnp.dtype | type) -> Array:
    """Return (value - zero_point) * scale, computed in float32, as `dtype`. A scale that is shorter along a dimension
    applies to blocks."""
    if scale is None:
        return value.astype(dtype)

    w = value.astype(jnp.float32)
    if zero_point is not None:
        w = w - _expand_blocks(zero_point, value.shape).astype(jnp.float32)
    return (w * _expand_blocks(scale, value.shape).astype(jnp.float32)).astype(dtype)


def _expand_blocks(x: Array, shape: tuple[int, ...]) -> Array:
    """Repeat block scales to one scale per entry of `shape`. A dimension of 1 stays 1."""
    for dimension, (blocks, size) in enumerate(zip(x.shape, shape, strict=True)):
        if 1 < blocks < size:
            x = jnp.repeat(x, size // blocks, axis=dimension)
    return x


def contract(
    x: Array, w: Array, count: int, axes: Axes, rules: ShardingRules, precision: jax.lax.Precision | None = None
) -> Array:
    """Contract the last `count` dimensions of `x` with the first of `w`; the result has the logical `axes`.

    Without a mesh both are reshaped to matrices first, which makes XLA's CPU matmul 20 % faster.
    """
    lead, kept = x.shape[: x.ndim - count], w.shape[count:]
    if no_mesh():
        inner = math.prod(w.shape[:count])
        return jnp.matmul(x.reshape(-1, inner), w.reshape(inner, -1), precision=precision).reshape(*lead, *kept)
    dims = ((tuple(range(x.ndim - count, x.ndim)), tuple(range(count))), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, out_sharding=activation_spec(rules, *axes))
