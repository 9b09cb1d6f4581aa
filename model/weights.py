"""Weights as values that know what they are.

A `Weight` holds the stored array, and with it all that using it takes: the logical axes of its dimensions, how many of
them are contracted, its role, and, if it has them, the scale of a quantised value and a low-rank adapter. Each weight
is made on one line that reads: shape, logical axes, standard deviation, role. It is stored in float32, sharded as
`rules.weights` says; `dot` and `gathered` cast it to the dtype of computation and lay it out as `rules.activations`
says. No layer does that by hand.
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
    "buffer",  # moved by the train step, never by a gradient (router_bias)
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
    """An array of a network, and what it is. Stacked layers add leading dimensions, which `axes` does not name."""

    value: Array  # as stored: float, or an integer or 8-bit float with `scale`
    scale: Array | None = None  # of value's rank, each dimension 1 or dividing value's: value * scale is the weight
    zero_point: Array | None = None  # shaped like scale: (value - zero_point) * scale is the weight
    adapter: Adapter | None = None
    name: str = ""  # "attention.q"; the same for every layer
    axes: Axes = ()  # logical axes
    inputs: int = 0  # dimensions that are contracted: the leading ones, after those of experts
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
        """Leading dimensions that count experts: 0 or 1."""
        return int(self.axes[:1] == ("expert",))

    def dot(self, x: Array, x_axes: Axes, precision: jax.lax.Precision | None = None) -> Array:
        """Contract the last `inputs` dimensions of `x` with the weight, in the dtype of `x`.

        Returns [*lead, *outputs], where `x_axes` are the logical axes of lead; the result is laid out as they and the
        weight's own output axes say. `precision`: accelerators round the factors of a float32 product to bfloat16 (TPU)
        or TF32 (GPU) unless it is HIGHEST. Not for experts, whose products are grouped (model/experts.py).
        """
        axes = (*x_axes, *self.axes[self.inputs :])
        if self.scale is not None and self.zero_point is None and self._scale_per_output():
            w = self._lay_out(self.value.astype(x.dtype), self.axes)
            names: Any = self.part_axes().scale
            scale = self._lay_out(self.scale, names).reshape(self.scale.shape[self.inputs :])
            # The scales of the outputs are applied to the product: fewer numbers than the weight has.
            y = (contract(x, w, self.inputs, axes, self.rules, precision) * scale).astype(x.dtype)
        else:
            y = contract(x, self._dense(x.dtype), self.inputs, axes, self.rules, precision)
        if self.adapter is None:
            return y
        down, up = (part.astype(x.dtype) for part in self._adapter_parts())
        rank = contract(x, down, self.inputs, (*x_axes, None), self.rules, precision)
        return y + self.adapter.factor * contract(rank, up, 1, axes, self.rules, precision)

    def gathered(self, dtype: jnp.dtype | type) -> Array:
        """Return the weight as one dense array of `dtype`, laid out as an activation: dequantised, its adapter
        added."""
        w = self._dense(dtype)
        if self.adapter is None:
            return w
        delta = self._delta(*self._adapter_parts(), None if no_mesh() else self.rules.spec("activations", self.axes))
        return w + delta.astype(dtype)

    def take(self, ids: Int[Array, "*B"], axes: Axes, dtype: jnp.dtype) -> Array:
        """Return rows `ids` [*B] of an embedding [N, D] as [*B, D] of `dtype`; `axes` are the logical axes of ids."""
        # The table is gathered along D first: a lookup in rows that are spread over devices is not supported.
        return self.gathered(dtype).at[ids].get(out_sharding=activation_spec(self.rules, *axes, *self.axes[1:]))

    def entering(self, dtype: jnp.dtype | type) -> tuple[Weight, Weight]:
        """Return (the weight, cast and laid out to enter shard_map, and its PartitionSpecs in the same tree).

        Dimensions lie over the devices that compute with them and, within those, over the devices that store them:
        `local` gathers them there, so that their gradients are reduced and scattered in one collective.
        """

        def cast(x: Array) -> Array:
            return x.astype(dtype) if self.scale is None and jnp.issubdtype(x.dtype, jnp.floating) else x

        weight = jax.tree.map(cast, self._without_blocks())
        specs = jax.tree.map(lambda x, names: self.rules.gathered(names)[0], weight, weight.part_axes())
        return jax.tree.map(jax.sharding.reshard, weight, specs), specs

    def local(self, dtype: jnp.dtype | type) -> Array:
        """Return, inside shard_map, this device's experts or columns as one dense array: what a kernel takes.

        Without a mesh this is the whole weight. See `entering`.
        """
        if no_mesh():
            return self.gathered(dtype)

        def gather(x: Array, names: Axes) -> Array:
            return gather_weight(x, self.rules.gathered(names)[1])

        whole = jax.tree.map(gather, self, self.part_axes())
        w = _dequantised(whole.value, whole.scale, whole.zero_point, dtype)
        if whole.adapter is None:
            return w
        return w + whole._delta(whole.adapter.down, whole.adapter.up, None).astype(dtype)

    def matrix_dims(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return (input, output) dimensions of the matrices that the stored value holds; None for vectors and buffers.

        What is in neither counts matrices: stacked layers, experts, and the two projections of a gated MLP.
        """
        if self.role in ("vector", "buffer"):
            return None
        first = self.value.ndim - len(self.axes) + self.experts
        outputs = range(first + self.inputs, self.value.ndim)
        kept = tuple(d for d in outputs if self.axes[d - self.value.ndim] != "gate")
        return tuple(range(first, first + self.inputs)), kept

    def _dense(self, dtype: jnp.dtype | type) -> Array:
        """The value at use, without the adapter. The cast comes first: half the bytes are gathered."""
        if self.scale is None:
            return self._lay_out(self.value.astype(dtype), self.axes)
        weight = replace(self._without_blocks(), adapter=None)
        weight = jax.tree.map(self._lay_out, weight, weight.part_axes())
        return _dequantised(weight.value, weight.scale, weight.zero_point, dtype)

    def _without_blocks(self) -> Weight:
        """Scales of blocks as scales of single numbers, where a mesh may cut through a block."""
        if no_mesh() or self.scale is None:
            return self

        def spread(x: Array) -> Array:
            if all(blocks in (1, size) for blocks, size in zip(x.shape, self.shape, strict=True)):
                return x
            whole = _spread(jax.sharding.reshard(x, P(*(None,) * x.ndim)), self.shape)
            names = tuple(a if n > 1 else None for a, n in zip(self.axes, whole.shape, strict=True))
            return jax.sharding.reshard(whole, self.rules.spec("weights", names))

        zero_point = None if self.zero_point is None else spread(self.zero_point)
        return replace(self, scale=spread(self.scale), zero_point=zero_point)

    def _scale_per_output(self) -> bool:
        """Whether each output has one scale, or all have the same."""
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
        return self._lay_out(self.adapter.down, down), self._lay_out(self.adapter.up, up)

    def _delta(self, down: Array, up: Array, spec: P | None) -> Array:
        """factor * down @ up, for each expert."""
        assert self.adapter is not None
        lead = tuple(range(self.experts))
        dims = (((down.ndim - 1,), (self.experts,)), (lead, lead))
        return self.adapter.factor * jax.lax.dot_general(down, up, dims, out_sharding=spec)

    def part_axes(self) -> Weight:
        """The logical axes of every array in this weight, in its own tree."""
        adapter: Any = None
        if self.adapter is not None:
            names: Any = self.adapter_axes()
            adapter = replace(self.adapter, down=names[0], up=names[1])
        axes: Any = self.axes  # in the place of an array

        def along(part: Array | None) -> Any:
            """A dimension that is shorter than the value's is shared along it, and lies over no devices."""
            if part is None:
                return None
            shapes = part.shape[-len(axes) :], self.shape[-len(axes) :]
            return tuple(a if n == size else None for a, n, size in zip(axes, *shapes, strict=True))

        return replace(self, value=axes, scale=along(self.scale), zero_point=along(self.zero_point), adapter=adapter)

    def _lay_out(self, w: Array, axes: Axes) -> Array:
        """`w` laid out as an activation. One dimension after the other: XLA makes an all-reduce of a gather along two
        at once, which sends twice as much."""
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
    """A float32 weight drawn from N(0, std^2); its values do not depend on its sharding."""
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
    """A float32 weight of equal values (norm scales, biases, sinks)."""
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
    """Whether `x` is a Weight: `is_leaf` of tree functions that treat weights as wholes."""
    return isinstance(x, Weight)


def map_weights(f: Callable[..., Any], *models: Any) -> Any:
    """`f(weight, ...)` of every Weight of one or more networks of one structure, in the structure of the first."""
    return jax.tree.map(f, *models, is_leaf=is_weight)


def named_weights(model: Any) -> list[tuple[str, Weight]]:
    """(dotted path, weight) of every Weight in order: ("stacks.0.1.attention.q", ...)."""
    found, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_weight)
    return [(_dotted(path), weight) for path, weight in found]


def map_named_weights(f: Callable[[str, Weight], Any], model: Tree) -> Tree:
    """`f(dotted path, weight)` of every Weight of a network, in its structure."""
    return jax.tree_util.tree_map_with_path(lambda path, w: f(_dotted(path), w), model, is_leaf=is_weight)


def repeats(unit: Any) -> int:
    """Return R of a stack: how often its unit of layers is repeated, the leading dimension of every weight in it."""
    return jax.tree.leaves(unit)[0].shape[0]


def dense_weights(model: Tree) -> Tree:
    """Return the network with every weight as one float32 array: dequantised, its adapter added."""

    def dense(weight: Weight) -> Weight:
        if weight.scale is None and weight.adapter is None:
            return weight
        whole: Callable[[Weight], Array] = lambda w: w.gathered(jnp.float32)
        for _ in range(weight.ndim - len(weight.axes)):  # stacked layers
            whole = jax.vmap(whole)
        value = whole(weight)
        if not no_mesh():
            value = jax.sharding.reshard(value, jax.typeof(weight.value).sharding)
        return replace(weight, value=value, scale=None, zero_point=None, adapter=None)

    return map_weights(dense, model)


def split(model: Tree, rule: Callable[[str, Weight, str], bool]) -> tuple[Tree, Tree]:
    """Return (what `rule(path, weight, part)` selects, the rest): two trees of the model's structure, with None where
    an array is in the other one. `path` is dotted; `part` is one of PARTS."""

    def side(wanted: bool) -> Tree:
        def parts(path: str, weight: Weight) -> Weight:
            kept = {part: bool(rule(path, weight, part)) == wanted for part in PARTS}
            keep = lambda part: jax.tree.map(lambda x: x if kept[part] else None, getattr(weight, part))
            return replace(weight, **{part: keep(part) for part in PARTS})

        return map_named_weights(parts, model)

    return side(True), side(False)


def merge(selected: Tree, rest: Tree) -> Tree:
    """The inverse of `split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, selected, rest, is_leaf=lambda x: x is None)


def _dotted(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _dequantised(value: Array, scale: Array | None, zero_point: Array | None, dtype: jnp.dtype | type) -> Array:
    """(value - zero_point) * scale in float32, as `dtype`. A scale that is shorter along a dimension holds for
    blocks."""
    if scale is None:
        return value.astype(dtype)

    w = value.astype(jnp.float32)
    if zero_point is not None:
        w = w - _spread(zero_point, value.shape).astype(jnp.float32)
    return (w * _spread(scale, value.shape).astype(jnp.float32)).astype(dtype)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    """Return scales of blocks as scales of single numbers; a dimension of 1 stays."""
    for dimension, (blocks, size) in enumerate(zip(x.shape, shape, strict=True)):
        if 1 < blocks < size:
            x = jnp.repeat(x, size // blocks, axis=dimension)
    return x


def contract(
    x: Array, w: Array, count: int, axes: Axes, rules: ShardingRules, precision: jax.lax.Precision | None = None
) -> Array:
    """Contract the last `count` dimensions of `x` with the first of `w`; the result has the logical `axes`.

    Without a mesh both are reshaped to matrices first: XLA's CPU matmul is 20 % faster so.
    """
    lead, kept = x.shape[: x.ndim - count], w.shape[count:]
    if no_mesh():
        inner = math.prod(w.shape[:count])
        return jnp.matmul(x.reshape(-1, inner), w.reshape(inner, -1), precision=precision).reshape(*lead, *kept)
    dims = ((tuple(range(x.ndim - count, x.ndim)), tuple(range(count))), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, out_sharding=activation_spec(rules, *axes))
