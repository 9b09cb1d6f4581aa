"""The decoder-only Transformer: one forward function for training, prefill and decoding.

Shapes: B batch, T time, D width, V vocabulary, R repeats of a stack of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from model.attend import LatentCache, LayerCache, Places
from model.attention import Attention, weight_std
from model.balance import RouterStats
from model.config import LayerSpec, ModelConfig, segments
from model.latent import LatentAttention
from model.mlp import MLP
from model.moe import MoE, Tokens
from model.norms import Norm
from model.positions import sinusoids
from model.routers import stochastic
from model.weights import matmul, normal, use
from sharding.rules import ShardingRules, activation_spec, no_mesh, reshard


class Block(nnx.Module):
    """One layer: attention and an MLP or experts, each with its norms and its residual."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, spec: LayerSpec):
        self.config, self.rules = config, rules
        attention_key, mlp_key = jax.random.split(key)
        kind = Attention if config.attention.latent is None else LatentAttention
        self.attention = kind(attention_key, config, rules, spec.attention)
        self.mlp = MoE(mlp_key, config, rules) if spec.moe else MLP(mlp_key, config, rules)
        before, after = config.norm.placement != "post", config.norm.placement != "pre"
        self.attention_norm, self.mlp_norm = (_norm(config, rules) if before else None for _ in range(2))
        self.attention_post_norm, self.mlp_post_norm = (_norm(config, rules) if after else None for _ in range(2))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        places: Places,
        tokens: Tokens,
        cache: LayerCache | LatentCache | None,
        dropout_key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | LatentCache | None, RouterStats | None]:
        rate = self.config.dropout
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        # Each kind of attention is given the cache that it made.
        y, cache = self.attention(_apply(self.attention_norm, x_BTD), places, cache)  # type: ignore[arg-type]
        x_BTD = x_BTD + dropout(_apply(self.attention_post_norm, y), rate, keys[0])
        h = _apply(self.mlp_norm, x_BTD)
        stats = None
        if isinstance(self.mlp, MoE):
            router_key = None if dropout_key is None else jax.random.fold_in(dropout_key, 2)
            y, stats = self.mlp(h, tokens, router_key)
        else:
            y = self.mlp(h)
        return x_BTD + dropout(_apply(self.mlp_post_norm, y), rate, keys[1]), cache, stats


class Transformer(nnx.Module):
    """Weights of the network. `stacks` holds, segment by segment, one Block a layer of the unit, with a leading R
    axis."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules):
        self.config, self.rules = config, rules
        D, V = config.embed_dim, config.vocab_size
        embed_key, position_key, head_key, layers_key = jax.random.split(key, 4)
        std = config.init.embedding_std
        self.embedding = normal(embed_key, (V, D), ("vocab", "embed"), std, rules)
        learned = config.position.kind == "learned"
        positions = (config.max_length, D)
        self.positions = normal(position_key, positions, (None, "embed"), std, rules) if learned else None
        stacks, layer = [], 0
        for segment in segments(config):
            unit = []
            for spec in segment.unit:
                keys = jax.vmap(lambda i: jax.random.fold_in(layers_key, i))(
                    jnp.arange(segment.repeats) * len(segment.unit) + layer
                )
                unit.append(jax.vmap(lambda k, s=spec: Block(k, config, rules, s))(keys))
                layer += 1
            layer += len(segment.unit) * (segment.repeats - 1)
            stacks.append(nnx.List(unit))
        self.stacks = nnx.List(stacks)
        self.final_norm = _norm(config, rules)
        head_std = weight_std(config, config.mup_base_dim or D)  # under muP it does not shrink with the width
        self.head = None if config.tied_embeddings else normal(head_key, (D, V), ("embed", "vocab"), head_std, rules)


class Output(NamedTuple):
    hidden_BTD: Float[Array, "B T D"]  # after the final norm; `logits` turns it into predictions
    cache: Cache | None
    router: RouterStats | None  # each value with a leading axis over the MoE layers


class Cache(NamedTuple):
    """Keys and values, or their latents, of every layer, and how many tokens each row holds."""

    stacks: tuple[tuple[LayerCache | LatentCache, ...], ...]  # as Transformer.stacks, leading R
    length_B: Int[Array, "B"]


def init_cache(model: Transformer, batch: int, capacity: int) -> Cache:
    """An empty cache for `batch` rows of up to `capacity` tokens, in the dtype of computation."""
    dtype = compute_dtype(model.config)
    stacks = tuple(
        tuple(block.attention.empty_cache(repeats(unit), batch, capacity, dtype) for block in unit)
        for unit in model.stacks
    )
    return Cache(stacks, jnp.zeros(batch, jnp.int32, out_sharding=activation_spec(model.rules, "batch")))


def forward(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    *,
    positions_BT: Int[Array, "B T"] | None = None,
    segment_ids_BT: Int[Array, "B T"] | None = None,
    prefix_BT: Bool[Array, "B T"] | None = None,
    valid_BT: Bool[Array, "B T"] | None = None,
    cache: Cache | None = None,
    dropout_key: PRNGKeyArray | None = None,
) -> Output:
    """The network up to its final norm.

    Packed rows give `segment_ids_BT` (0 is padding) and `positions_BT` that restart with each segment. With a `cache`
    the tokens continue each row where it stands (its length grows by T; rows of uneven prompts set the length
    themselves); positions are then slots. `valid_BT` leaves tokens (padding) out of the router's statistics and of the
    length that 'dynamic_ntk' scales by (default: segment_ids > 0).
    `dropout_key` switches dropout on, and what routers draw at random in training.
    """
    config, rules = model.config, model.rules
    B, T = tokens_BT.shape
    start_B = jnp.zeros(B, jnp.int32) if cache is None else cache.length_B
    slots_BT = start_B[:, None] + jnp.arange(T, dtype=jnp.int32)

    def lay(y_BT: Array) -> Array:
        return reshard(y_BT, rules, "batch", "sequence")

    tokens_BT, slots_BT = lay(tokens_BT), lay(slots_BT)
    positions_BT = slots_BT if positions_BT is None or cache is not None else lay(positions_BT)
    segment_ids_BT = None if segment_ids_BT is None or cache is not None else lay(segment_ids_BT)
    if valid_BT is None:
        valid_BT = jnp.ones_like(slots_BT, bool) if segment_ids_BT is None else segment_ids_BT > 0
    valid_BT = lay(valid_BT)
    length_B = jnp.where(valid_BT, positions_BT + 1, 0).max(1)
    places = Places(slots_BT, positions_BT, segment_ids_BT, None if prefix_BT is None else lay(prefix_BT), length_B)
    tokens = Tokens(tokens_BT, positions_BT, valid_BT, cached=cache is not None)

    x_BTD = _embed(model, tokens_BT, positions_BT)
    keys = None
    if dropout_key is not None and (config.dropout > 0 or stochastic(config.moe)):
        dropout_key, embed_key = jax.random.split(dropout_key)
        x_BTD = dropout(x_BTD, config.dropout, embed_key)
        keys = jax.random.split(dropout_key, config.num_layers)

    new_stacks, stats, layer = [], [], 0
    for s, unit in enumerate(model.stacks):
        rows, period = repeats(unit), len(unit)
        caches = None if cache is None else cache.stacks[s]
        unit_keys = None
        if keys is not None:
            unit_keys = keys[layer : layer + rows * period].reshape(rows, period)
        layer += rows * period
        x_BTD, caches, unit_stats = _run_stack(config, tuple(unit), x_BTD, places, tokens, caches, unit_keys)
        new_stacks.append(caches)
        if unit_stats is not None:
            stats.append(unit_stats)

    hidden_BTD = model.final_norm(x_BTD)
    new_cache = None if cache is None else Cache(tuple(new_stacks), cache.length_B + T)
    router = jax.tree.map(lambda *parts: jnp.concatenate(parts), *stats) if stats else None
    return Output(hidden_BTD, new_cache, router)


def logits(model: Transformer, hidden_BTD: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Float32 predictions [..., V] from the hidden states of `forward`."""
    config = model.config
    axes = (*("batch", "sequence")[: hidden_BTD.ndim - 1], "vocab")
    y = matmul(hidden_BTD, head_weight(model), 1, axes, model.rules).astype(jnp.float32)
    return config.final_softcap * jnp.tanh(y / config.final_softcap) if config.final_softcap is not None else y


def head_weight(model: Transformer) -> Float[Array, "D V"]:
    """The matrix from hidden states to logits (before the soft cap), in the dtype of computation; muP's 1/m
    included."""
    config, dtype = model.config, compute_dtype(model.config)
    if model.head is None:
        w = use(model.embedding, ("vocab", "embed"), dtype, model.rules).T
    else:
        w = use(model.head, ("embed", "vocab"), dtype, model.rules)
    return w if config.mup_base_dim is None else w * (config.mup_base_dim / config.embed_dim)


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The dtype of activations: `config.dtype`; 'auto' is float32 on CPUs, which lack bfloat16 arithmetic, else
    bfloat16."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def repeats(unit: Sequence[Block]) -> int:
    """R of a stack: how often its unit of layers is repeated."""
    return jax.tree.leaves(unit[0])[0].shape[0]


def unstack(model: Transformer) -> Transformer:
    """The same network with each layer a stack of its own, so that no loop over layers is left: for decoding on
    CPUs."""

    def pick(block: Block, i: int) -> Block:
        return jax.tree.map(lambda w: w[i : i + 1], block)

    flat = [nnx.List([pick(block, i)]) for unit in model.stacks for i in range(repeats(unit)) for block in unit]
    leaves, treedef = jax.tree.flatten(model)
    copy = jax.tree.unflatten(treedef, leaves)
    copy.stacks = nnx.List(flat)
    return copy


def dropout(x: Array, rate: float, key: PRNGKeyArray | None) -> Array:
    """Zeroes entries with probability `rate` and scales the rest by 1 / (1 - rate); nothing without a key."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape, out_sharding=None if no_mesh() else jax.typeof(x).sharding)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def _embed(model: Transformer, tokens_BT: Array, positions_BT: Array) -> Array:
    config, rules = model.config, model.rules
    dtype = compute_dtype(config)
    spec = activation_spec(rules, "batch", "sequence", "embed")
    x_BTD = use(model.embedding, ("vocab", "embed"), dtype, rules).at[tokens_BT].get(out_sharding=spec)
    if config.embedding_scale is not None:
        x_BTD = x_BTD * jnp.asarray(config.embedding_scale, dtype)
    if model.positions is not None:
        x_BTD = x_BTD + use(model.positions, (None, "embed"), dtype, rules).at[positions_BT].get(out_sharding=spec)
    if config.position.kind == "sinusoidal":
        x_BTD = x_BTD + sinusoids(positions_BT, config.embed_dim).astype(dtype)
    return x_BTD


def _run_stack(config, unit, x_BTD, places, tokens, caches, keys):
    """A scan over the R repetitions of a unit of layers; no scan where R is 1."""

    def layers(x_BTD, scanned):
        blocks, caches, keys = scanned
        new_caches, stats = [], []
        for i, block in enumerate(blocks):
            cache = None if caches is None else caches[i]
            x_BTD, cache, router = block(x_BTD, places, tokens, cache, None if keys is None else keys[i])
            new_caches.append(cache)
            if router is not None:
                stats.append(router)
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *stats) if stats else None
        return x_BTD, (None if caches is None else tuple(new_caches), stacked)

    body = layers if caches is not None else _remat(layers, config)
    rows = repeats(unit)
    if rows == 1:
        scanned = jax.tree.map(lambda leaf: leaf[0], (unit, caches, keys))
        x_BTD, out = body(x_BTD, scanned)
        caches, stats = jax.tree.map(lambda leaf: leaf[None], out)
    else:
        x_BTD, (caches, stats) = jax.lax.scan(body, x_BTD, (unit, caches, keys), unroll=config.scan_unroll or rows)
    # [R, period, ...] -> layers in order
    return x_BTD, caches, None if stats is None else jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)


def _remat(layers, config: ModelConfig):
    """`layers` with the configured choice of what the backward pass keeps."""
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


def _norm(config: ModelConfig, rules: ShardingRules) -> Norm:
    return Norm((config.embed_dim,), ("embed",), config.norm, rules)


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)
