"""Which keys a query sees: pair by pair, for every implementation, and tile by tile, so that empty tiles are skipped.

Shapes: B batch, T queries, S keys, N query heads; I tiles of queries, J tiles of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

MASKED = -1e30  # logit of an unseen key, and the log-sum-exp of a query that sees none; finite, so never NaN
MAX_SLOTS_BEFORE_KEYS = 1 << 24  # how many slots before the first key a query may be
EMPTY, PARTIAL, FULL = 0, 1, 2  # kinds of tiles: no pair is visible, some may be, all are


@dataclass(frozen=True)
class Strided:
    """The strided block-sparse pattern (Child et al. 2019): a query sees keys whose block of `size` positions is less
    than `local` blocks away, and keys in every `stride`-th block (index % stride == stride - 1)."""

    size: int  # positions per block
    local: int  # blocks
    stride: int  # blocks


@dataclass(frozen=True)
class Mask:
    """The part of a mask that is known at compile time. Its conditions combine by 'and', except that the prefix of
    `MaskData` makes keys visible that `causal`, `window` and `strided` hide."""

    causal: bool = True  # key slot <= query slot
    window: int | None = None  # query slot - key slot < window; without `causal` also key slot - query slot < window
    strided: Strided | None = None  # by positions, so that blocks restart in each packed document
    block_shape: tuple[int, int] | None = None  # (queries, keys) per block of `MaskData.blocks_BNIJ`

    def validate(self) -> None:
        """Raise ValueError if a field is out of range."""
        if self.window is not None and self.window < 1:
            raise ValueError(
                f"mask.window = {self.window}: must be at least 1, since a query sees itself, or None for no window"
            )
        if self.strided is not None and min(self.strided.size, self.strided.local, self.strided.stride) < 1:
            raise ValueError(f"mask.strided = {self.strided}: size, local and stride must be at least 1")
        if self.block_shape is not None and min(self.block_shape) < 1:
            raise ValueError(f"mask.block_shape = {self.block_shape}: must be at least (1, 1)")


class MaskData(NamedTuple):
    """The part of a mask that is data. A query's slot is its index + offset; a key's slot is its index."""

    offset: int | Int[Array, "B"] | None = 0  # slot of the first query; an int is static, an array is data
    q_segments_BT: Int[Array, "B T"] | None = None  # a query sees only keys of the same segment
    k_segments_BS: Int[Array, "B S"] | None = None
    q_positions_BT: Int[Array, "B T"] | None = None  # positions for `strided`; None: slots
    k_positions_BS: Int[Array, "B S"] | None = None
    prefix_BS: Bool[Array, "B S"] | None = None  # keys that every query of their segment sees
    blocks_BNIJ: Bool[Array, "#B #N I J"] | None = None  # blocks of `Mask.block_shape` that may be visible


def visible(mask: Mask, q_slot, k_slot, q_segment=None, k_segment=None, q_position=None, k_position=None, prefix=None):
    """Return a mask that is True where the query may see the key, or None if the mask hides nothing.

    The arguments broadcast against each other ([..., T, 1] and [..., 1, S]). Only comparisons and integer arithmetic
    are used, so kernels can call this on their tiles. The caller applies `blocks_BNIJ`."""
    visible_mask = None

    def both(a, b):
        return b if a is None else a & b

    if mask.causal:
        visible_mask = both(visible_mask, k_slot <= q_slot)
    if mask.window is not None:
        visible_mask = both(visible_mask, q_slot - k_slot < mask.window)
        if not mask.causal:
            visible_mask = both(visible_mask, k_slot - q_slot < mask.window)
    if mask.strided is not None:
        s = mask.strided
        # Slots before the first key have blocks too. Division truncates towards zero, so add whole periods, which do
        # not change the pattern.
        ahead = s.size * s.stride * -(-MAX_SLOTS_BEFORE_KEYS // (s.size * s.stride))
        q_block = jax.lax.div((q_slot if q_position is None else q_position) + ahead, s.size)
        k_block = jax.lax.div((k_slot if k_position is None else k_position) + ahead, s.size)
        far = jax.lax.rem(k_block, s.stride) == s.stride - 1
        visible_mask = both(visible_mask, (jnp.abs(q_block - k_block) < s.local) | far)
    if prefix is not None and visible_mask is not None:
        visible_mask = visible_mask | prefix
    if q_segment is not None:
        visible_mask = both(visible_mask, q_segment == k_segment)
    return visible_mask


def tile_kinds(
    mask: Mask, data: MaskData, T: int, S: int, tile_q: int, tile_k: int
) -> Int[np.ndarray, "#B #N I J"] | Int[Array, "#B #N I J"]:
    """Return EMPTY, PARTIAL or FULL for each tile of queries and keys, int32. The result is a NumPy array if the mask
    is static.

    EMPTY and FULL are guarantees, PARTIAL is not. The last tiles may reach beyond T and S. Keys beyond S are not
    visible, so a tile with such keys is never FULL; queries beyond T are ignored. `tile_q` and `tile_k` must divide
    `mask.block_shape` if it is set.
    """
    static = isinstance(data.offset, int) and all(part is None for part in data[1:])
    xp = np if static else jnp
    I, J = -(-T // tile_q), -(-S // tile_k)
    offset_B = xp.atleast_1d(xp.asarray(data.offset, xp.int32))[:, None, None]
    q_first = (xp.arange(I) * tile_q)[:, None] + offset_B  # [B, I, 1]
    q_last = (xp.minimum((xp.arange(I) + 1) * tile_q, T) - 1)[:, None] + offset_B
    k_first, k_last = xp.arange(J) * tile_k, xp.minimum((xp.arange(J) + 1) * tile_k, S) - 1  # [J]
    some = xp.broadcast_to(xp.asarray(True), (offset_B.shape[0], I, J))
    every = some & (xp.arange(J) < S // tile_k)
    open_ = xp.asarray(True)  # every pair passes causal, window and strided
    if mask.causal:
        some, open_ = some & (k_first <= q_last), open_ & (k_last <= q_first)
    if mask.window is not None:
        some, open_ = some & (q_first - k_last < mask.window), open_ & (q_last - k_first < mask.window)
        if not mask.causal:
            some, open_ = some & (k_first - q_last < mask.window), open_ & (k_last - q_first < mask.window)
    if mask.strided is not None:
        s = mask.strided
        q_low, q_high = (x // s.size for x in _range(xp, data.q_positions_BT, q_first, q_last, tile_q, axis=2))
        k_low, k_high = (x // s.size for x in _range(xp, data.k_positions_BS, k_first, k_last, tile_k, axis=1))
        near = (q_low - k_high < s.local) & (k_low - q_high < s.local)
        # The first far block at or after the tile's first block.
        far = k_low + (s.stride - 1 - k_low) % s.stride <= k_high
        some, open_ = some & (near | far), open_ & (q_high - k_low < s.local) & (k_high - q_low < s.local)
    if data.prefix_BS is not None:
        prefix_BJL = _tiles(data.prefix_BS, tile_k, False)
        some, open_ = some | prefix_BJL.any(-1)[:, None, :], open_ | prefix_BJL.all(-1)[:, None, :]
    every = every & open_
    if data.q_segments_BT is not None and data.k_segments_BS is not None:
        q_low, q_high = _range(xp, data.q_segments_BT, None, None, tile_q, axis=2)
        k_low, k_high = _range(xp, data.k_segments_BS, None, None, tile_k, axis=1)
        some = some & (q_low <= k_high) & (k_low <= q_high)
        every = every & (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    kinds_BIJ = xp.where(every, FULL, xp.where(some, PARTIAL, EMPTY))
    kinds_BNIJ = kinds_BIJ[:, None].astype(xp.int32)
    if data.blocks_BNIJ is not None and mask.block_shape is not None:
        rows = jnp.arange(I) * tile_q // mask.block_shape[0]
        columns = jnp.arange(J) * tile_k // mask.block_shape[1]
        kinds_BNIJ = jnp.where(data.blocks_BNIJ[:, :, rows[:, None], columns[None, :]], kinds_BNIJ, EMPTY)
    return kinds_BNIJ


def _tiles(x_BL: Array | np.ndarray, tile: int, fill) -> Array:
    """Return x [B, L] as [B, tiles, tile], with a short last tile padded with `fill`."""
    B, L = x_BL.shape
    x_BL = jnp.pad(x_BL, ((0, 0), (0, -L % tile)), constant_values=fill)
    return x_BL.reshape(B, -1, tile)


def _range(xp, x_BL, first, last, tile: int, axis: int):
    """Return the least and greatest value of each tile, with a new axis at `axis`, or `first` and `last` if x is
    None."""
    if x_BL is None:
        return first, last
    big = jnp.iinfo(jnp.int32).max
    low, high = _tiles(x_BL, tile, big).min(-1), _tiles(x_BL, tile, -big).max(-1)
    return jnp.expand_dims(low, axis), jnp.expand_dims(high, axis)
