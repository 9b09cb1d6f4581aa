"""Quantise weights to 8-bit integers with one scale per output: absolute maximum, round to nearest."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import jax.numpy as jnp

from model.weights import Tree, Weight, map_weights


def quantise(model: Tree, names: Collection[str]) -> Tree:
    """Return the network with the weights in `names` (by `Weight.name`, such as "mlp.up") as int8.

    Each output of each layer and expert has a float32 scale that maps its largest absolute value over the inputs to
    127.
    """

    def quantised(weight: Weight) -> Weight:
        if weight.name not in names:
            return weight
        first = weight.ndim - len(weight.axes) + weight.experts
        inputs = tuple(range(first, first + weight.inputs))
        scale = jnp.maximum(jnp.abs(weight.value).max(inputs, keepdims=True), jnp.finfo(jnp.float32).tiny) / 127.0
        return replace(weight, value=jnp.round(weight.value / scale).astype(jnp.int8), scale=scale)

    return map_weights(quantised, model)
