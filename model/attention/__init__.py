"""Attention variants. Each is one file with a module class that implements the protocol below and owns its config.

The kind of a layer (`AttentionConfig.layers`) chooses the variant: 'global', 'sliding' and 'block_sparse' are masks of
multi-head attention, or of latent attention where `AttentionConfig.latent` is set; 'package.module:Class' is a user's
variant, which needs no change to this code.

Shapes: B batch, T time, D width.
"""

from __future__ import annotations

import importlib
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from model.attention.latent import LatentAttention
from model.attention.multi_head import MultiHeadAttention
from model.cache import LayerCache
from model.config import AttentionConfig, ModelConfig
from model.context import ForwardContext
from sharding.rules import ShardingRules

__all__ = ["AttentionVariant", "LatentAttention", "MultiHeadAttention", "attention_variant"]


class AttentionVariant(Protocol):
    """The interface between a Block and its attention. Implementations are nnx modules, stacked by vmap over their
    key."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, kind: str): ...

    def __call__(
        self, x_BTD: Float[Array, "B T D"], ctx: ForwardContext, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Return (output, the cache with this call's tokens or None without a cache)."""
        ...

    def init_cache(self, repeats: int, batch: int, capacity: int, dtype: jnp.dtype) -> LayerCache:
        """Return an empty cache for `repeats` stacked layers and rows of up to `capacity` tokens."""
        ...

    @staticmethod
    def flops(config: ModelConfig, kind: str, length: int) -> float:
        """Return the forward FLOPs per token of a window of `length`, by the convention of model/cost.py."""
        ...

    @staticmethod
    def divisibility(config: ModelConfig) -> list[tuple[str, str, int]]:
        """Return (field, logical axis, size) of every dimension that a mesh must divide."""
        ...


def attention_variant(a: AttentionConfig, kind: str) -> type[AttentionVariant]:
    """Return the attention class for layers of this kind. Raises ValueError if a 'package.module:Class' is not
    found."""
    if ":" in kind:
        module, _, name = kind.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"model.attention.layers = {kind!r}: not found ({error}). Use 'package.module:Class' of a module on "
                "the Python path"
            ) from error
    return MultiHeadAttention if a.latent is None else LatentAttention
