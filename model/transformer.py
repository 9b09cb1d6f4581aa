"""The decoder-only Transformer: one forward function for training, prefill and decoding.

Shapes: B batch, T time, D width, V vocabulary, R repetitions of a stack of layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from model.balance import RouterStats
from model.config import ModelConfig, scan_groups
from model.context import ForwardContext
from model.layers import Block, Caches, RunLayers, Stacks, dropout, scan_layers
from model.norms import Norm
from model.positions import sinusoids
from model.routers import stochastic
from model.weights import contract, normal, repeats, weight_std
from sharding.rules import ShardingRules, activation_spec, reshard


class Transformer(nnx.Module):
    """Weights of the network. For each segment, `stacks` holds one Block per layer of the pattern, with a leading R
    axis."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules):
        self.config, self.rules = config, rules
        D, V = config.embed_dim, config.vocab_size
        embed_key, position_key, head_key, layers_key = jax.random.split(key, 4)
        std = config.init.embedding_std
        made = partial(normal, rules=rules, role="embedding")
        self.embedding = made(embed_key, (V, D), ("vocab", "embed"), std, name="embedding")
        learned = config.position.kind == "learned"
        positions = (config.max_length, D)
        self.positions = made(position_key, positions, (None, "embed"), std, name="positions") if learned else None
        stacks, layer = [], 0
        for group in scan_groups(config):
            pattern = []
            for spec in group.pattern:
                keys = jax.vmap(lambda i: jax.random.fold_in(layers_key, i))(
                    jnp.arange(group.repeats) * len(group.pattern) + layer
                )
                pattern.append(jax.vmap(lambda k, s=spec: Block(k, config, rules, s))(keys))
                layer += 1
            layer += len(group.pattern) * (group.repeats - 1)
            stacks.append(nnx.List(pattern))
        self.stacks = nnx.List(stacks)
        self.final_norm = Norm((D,), ("embed",), config.norm, rules, "final_norm")
        head_std = weight_std(config, config.mup_base_dim or D)  # under muP it does not depend on the width
        tied = config.tied_embeddings
        self.head = None if tied else made(head_key, (D, V), ("embed", "vocab"), head_std, name="head")


class Output(NamedTuple):
    hidden_BTD: Float[Array, "B T D"]  # after the final norm; `logits` maps it to predictions
    cache: Cache | None
    router: RouterStats | None  # statistics with a leading axis over the MoE layers


@partial(jax.tree_util.register_dataclass, data_fields=("stacks", "length_B"), meta_fields=("capacity",))
@dataclass(frozen=True, eq=False)
class Cache:
    """The caches of all layers, and the number of tokens in each row."""

    stacks: Caches
    length_B: Int[Array, "B"]
    capacity: int  # tokens that a row can hold

    def at_length(self, length_B: Int[Array, "B"]) -> Cache:
        """Return the cache with its rows cut to these lengths: the next tokens overwrite everything after them.

        Only padding (`valid_BT` False when appended) may be cut off: in a ring cache every valid token has overwritten
        an older one of the window. To cut valid tokens off, append the rest of the row to a new cache.
        """
        return replace(self, length_B=length_B)


def init_cache(model: Transformer, batch: int, capacity: int) -> Cache:
    """Return an empty cache for `batch` rows of up to `capacity` tokens, in the dtype of computation."""
    dtype = compute_dtype(model.config)
    stacks = tuple(
        tuple(block.attention.init_cache(repeats(pattern), batch, capacity, dtype) for block in pattern)
        for pattern in model.stacks
    )
    length_B = jnp.zeros(batch, jnp.int32, out_sharding=activation_spec(model.rules, "batch"))
    return Cache(stacks, length_B, capacity)


def forward(
    model: Transformer,
    tokens_BT: Int[Array | np.ndarray, "B T"],
    *,
    positions_BT: Int[Array | np.ndarray, "B T"] | None = None,
    segment_ids_BT: Int[Array | np.ndarray, "B T"] | None = None,
    prefix_BT: Bool[Array | np.ndarray, "B P"] | None = None,
    valid_BT: Bool[Array | np.ndarray, "B T"] | None = None,
    cache: Cache | None = None,
    dropout_key: PRNGKeyArray | None = None,
    run_layers: RunLayers = scan_layers,
) -> Output:
    """Run the network up to its final norm.

    For packed rows, pass `segment_ids_BT` (0 is padding) and `positions_BT` that restart with each group. With a
    `cache` the tokens continue each row at its length, which grows by T (`Cache.at_length` sets it for prompts of
    uneven length). A row of a cache is one document, so segments and positions are refused. `valid_BT` excludes tokens
    (padding) from router statistics, from ring caches and from the length that 'dynamic_ntk' scales by (default:
    segment_ids > 0). `dropout_key` enables dropout and the random draws of routers, for training. `run_layers` runs the
    layers: a scan, or pipeline stages.

    Raises ValueError for incompatible arguments, and for tokens beyond the capacity of the cache. Inside jit, lengths
    are unknown, so a row that overflows gets NaN hidden states instead.
    """
    config = model.config
    ctx = _context(model, tokens_BT, positions_BT, segment_ids_BT, prefix_BT, valid_BT, cache)
    x_BTD = _embed(model, ctx)
    keys = None
    if dropout_key is not None and (config.dropout > 0 or stochastic(config.moe)):
        dropout_key, embed_key = jax.random.split(dropout_key)
        x_BTD = dropout(x_BTD, config.dropout, embed_key)
        keys = jax.random.split(dropout_key, config.num_layers)
    caches = None if cache is None else cache.stacks
    x_BTD, caches, router = run_layers(config, model.stacks, x_BTD, ctx, caches, keys)
    hidden_BTD = model.final_norm(x_BTD)
    if cache is None or caches is None:
        return Output(hidden_BTD, None, router)
    T = tokens_BT.shape[1]
    fits_B = reshard(cache.length_B + T <= cache.capacity, model.rules, "batch")
    hidden_BTD = jnp.where(fits_B[:, None, None], hidden_BTD, jnp.nan)
    return Output(hidden_BTD, Cache(caches, cache.length_B + T, cache.capacity), router)


def _context(
    model: Transformer, tokens_BT, positions_BT, segment_ids_BT, prefix_BT, valid_BT, cache: Cache | None
) -> ForwardContext:
    B, T = tokens_BT.shape
    if cache is not None:
        if segment_ids_BT is not None or positions_BT is not None:
            given = "segment_ids_BT" if segment_ids_BT is not None else "positions_BT"
            raise ValueError(
                f"forward: {given} with a cache: each row of a cache is one document, whose positions are its cache "
                f"indices. Leave out {given}, or the cache"
            )
        _check_capacity(cache, T)
    start_B = jnp.zeros(B, jnp.int32) if cache is None else cache.length_B

    def rows(y_BT: Array | np.ndarray) -> Array:
        return reshard(jnp.asarray(y_BT), model.rules, "batch", "sequence")

    tokens_BT, index_BT = rows(tokens_BT), rows(start_B[:, None] + jnp.arange(T, dtype=jnp.int32))
    positions_BT = index_BT if positions_BT is None else rows(positions_BT)
    segment_ids_BT = None if segment_ids_BT is None else rows(segment_ids_BT)
    if valid_BT is None:
        valid_BT = jnp.ones_like(index_BT, bool) if segment_ids_BT is None else segment_ids_BT > 0
    valid_BT = rows(valid_BT)
    length_B = jnp.where(valid_BT, positions_BT + 1, 0).max(1)
    prefix_BT = None if prefix_BT is None else rows(prefix_BT)
    return ForwardContext(
        tokens_BT, positions_BT, valid_BT, index_BT, segment_ids_BT, prefix_BT, length_B, decoding=cache is not None
    )


def _check_capacity(cache: Cache, T: int) -> None:
    """Raise ValueError for tokens beyond the capacity. Inside jit, where lengths are unknown, check T alone."""
    known = not isinstance(cache.length_B, jax.core.Tracer)
    longest = int(cache.length_B.max()) if known else 0
    if longest + T > cache.capacity:
        raise ValueError(
            f"forward: {T} tokens for a cache of capacity {cache.capacity} whose longest row holds {longest}; "
            "create it with a larger capacity (init_cache), or start a new one"
        )


def logits(model: Transformer, hidden_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Return float32 predictions [..., V] from the hidden states of `forward`."""
    config = model.config
    axes = (*("batch", "sequence")[: hidden_BTD.ndim - 1], "vocab")
    y = contract(hidden_BTD, head_weight(model), 1, axes, model.rules).astype(jnp.float32)
    return config.final_softcap * jnp.tanh(y / config.final_softcap) if config.final_softcap is not None else y


def head_weight(model: Transformer) -> Float[Array, "D V"]:
    """Return the matrix from hidden states to logits (before the soft cap), in the dtype of computation and with muP's
    factor 1/m."""
    config, dtype = model.config, compute_dtype(model.config)
    w = model.embedding.gathered(dtype).T if model.head is None else model.head.gathered(dtype)
    return w if config.mup_base_dim is None else w * (config.mup_base_dim / config.embed_dim)


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the dtype of activations. 'auto' means float32 on CPUs, which lack bfloat16 arithmetic, and bfloat16
    elsewhere."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def with_stacks(model: Transformer, stacks: Stacks) -> Transformer:
    """Return the network with `stacks` as its scan groups of layers."""
    leaves, treedef = jax.tree.flatten(model)
    copy = jax.tree.unflatten(treedef, leaves)
    copy.stacks = nnx.List([nnx.List(pattern) for pattern in stacks])
    return copy


def unstack(model: Transformer) -> Transformer:
    """Return the same network with one stack per layer, which removes the loop over layers, for decoding on
    CPUs."""

    def pick(block: Block, i: int) -> Block:
        return jax.tree.map(lambda w: w[i : i + 1], block)

    return with_stacks(
        model, [[pick(block, i)] for pattern in model.stacks for i in range(repeats(pattern)) for block in pattern]
    )


def split_layers(model: Transformer, last: int) -> Transformer:
    """Return the same network with its stacks split before the last `last` layers, so that these have their own arrays.

    A split inside a repetition turns that repetition into single layers. Raises ValueError if `last` is not in [0,
    num_layers].
    """
    if not 0 <= last <= model.config.num_layers:
        raise ValueError(f"last = {last}: must be between 0 and model.num_layers = {model.config.num_layers}")
    stacks: list[list[Block]] = []
    first, cut = 0, model.config.num_layers - last
    for pattern in model.stacks:
        period, R = len(pattern), repeats(pattern)
        before, inside = divmod(min(max(cut - first, 0), period * R), period)
        part = lambda low, high, pattern=pattern: [jax.tree.map(lambda w: w[low:high], block) for block in pattern]
        if before:
            stacks.append(part(0, before))
        if inside:
            stacks += [[block] for block in part(before, before + 1)]
        if before + bool(inside) < R:
            stacks.append(part(before + bool(inside), R))
        first += period * R
    return with_stacks(model, stacks)


def _embed(model: Transformer, ctx: ForwardContext) -> Array:
    config, dtype, axes = model.config, compute_dtype(model.config), ("batch", "sequence")
    x_BTD = model.embedding.take(ctx.token_ids_BT, axes, dtype)
    if config.embedding_scale is not None:
        x_BTD = x_BTD * jnp.asarray(config.embedding_scale, dtype)
    if model.positions is not None:
        x_BTD = x_BTD + model.positions.take(ctx.positions_BT, axes, dtype)
    if config.position.kind == "sinusoidal":
        x_BTD = x_BTD + sinusoids(ctx.positions_BT, config.embed_dim).astype(dtype)
    return x_BTD
