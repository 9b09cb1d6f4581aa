"""Layers, and the scan that runs them in order.

Shapes: B batch, T time, D width, L layers, R repetitions of a stack of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PRNGKeyArray

from model.attention import attention_variant
from model.balance import RouterStats
from model.cache import LayerCache
from model.config import LayerSpec, ModelConfig
from model.context import ForwardContext
from model.mlp import MLP
from model.moe import MoE
from model.norms import Norm
from model.weights import repeats
from sharding.rules import ShardingRules, no_mesh


class Block(nnx.Module):
    """One layer: attention, then an MLP or experts, each with its norms and residual connection."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, spec: LayerSpec):
        self.config = config
        attention_key, mlp_key = jax.random.split(key)
        self.attention = attention_variant(config.attention, spec.attention)(
            attention_key, config, rules, spec.attention
        )
        self.mlp = MoE(mlp_key, config, rules) if spec.moe else MLP(mlp_key, config, rules)

        def norm(name: str, wanted: bool) -> Norm | None:
            return Norm((config.embed_dim,), ("embed",), config.norm, rules, name) if wanted else None

        before, after = config.norm.placement != "post", config.norm.placement != "pre"
        self.attention_norm, self.mlp_norm = norm("attention_norm", before), norm("mlp_norm", before)
        self.attention_post_norm, self.mlp_post_norm = norm("attention_post_norm", after), norm("mlp_post_norm", after)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        ctx: ForwardContext,
        cache: LayerCache | None,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, RouterStats | None]:
        rate = self.config.dropout
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        y, cache = self.attention(_apply(self.attention_norm, x_BTD), ctx, cache)
        x_BTD = x_BTD + dropout(_apply(self.attention_post_norm, y), rate, keys[0])
        h = _apply(self.mlp_norm, x_BTD)
        stats = None
        if isinstance(self.mlp, MoE):
            router_key = None if dropout_key is None else jax.random.fold_in(dropout_key, 2)
            y, stats = self.mlp(h, ctx, router_key)
        else:
            y = self.mlp(h)
        return x_BTD + dropout(_apply(self.mlp_post_norm, y), rate, keys[1]), cache, stats


Stacks = Sequence[Sequence[Block]]  # scan groups in order; each is a pattern of layers whose weights have a leading R
Caches = tuple[tuple[LayerCache, ...], ...]  # caches in the structure of Stacks, with a leading R


class RunLayers(Protocol):
    """A function that runs every layer in order: `scan_layers`, or pipeline stages."""

    def __call__(
        self,
        config: ModelConfig,
        stacks: Stacks,
        x_BTD: Float[Array, "B T D"],
        ctx: ForwardContext,
        caches: Caches | None,
        keys: Key[Array, "L"] | None,
    ) -> tuple[Float[Array, "B T D"], Caches | None, RouterStats | None]:
        """Return (hidden states, caches with this call's tokens, router statistics with a leading axis over MoE
        layers).

        `keys`: one per layer [L], or None if nothing is random.
        """
        ...


def scan_layers(
    config: ModelConfig,
    stacks: Stacks,
    x_BTD: Float[Array, "B T D"],
    ctx: ForwardContext,
    caches: Caches | None,
    keys: Key[Array, "L"] | None,
) -> tuple[Float[Array, "B T D"], Caches | None, RouterStats | None]:
    """Implement `RunLayers` with one scan over the repetitions of each stack."""
    new_caches, stats, layer = [], [], 0
    for s, pattern in enumerate(stacks):
        count = repeats(pattern) * len(pattern)
        pattern_keys = None if keys is None else keys[layer : layer + count].reshape(repeats(pattern), len(pattern))
        layer += count
        x_BTD, cache, unit_stats = _scan(
            config, tuple(pattern), x_BTD, ctx, None if caches is None else caches[s], pattern_keys
        )
        new_caches.append(cache)
        if unit_stats is not None:
            stats.append(unit_stats)
    router = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None
    return x_BTD, None if caches is None else tuple(new_caches), router


def run_pattern(
    pattern: Sequence[Block], x_BTD: Array, ctx: ForwardContext, caches: Sequence[LayerCache] | None, keys: Array | None
) -> tuple[Array, tuple[LayerCache | None, ...] | None, RouterStats | None]:
    """Run one repetition of a pattern of layers, whose weights have no leading R. Return (x, caches, router statistics
    stacked over its MoE layers)."""
    new_caches, stats = [], []
    for i, block in enumerate(pattern):
        cache = None if caches is None else caches[i]
        x_BTD, cache, router = block(x_BTD, ctx, cache, None if keys is None else keys[i])
        new_caches.append(cache)
        if router is not None:
            stats.append(router)
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *stats) if stats else None
    return x_BTD, None if caches is None else tuple(new_caches), stacked


def _scan(
    config: ModelConfig, pattern: tuple[Block, ...], x_BTD, ctx: ForwardContext, caches, keys
) -> tuple[Any, Any, Any]:
    """Run one stack, without a loop if R is 1."""

    def body(x_BTD, scanned):
        pattern, caches, keys = scanned
        x_BTD, caches, stats = run_pattern(pattern, x_BTD, ctx, caches, keys)
        return x_BTD, (caches, stats)

    body = body if caches is not None else _remat(body, config)
    R = repeats(pattern)
    if R == 1:
        scanned = jax.tree.map(lambda leaf: leaf[0], (pattern, caches, keys))
        x_BTD, out = body(x_BTD, scanned)
        caches, stats = jax.tree.map(lambda leaf: leaf[None], out)
    else:
        x_BTD, (caches, stats) = jax.lax.scan(body, x_BTD, (pattern, caches, keys), unroll=config.scan_unroll or R)
    # [R, period, ...] -> layers in order
    return x_BTD, caches, None if stats is None else jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)


def _remat(layers, config: ModelConfig):
    """Return `layers` with the rematerialization policy of the config."""
    policies, names = jax.checkpoint_policies, config.remat_names
    if config.remat == "none":
        return layers
    policy = {
        "full": lambda: policies.nothing_saveable,
        "dots": lambda: policies.dots_with_no_batch_dims_saveable,
        "names": lambda: policies.save_only_these_names(*names),
        "offload": lambda: policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(names),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[config.remat]()
    return jax.checkpoint(layers, policy=policy, prevent_cse=False)


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Zero entries with probability `rate` and scale the rest by 1 / (1 - rate). Without a key, return `x`."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=None if no_mesh() else jax.typeof(x).sharding)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
