"""The walk of the TPU kernels: a packed list of visits, each the rows of one group within one tile of rows.

Made by XLA of the sizes, handed to the kernels as scalars. Groups come in order, so that a tile's visits and a group's
visits are each consecutive. A group aligned to nothing costs one visit more than its rows fill; an empty one costs
none, except where its result must be written (`empty`). At most tiles + E - 1 visits; the grid ends with the last.

Shapes: M rows, E groups, V visits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

FIELDS = TILE, GROUP, START, STOP = range(4)
MOST_VISITS = 1 << 15  # four words each: half of the scalar memory


def most_visits(M: int, E: int, tile: int) -> int:
    """The length V of the list."""
    return -(-M // tile) + E - 1


def walk(sizes_E: Int[Array, "E"], M: int, tile: int, *, empty: bool) -> tuple[Int[Array, "words"], Int[Array, ""]]:
    """(words, number of visits). words: all visits' tiles of rows, then their groups, then their first row and the row
    after their last, counted within the tile; int32.

    `empty`: each empty group is visited, with no rows (for results by group). Else each tile after the last group is,
    with no rows and the group of the visit before (for results by row)."""
    E, V = sizes_E.shape[0], most_visits(M, sizes_E.shape[0], tile)
    tiles = -(-M // tile)
    stops_E = jnp.cumsum(sizes_E)
    starts_E = stops_E - sizes_E
    first_E = jnp.minimum(starts_E // tile, tiles - 1)
    visits_E = jnp.where(sizes_E > 0, (stops_E - 1) // tile - first_E + 1, 1 if empty else 0)
    after = (stops_E[-1] + tile - 1) // tile  # the first tile after the last group
    last = jnp.max(jnp.where(sizes_E > 0, jnp.arange(E), 0))
    # The tiles after the last group are those of a group more.
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
    """One field of a visit, of the list in scalar memory."""
    return words_ref[field * (words_ref.shape[0] // len(FIELDS)) + visit]


def changes(words_ref, field: int, visit) -> jax.Array:
    """Whether a field differs from that of the visit before."""
    before = word(words_ref, field, jnp.maximum(visit - 1, 0))
    return (visit == 0) | (word(words_ref, field, visit) != before)
