"""Sizes and memory use of loading a published model, from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from interop.load import abstract, named
from interop.published import Published
from model.cost import ParameterCount, count_parameters
from sharding.rules import ShardingRules


class Plan(NamedTuple):
    """Sizes in bytes."""

    family: str
    summary: str  # '28 layers of width 1,024, 16 heads of 128 (8 of keys), vocabulary 151,936'
    parameters: ParameterCount
    tensors: dict[str, int]  # dtype on disk: number of tensors that the model needs
    files: tuple[str, ...]
    disk: int  # the tensors that the model needs, as `Source` returns them
    weights: int  # in the requested dtype, on all devices
    device: int  # of those, on one device
    largest: int  # the largest tensor, decoded if it is stored quantized


def plan(published: Published, dtype: str, rules: ShardingRules, mesh: Mesh | None = None) -> Plan:
    """Return the plan for loading a published model as `dtype` on `mesh`, without allocating anything."""
    config, source = published.config, published.source
    infos = {entry.name: source.tensors[entry.name] for entry in published.tensor_map}
    sizes = {name: math.prod(info.shape) * np.dtype(info.dtype).itemsize for name, info in infos.items()}
    weights = named(abstract(config, rules, mesh, dtype))
    return Plan(
        family=published.family,
        summary=_summary(published),
        parameters=count_parameters(config),
        tensors=dict(Counter(info.dtype for info in infos.values())),
        files=tuple(sorted({info.file for info in infos.values()})),
        disk=sum(sizes.values()),
        weights=sum(_bytes(x.shape, x.dtype) for x in weights.values()),
        device=sum(_bytes(x.sharding.shard_shape(x.shape), x.dtype) for x in weights.values()),
        largest=max(sizes.values()),
    )


def _bytes(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _summary(published: Published) -> str:
    config, a = published.config, published.config.attention
    keys = f" ({a.num_kv_heads} of keys)" if a.num_kv_heads != a.num_heads else ""
    experts = f", {config.moe.num_experts} experts ({config.moe.top_k} a token)" if config.moe is not None else ""
    return (
        f"{config.num_layers} layers of width {config.embed_dim:,}, {a.num_heads} heads of "
        f"{a.head_dim}{keys}{experts}, vocabulary {config.vocab_size:,}"
    )
