"""Key/value caches: one object per layer, with an interface that hides the kind of cache from the layer.

A layer appends the keys and values of its new tokens, and then attends with its queries:

    keys, cache = append(cache, k, v, ctx)      # cache: for the next call
    out = keys.attend(q, ctx, spec)             # keys: what the queries of this call attend to

    no cache     `WholeRows`: the call contains whole rows (training, scoring)
    contiguous   `ContiguousCache`: every token of a row at its index
    ring         `RingCache`: the last `window` tokens, for sliding-window layers
    latent       `LatentCache`: latents that give the keys and values of all heads (model/attention/latent.py)

To add a paged or quantised cache, write a class with these two methods: `ctx` carries the page table and the indices.

Shapes: B batch, T new tokens, S capacity, W window, N query heads, K key/value heads, H head dimension, V value
dimension, C numbers of a latent, R layers of a scan group.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.attend import AttendSpec, attend_cached, attend_latent, attend_rows
from model.context import ForwardContext
from sharding.rules import ShardingRules, activation_spec, reshard


class Keys(Protocol):
    """The keys and values that the queries of one call attend to."""

    def attend(self, q_BTNH: Array, ctx: ForwardContext, spec: AttendSpec) -> Array:
        """Return [B, T, N, V]: the attention of this call's queries."""
        ...


class LayerCache(Protocol):
    """The state that one layer keeps between calls: a pytree whose shapes never change."""

    def append(self, k: Array, v: Array | None, ctx: ForwardContext) -> tuple[Keys, Any]:
        """Return (the keys of this call's queries, the cache with the new tokens at `ctx.cache_index_BT`)."""
        ...


def append(cache: LayerCache | None, k: Array, v: Array | None, ctx: ForwardContext) -> tuple[Keys, LayerCache | None]:
    """Call `cache.append`. Without a cache, treat the new tokens as whole rows and keep nothing."""
    return (WholeRows(k, v), None) if cache is None else cache.append(k, v, ctx)


@dataclass(frozen=True, eq=False)
class WholeRows:
    """The rows of this call, from their first token to their last."""

    k: Array  # [B, T, K, H], or latents [B, T, C]
    v_BTKV: Array | None

    def attend(self, q_BTNH: Array, ctx: ForwardContext, spec: AttendSpec) -> Array:
        if self.v_BTKV is None:
            assert spec.latent is not None
            return attend_rows(spec, q_BTNH, *spec.latent.expand(self.k), ctx)
        k = self.k if spec.rope_after_cache is None else spec.rope_after_cache(self.k, ctx.positions_BT)
        return attend_rows(spec, q_BTNH, k, self.v_BTKV, ctx)


@partial(jax.tree_util.register_dataclass, data_fields=("k_BKSH", "v_BKSV"), meta_fields=("rules",))
@dataclass(frozen=True, eq=False)
class ContiguousCache:
    """Keys and values of every token at its index. Entries at and beyond a row's length are undefined."""

    k_BKSH: Float[Array, "B K S H"]
    v_BKSV: Float[Array, "B K S V"]
    rules: ShardingRules

    @classmethod
    def empty(
        cls,
        repeats: int,
        batch: int,
        heads: int,
        capacity: int,
        k_dim: int,
        v_dim: int,
        dtype: Any,
        rules: ShardingRules,
    ) -> ContiguousCache:
        """Return a cache of zeros for `repeats` stacked layers."""
        zeros = partial(_zeros, rules, dtype, repeats, batch, heads, capacity)
        return cls(zeros(k_dim), zeros(v_dim), rules)

    def append(self, k: Array, v: Array | None, ctx: ForwardContext) -> tuple[ContiguousCache, ContiguousCache]:
        assert v is not None
        k_BKTH, v_BKTV = _heads_first(k, v, self.rules)
        start_BK = reshard(jnp.broadcast_to(ctx.start_B[:, None], k_BKTH.shape[:2]), self.rules, "batch", "kv_heads")
        k_BKSH, v_BKSV = _write(self.k_BKSH, k_BKTH, start_BK), _write(self.v_BKSV, v_BKTV, start_BK)
        cache = ContiguousCache(k_BKSH, v_BKSV, self.rules)
        return cache, cache

    def attend(self, q_BTNH: Array, ctx: ForwardContext, spec: AttendSpec) -> Array:
        k_BKSH = self.k_BKSH
        if spec.rope_after_cache is not None:
            batch, _, capacity, _ = k_BKSH.shape
            positions_BS = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, capacity))
            k_BSKH = k_BKSH.transpose(0, 2, 1, 3).astype(q_BTNH.dtype)
            k_BKSH = spec.rope_after_cache(k_BSKH, positions_BS).transpose(0, 2, 1, 3)
        return attend_cached(spec, q_BTNH, k_BKSH, self.v_BKSV, ctx.start_B, ctx.prefix_BT)


@partial(jax.tree_util.register_dataclass, data_fields=("k_BKWH", "v_BKWV"), meta_fields=("rules",))
@dataclass(frozen=True, eq=False)
class RingCache:
    """The last W tokens of each row, token i at i mod W: all that a layer with a sliding window of W attends to."""

    k_BKWH: Float[Array, "B K W H"]
    v_BKWV: Float[Array, "B K W V"]
    rules: ShardingRules

    @classmethod
    def empty(
        cls, repeats: int, batch: int, heads: int, window: int, k_dim: int, v_dim: int, dtype: Any, rules: ShardingRules
    ) -> RingCache:
        """Return a cache of zeros for `repeats` stacked layers."""
        zeros = partial(_zeros, rules, dtype, repeats, batch, heads, window)
        return cls(zeros(k_dim), zeros(v_dim), rules)

    def append(self, k: Array, v: Array | None, ctx: ForwardContext) -> tuple[Keys, RingCache]:
        """Append the valid tokens. Padding (`ctx.valid_BT` False, after the row's tokens) is masked like any later
        token and is not stored."""
        assert v is not None
        window, T = self.k_BKWH.shape[2], k.shape[1]
        k_BKTH, v_BKTV = _heads_first(k, v, self.rules)
        valid_BT = reshard(ctx.valid_BT, self.rules, "batch", None)
        index_BT = reshard(ctx.cache_index_BT, self.rules, "batch", None)
        # Store only the last W valid tokens of this call: those before them would be overwritten in the same call.
        kept_BT = valid_BT & (jnp.arange(T) >= valid_BT.sum(1, keepdims=True) - window)
        ring_index_BT = jnp.where(kept_BT, index_BT % window, window)
        ring_index_BKT = jnp.broadcast_to(ring_index_BT[:, None], k_BKTH.shape[:3])
        ring_index_BKT = reshard(ring_index_BKT, self.rules, "batch", "kv_heads", None)
        cache = RingCache(
            _scatter(self.k_BKWH, k_BKTH, ring_index_BKT), _scatter(self.v_BKWV, v_BKTV, ring_index_BKT), self.rules
        )
        if T == 1:
            return _Ring(cache.k_BKWH, cache.v_BKWV, jnp.minimum(ctx.start_B, window - 1), None), cache
        # Earlier queries of this call attend to tokens that the last tokens overwrite, so attend to the old ring in its
        # order, followed by the new tokens.
        before_BW = reshard(ctx.start_B, self.rules, "batch")[:, None] - window + jnp.arange(window)
        k_BKSH, v_BKSV = (
            jnp.concatenate((_gather(old, before_BW % window), new.astype(old.dtype)), axis=2)
            for old, new in ((self.k_BKWH, k_BKTH), (self.v_BKWV, v_BKTV))
        )
        visible_BS = jnp.concatenate((before_BW >= 0, jnp.ones_like(valid_BT)), axis=1)
        return _Ring(k_BKSH, v_BKSV, jnp.full_like(ctx.start_B, window), visible_BS), cache


@dataclass(frozen=True, eq=False)
class _Ring:
    """The keys visible to the queries of one call, in an order that ends with the call's own tokens."""

    k_BKSH: Array
    v_BKSV: Array
    offset_B: Array  # index of the first query among them
    visible_BS: Array | None

    def attend(self, q_BTNH: Array, ctx: ForwardContext, spec: AttendSpec) -> Array:
        return attend_cached(spec, q_BTNH, self.k_BKSH, self.v_BKSV, self.offset_B, None, self.visible_BS)


@partial(jax.tree_util.register_dataclass, data_fields=("latent_B1SC",), meta_fields=("rules",))
@dataclass(frozen=True, eq=False)
class LatentCache:
    """The latents of every token at its index. On a mesh, all devices that share a row store all of its latents."""

    latent_B1SC: Float[Array, "B 1 S C"]
    rules: ShardingRules

    @classmethod
    def empty(
        cls, repeats: int, batch: int, capacity: int, width: int, dtype: Any, rules: ShardingRules
    ) -> LatentCache:
        """Return a cache of zeros for `repeats` stacked layers."""
        shape, spec = (repeats, batch, 1, capacity, width), activation_spec(rules, "layer", "batch", None, None, None)
        return cls(jnp.zeros(shape, dtype, out_sharding=spec), rules)

    def append(self, k: Array, v: Array | None, ctx: ForwardContext) -> tuple[LatentCache, LatentCache]:
        assert v is None, "a latent is both key and value"
        new_B1TC = reshard(k, self.rules, "batch", None, None)[:, None]
        start_B1 = reshard(ctx.cache_index_BT[:, :1], self.rules, "batch", None)
        cache = LatentCache(_write(self.latent_B1SC, new_B1TC, start_B1), self.rules)
        return cache, cache

    def attend(self, q_BTNH: Array, ctx: ForwardContext, spec: AttendSpec) -> Array:
        latent = spec.latent
        assert latent is not None
        if spec.few(q_BTNH.shape[1]):
            return latent.project(attend_latent(spec, latent.absorb(q_BTNH), self.latent_B1SC, ctx.start_B))
        k_BSNH, v_BSNV = latent.expand(self.latent_B1SC[:, 0].astype(q_BTNH.dtype))
        k_BNSH, v_BNSV = k_BSNH.transpose(0, 2, 1, 3), v_BSNV.transpose(0, 2, 1, 3)
        return attend_cached(spec, q_BTNH, k_BNSH, v_BNSV, ctx.start_B, ctx.prefix_BT)


def _zeros(rules: ShardingRules, dtype: Any, *shape: int) -> Array:
    return jnp.zeros(shape, dtype, out_sharding=activation_spec(rules, "layer", "batch", "kv_heads", None, None))


def _heads_first(k: Array, v: Array, rules: ShardingRules) -> tuple[Array, Array]:
    k_BKTH, v_BKTV = (reshard(y, rules, "batch", None, "kv_heads", None).transpose(0, 2, 1, 3) for y in (k, v))
    return k_BKTH, v_BKTV


def _write(cache_BKSH: Array, new_BKTH: Array, start_BK: Int[Array, "B K"]) -> Array:
    """Return the cache with each row's new entries from the row's start on.

    Each head gets a start, although all heads of a row have the same one: XLA then emits a scatter and runs it in
    place. Otherwise, for a batch of one, XLA would emit a dynamic_update_slice, fuse it into each reader, and copy the
    cache to preserve its old state.
    """
    write = lambda cache_SH, new_TH, start: jax.lax.dynamic_update_slice_in_dim(cache_SH, new_TH, start, axis=0)
    return jax.vmap(jax.vmap(write))(cache_BKSH, new_BKTH.astype(cache_BKSH.dtype), start_BK)


def _scatter(cache_BKWH: Array, new_BKTH: Array, ring_index_BKT: Int[Array, "B K T"]) -> Array:
    """Return the cache with each row's new entries at their ring indices; an index beyond the cache drops its entry.
    In place, for the reason given in `_write`."""
    scatter = lambda cache_WH, new_TH, ring_index_T: cache_WH.at[ring_index_T].set(new_TH, mode="drop")
    return jax.vmap(jax.vmap(scatter))(cache_BKWH, new_BKTH.astype(cache_BKWH.dtype), ring_index_BKT)


def _gather(cache_BKWH: Array, ring_index_BW: Int[Array, "B W"]) -> Array:
    """Return the entries of each row in the order of `ring_index_BW`."""
    heads = jax.vmap(lambda cache_WH, ring_index_W: cache_WH[ring_index_W], in_axes=(0, None))
    return jax.vmap(heads)(cache_BKWH, ring_index_BW)
