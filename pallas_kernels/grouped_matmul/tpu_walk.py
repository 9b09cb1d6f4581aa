"""The list of visits of the TPU kernels. A visit is the rows of one group within one tile of rows.

XLA computes the list from the sizes, and the kernels get it in scalar memory. Groups are in order, so the visits of a
tile are consecutive, and so are those of a group. An unaligned group costs one visit more than its rows fill. An empty
one costs none, unless its result must be written (`empty`). There are at most tiles + E - 1 visits, and the grid ends
with the last one.

Shapes: M rows, E groups, V visits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

FIELDS = TILE, GROUP, START, STOP = range(4)
MAX_VISITS = 1 << 15  # four words each, half of scalar memory


def max_visits(M: int, E: int, tile: int) -> int:
    """Return the length V of the list."""
    return -(-M // tile) + E - 1


def walk(sizes_E: Int[Array, "E"], M: int, tile: int, *, empty: bool) -> tuple[Int[Array, "words"], Int[Array, ""]]:
    """Return (words, number of visits), int32. words holds the tile of rows of every visit, then every group, then
    every first row, then every row after the last; rows count from the start of the tile.

    If `empty`, each empty group has a visit without rows (for results by group). Otherwise each tile after the last
    group has one, with the group of the previous visit (for results by row)."""
    E, V = sizes_E.shape[0], max_visits(M, sizes_E.shape[0], tile)
    tiles = -(-M // tile)
    stops_E = jnp.cumsum(sizes_E)
    starts_E = stops_E - sizes_E
    first_E = jnp.minimum(starts_E // tile, tiles - 1)
    visits_E = jnp.where(sizes_E > 0, (stops_E - 1) // tile - first_E + 1, 1 if empty else 0)
    after = (stops_E[-1] + tile - 1) // tile  # the first tile after the last group
    last = jnp.max(jnp.where(sizes_E > 0, jnp.arange(E), 0))
    # Treat the tiles after the last group as one more group.
    first_X = jnp.append(first_E, after)
    visits_X = jnp.append(visits_E, 0 if empty else tiles - after)
    ends_X = jnp.cumsum(visits_X)
    v_V = jnp.arange(V)
    x_V = jnp.minimum(jnp.sum(v_V[:, None] >= ends_X[None, :], 1), E)
    tile_V = jnp.clip(first_X[x_V] + v_V - (ends_X - visits_X)[x_V], 0, tiles - 1)
    group_V = jnp.where(x_V == E, last, x_V)
    rows = lambda edge_E: jnp.clip(jnp.append(edge_E, 0)[x_V] - tile_V * tile, 0, tile)
    start_V = rows(starts_E)
    words = jnp.concatenate([tile_V, group_V, start_V, jnp.maximum(rows(stops_E), start_V)])
    return words.astype(jnp.int32), ends_X[-1].astype(jnp.int32)


def word(words_ref, field: int, visit):
    """Return one field of a visit from the list in scalar memory."""
    return words_ref[field * (words_ref.shape[0] // len(FIELDS)) + visit]


def changes(words_ref, field: int, visit) -> jax.Array:
    """Return whether a field differs from the previous visit's."""
    before = word(words_ref, field, jnp.maximum(visit - 1, 0))
    return (visit == 0) | (word(words_ref, field, visit) != before)
