"""Low-rank adapters (LoRA, Hu et al. 2021, sec. 4.1): W + alpha / rank * down @ up, with W frozen."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from model.weights import Adapter, Tree, Weight, map_named_weights
from sharding.rules import weight_spec


def add_lora(model: Tree, names: Collection[str], rank: int, key: PRNGKeyArray, alpha: float | None = None) -> Tree:
    """Return the network with an adapter on every weight whose name (`Weight.name`: "attention.q") is in `names`.

    `down` is drawn from N(0, 1 / inputs) and `up` is zero, so the network's function does not change. `alpha` defaults
    to `rank`.
    """

    def added(path: str, weight: Weight) -> Weight:
        if weight.name not in names:
            return weight
        stacked = weight.ndim - len(weight.axes)
        cut = stacked + weight.experts + weight.inputs  # first output dimension
        lead = weight.shape[: stacked + weight.experts]
        axes = weight.adapter_axes()
        down_spec, up_spec = (weight_spec(weight.rules, *(None,) * stacked, *part) for part in axes)
        shape = (*weight.shape[:cut], rank)
        std = math.prod(weight.shape[len(lead) : cut]) ** -0.5
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        down = jax.random.normal(own_key, shape, jnp.float32, out_sharding=down_spec) * std
        up = jnp.zeros((*lead, rank, *weight.shape[cut:]), jnp.float32, out_sharding=up_spec)
        return replace(weight, adapter=Adapter(down, up, (rank if alpha is None else alpha) / rank))

    return map_named_weights(added, model)
