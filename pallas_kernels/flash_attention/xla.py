"""Attention in tiles of plain JAX, for CPUs and for calls that no kernel runs: any device, any feature, O(T) memory.

A loop over a list of (tile of queries, tile of keys) visits only tiles that may hold a visible pair, and updates the
accumulators of all queries (and keys) in place.

Shapes: B batch, T queries, S keys, K key/value heads, G query heads per key/value head, H head dimension, V head
dimension of the values; t, s: the queries and keys of a tile.
"""

from __future__ import annotations

from math import gcd, isqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.mask import EMPTY, MASKED, tile_kinds, visible
from pallas_kernels.flash_attention.spec import Extra, Shaped, Spec
from pallas_kernels.target import target

TILE = 512  # queries and keys per step, on accelerators
# On CPUs, the least and most queries and keys per step; between them, a step's float32 logits take CPU_BYTES of cache.
CPU_TILE, CPU_BYTES = (64, 128), 1 << 20


def unsupported(spec: Spec, q: Shaped, k: Shaped, v: Shaped, extra: Extra) -> str | None:
    """Return None: this implementation runs every call."""
    return None


class Tile(NamedTuple):
    """A tile: its first query and first key (traced), and the number of each."""

    t: Array
    s: Array
    queries: int
    keys: int

    def of_queries(self, x: Array) -> Array:
        """Return x[:, :, :, t]."""
        return jax.lax.dynamic_slice_in_dim(x, self.t, self.queries, axis=3)

    def of_keys(self, x: Array) -> Array:
        """Return x[:, :, s]."""
        return jax.lax.dynamic_slice_in_dim(x, self.s, self.keys, axis=2)

    def set_queries(self, x: Array, new: Array) -> Array:
        """Return `x` with `new` at the tile's queries."""
        return jax.lax.dynamic_update_slice_in_dim(x, new, self.t, axis=3)

    def add_queries(self, x: Array, new: Array) -> Array:
        """Return `x` with `new` added at the tile's queries."""
        return self.set_queries(x, self.of_queries(x) + new)

    def add_keys(self, x: Array, new: Array) -> Array:
        """Return `x` with `new` added at the tile's keys."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.of_keys(x) + new, self.s, axis=2)


def forward(spec: Spec, q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, extra: Extra) -> tuple[Array, Array]:
    """See spec.py."""
    walk = _Walk(spec, q_BTNH.shape, k_BSKH.shape, extra)
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q, k, v = walk.queries(q_BTNH), walk.keys(k_BSKH), walk.keys(v_BSKV)

    def step(carry, tile: Tile):
        out, top, total = (tile.of_queries(x) for x in carry)
        logits, _ = walk.logits(tile.of_queries(q), tile.of_keys(k), tile)
        new_top = jnp.maximum(top, logits.max(-1))
        # The weights of a query that has not seen a key yet are all zero.
        weights = jnp.exp(logits - jnp.maximum(new_top, MASKED / 2)[..., None])
        shrink = jnp.exp(top - new_top)
        dropped = walk.drop(weights, tile).astype(v.dtype)
        out = out * shrink[..., None] + _dot("bkgts,bksv->bkgtv", dropped, tile.of_keys(v), wide)
        new = out, new_top, total * shrink + weights.sum(-1)
        return tuple(tile.set_queries(x, y) for x, y in zip(carry, new, strict=True))

    top, total = jnp.full(q.shape[:-1], MASKED, wide), jnp.zeros(q.shape[:-1], wide)
    if extra.sinks_N is not None:
        top = jnp.broadcast_to(walk.of_heads(extra.sinks_N), top.shape).astype(wide)
        total = jnp.ones_like(total)
    out, top, total = walk.run(step, (jnp.zeros((*top.shape, v.shape[-1]), wide), top, total))
    has_keys = total > 0
    total = jnp.where(has_keys, total, 1.0)
    lse = jnp.where(has_keys, top + jnp.log(total), MASKED)
    lse_BNT = lse.reshape(lse.shape[0], -1, lse.shape[3])[:, :, : walk.T]
    return walk.rows(out / total[..., None], q_BTNH.dtype), lse_BNT


def backward(spec: Spec, q_BTNH, k_BSKH, v_BSKV, extra: Extra, lse_BNT, delta_BNT, dout_BTNV):
    """See spec.py."""
    walk = _Walk(spec, q_BTNH.shape, k_BSKH.shape, extra)
    wide = lse_BNT.dtype
    q, k, v, dout = walk.queries(q_BTNH), walk.keys(k_BSKH), walk.keys(v_BSKV), walk.queries(dout_BTNV)
    lse, delta = (
        walk.queries(x.transpose(0, 2, 1)[..., None], fill)[..., 0] for x, fill in ((lse_BNT, -MASKED), (delta_BNT, 0))
    )
    bias = extra.bias_BNTS
    dbias = None if bias is None else jnp.zeros((*bias.shape[:2], q.shape[3], k.shape[2]), wide)

    def step(carry, tile: Tile):
        dq, dk, dv, dbias = carry
        q_t, dout_t, lse_t, delta_t = (tile.of_queries(x) for x in (q, dout, lse, delta))
        k_s, v_s = tile.of_keys(k), tile.of_keys(v)
        logits, slope = walk.logits(q_t, k_s, tile)
        p = jnp.exp(logits - lse_t[..., None])
        dp = walk.drop(_dot("bkgtv,bksv->bkgts", dout_t, v_s, wide), tile)
        dlogits = p * (dp - delta_t[..., None])
        if dbias is not None:
            new = dlogits.reshape(dlogits.shape[0], -1, *dlogits.shape[3:])
            new = new.sum([axis for axis in (0, 1) if dbias.shape[axis] == 1], keepdims=True)
            at = (0, 0, tile.t, tile.s)
            dbias = jax.lax.dynamic_update_slice(dbias, new + jax.lax.dynamic_slice(dbias, at, new.shape), at)
        dlogits = (dlogits * spec.scale if slope is None else dlogits * slope * spec.scale).astype(q.dtype)
        dq = tile.add_queries(dq, _dot("bkgts,bksh->bkgth", dlogits, k_s, wide))
        dk = tile.add_keys(dk, _dot("bkgts,bkgth->bksh", dlogits, q_t, wide))
        dv = tile.add_keys(dv, _dot("bkgts,bkgtv->bksv", walk.drop(p, tile).astype(dout.dtype), dout_t, wide))
        return dq, dk, dv, dbias

    dq, dk, dv, dbias = walk.run(step, (*(jnp.zeros(x.shape, wide) for x in (q, k, v)), dbias))
    dk, dv = (x[:, :, : walk.S].transpose(0, 2, 1, 3) for x in (dk, dv))
    dbias = None if dbias is None else dbias[:, :, : walk.T, : walk.S]
    return walk.rows(dq, q_BTNH.dtype), dk.astype(k_BSKH.dtype), dv.astype(v_BSKV.dtype), dbias


class _Walk:
    """The tiles that a call visits, with its masks and biases."""

    def __init__(self, spec: Spec, q_shape: tuple[int, ...], k_shape: tuple[int, ...], extra: Extra):
        self.spec, self.extra = spec, extra
        (_, self.T, self.N, _), (_, self.S, self.K, _) = q_shape, k_shape
        T, S, mask, data = self.T, self.S, spec.mask, extra.data
        default = TILE
        if target()[0] == "cpu":
            default = min(max(CPU_TILE[0], isqrt(CPU_BYTES // (4 * q_shape[0] * self.N)) // 32 * 32), CPU_TILE[1])
        tile_q, tile_k = spec.tiles.q or default, spec.tiles.k or default
        tile_q, tile_k = min(tile_q, -(-T // 8) * 8), min(tile_k, -(-S // 8) * 8)
        if mask.block_shape is not None:
            tile_q, tile_k = gcd(tile_q, mask.block_shape[0]), gcd(tile_k, mask.block_shape[1])
        kinds = tile_kinds(mask, data, T, S, tile_q, tile_k)
        visited = (kinds != EMPTY).any((0, 1)).reshape(-1)
        # The tiles to visit come first. A list that depends on data is as long as all tiles, and only `count` are used.
        self.order = np.flatnonzero(visited) if isinstance(visited, np.ndarray) else jnp.argsort(~visited, stable=True)
        self.count = visited.sum()
        self.columns, self.tile = kinds.shape[3], (tile_q, tile_k)
        self.shape = kinds.shape[2] * tile_q, kinds.shape[3] * tile_k

    def run(self, step, carry):
        """Run `step(carry, tile)` for every tile that may hold a visible pair."""
        order = jnp.asarray(self.order, jnp.int32)

        def body(p, carry):
            i, j = order[p] // self.columns, order[p] % self.columns
            return step(carry, Tile(i * self.tile[0], j * self.tile[1], *self.tile))

        return jax.lax.fori_loop(0, self.count, body, carry) if len(self.order) else carry

    def queries(self, x_BTNH: Array, fill: float = 0.0) -> Array:
        """Return x [B, T, N, H] as [B, K, G, T, H], padded to whole tiles."""
        B, T, N, H = x_BTNH.shape
        x = x_BTNH.reshape(B, T, self.K, N // self.K, H).transpose(0, 2, 3, 1, 4)
        return _fill(x, 3, self.shape[0], fill)

    def keys(self, x_BSKH: Array) -> Array:
        """Return x [B, S, K, H] as [B, K, S, H], padded to whole tiles."""
        return _fill(x_BSKH.transpose(0, 2, 1, 3), 2, self.shape[1], 0.0)

    def rows(self, x_BKGTV: Array, dtype) -> Array:
        """Return x [B, K, G, T, V] as [B, T, N, V], without padding."""
        x = x_BKGTV[:, :, :, : self.T].transpose(0, 3, 1, 2, 4)
        return x.reshape(*x.shape[:2], self.N, x.shape[-1]).astype(dtype)

    def of_heads(self, x_N: Array) -> Array:
        """Return one number per head, shaped to broadcast against [B, K, G, T]."""
        return x_N.reshape(self.K, -1)[None, :, :, None]

    def logits(self, q_t: Array, k_s: Array, tile: Tile) -> tuple[Array, Array | None]:
        """Return the logits [B, K, G, t, s], MASKED where unseen, and the soft cap's derivative or None."""
        spec, extra, data, slope = self.spec, self.extra, self.extra.data, None
        logits = _dot("bkgth,bksh->bkgts", q_t, k_s, jnp.promote_types(q_t.dtype, jnp.float32)) * spec.scale
        if spec.softcap is not None:
            tanh = jnp.tanh(logits / spec.softcap)
            logits, slope = spec.softcap * tanh, 1.0 - tanh * tanh
        t, s = tile.t + jnp.arange(tile.queries)[:, None], tile.s + jnp.arange(tile.keys)[None, :]
        slots = jnp.asarray(data.offset).reshape(-1, 1, 1) + t  # [B|1, t, 1]
        if extra.bias_BNTS is not None:
            bias = _fill(_fill(extra.bias_BNTS, 2, self.shape[0], 0.0), 3, self.shape[1], 0.0)
            bias = jax.lax.dynamic_slice(bias, (0, 0, tile.t, tile.s), (*bias.shape[:2], tile.queries, tile.keys))
            logits = logits + self._by_head(bias)
        if extra.alibi_N is not None:
            distance = jnp.abs(slots - s)[:, None, None].astype(logits.dtype)
            logits = logits - self.of_heads(extra.alibi_N)[..., None] * distance

        def column(x_BT):
            return None if x_BT is None else _part(x_BT, tile.t, tile.queries, self.shape[0])[:, :, None]

        def row(x_BS):
            return None if x_BS is None else _part(x_BS, tile.s, tile.keys, self.shape[1])[:, None, :]

        visible_mask = visible(
            spec.mask, slots, s, column(data.q_segments_BT), row(data.k_segments_BS),
            column(data.q_positions_BT), row(data.k_positions_BS), row(data.prefix_BS),
        )  # fmt: skip
        if self.shape[1] > self.S:
            visible_mask = s < self.S if visible_mask is None else visible_mask & (s < self.S)
        if visible_mask is not None:
            logits = jnp.where(visible_mask if visible_mask.ndim == 2 else visible_mask[:, None, None], logits, MASKED)
        if data.blocks_BNIJ is not None and spec.mask.block_shape is not None:
            rows, columns = t // spec.mask.block_shape[0], s // spec.mask.block_shape[1]
            logits = jnp.where(self._by_head(data.blocks_BNIJ[:, :, rows, columns]), logits, MASKED)
        return logits, slope

    def drop(self, weights: Array, tile: Tile) -> Array:
        """Return the weights [B, K, G, t, s] after dropout."""
        if not self.spec.dropout:
            return weights
        B = weights.shape[0]
        t, s = tile.t + jnp.arange(tile.queries)[:, None], tile.s + jnp.arange(tile.keys)[None, :]
        rows, heads = jnp.arange(B).reshape(B, 1, 1, 1, 1), jnp.arange(self.N).reshape(self.K, -1, 1, 1)
        keeps = keep(self.extra.seed, rows, heads, t, s, self.spec.dropout)
        return jnp.where(keeps, weights / (1.0 - self.spec.dropout), 0.0)

    def _by_head(self, x_BNTS: Array) -> Array:
        """Return x [B|1, N|1, ...] shaped to broadcast against [B, K, G, ...]."""
        one = x_BNTS.shape[1] == 1
        return x_BNTS[:, :, None] if one else x_BNTS.reshape(x_BNTS.shape[0], self.K, -1, *x_BNTS.shape[2:])


def _dot(equation: str, a: Array, b: Array, wide) -> Array:
    # Accelerators round float32 inputs to fewer bits by default.
    precision = "highest" if a.dtype == b.dtype == wide else None
    return jnp.einsum(equation, a, b, preferred_element_type=wide, precision=precision)


def _fill(x: Array, axis: int, length: int, value: float) -> Array:
    short = length - x.shape[axis]
    return (
        x if not short else jnp.pad(x, [(0, short if i == axis else 0) for i in range(x.ndim)], constant_values=value)
    )


def _part(x_BL: Array, start, size: int, length: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(_fill(x_BL, 1, length, 0), start, size, axis=1)
