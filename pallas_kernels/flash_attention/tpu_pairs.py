"""The list of tiles that the TPU kernels visit, in order, packed into int32 words in scalar memory. The kernels' index
maps read it before they load anything, so a tile without visible pairs costs no transfer and no multiplication.

The result of a *major* tile is accumulated over its entries, which are consecutive. Forward: major = queries, minor =
keys. Backward: major = keys, minor = queries (and heads of the group, if heads have different tiles).

Shapes: R rows of the batch or 1, C heads or 1, M major tiles, m minor tiles, P entries.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.flash_attention.mask import EMPTY, FULL, PARTIAL, Mask, MaskData, tile_kinds

TILE_BITS, HEAD_BITS = 11, 4
MAX_TILES, MAX_HEADS = 1 << TILE_BITS, 1 << HEAD_BITS
MAX_WORDS = 1 << 17  # half a MiB, of 1 MiB of scalar memory


class Pairs(NamedTuple):
    """The list. A word holds, from the lowest bit: q tile, k tile, kind, whether it is the first entry of its major
    tile, the last one, or the first visit to its minor tile (backward only), and the head in the group."""

    words_RCP: Int[np.ndarray, "R C P"] | Int[Array, "R C P"]
    partial: bool  # some entry may be PARTIAL
    full: bool  # some entry may be FULL
    shifts: tuple[int, ...]  # values of q slot - k slot at PARTIAL tiles' first pairs, if static and at most two
    only_shifts: bool  # every PARTIAL entry has one of `shifts`
    visited_RCm: Array | np.ndarray | None  # backward: which minor tiles have entries; None: all


def q_tile(word):
    """Return the index of the tile of queries."""
    return word & (MAX_TILES - 1)


def k_tile(word):
    """Return the index of the tile of keys."""
    return (word >> TILE_BITS) & (MAX_TILES - 1)


def kind(word):
    """Return EMPTY, PARTIAL or FULL."""
    return (word >> (2 * TILE_BITS)) & 3


def flag(word, index: int):
    """Return a flag of the word. 0: first entry of its major tile; 1: last entry; 2: first visit to its minor tile."""
    return (word >> (2 * TILE_BITS + 2 + index)) & 1


def head(word):
    """Return the index of the query head in its group."""
    return (word >> (2 * TILE_BITS + 5)) & (MAX_HEADS - 1)


def pairs(
    mask: Mask, data: MaskData, T: int, S: int, tile_q: int, tile_k: int, *, backward: bool = False, group: int = 1
) -> Pairs:
    """Return the list of tiles to visit.

    Every major tile has at least one entry, of kind EMPTY if it has no visible pair, so that its result is written. If
    the mask is static, the list is a NumPy array with exactly the entries that are needed. Otherwise it is as long as
    the static part of the mask allows; surplus entries repeat the last tiles, are EMPTY, and are neither first nor
    last.

    `group`: query heads per key/value head. The list contains heads only if they differ (`blocks_BNIJ`); C is then the
    number of query heads, or of key/value heads in the backward list."""
    kinds = tile_kinds(mask, data, T, S, tile_q, tile_k)  # [R, N|1, I, J]
    most = length(mask, data, T, S, tile_q, tile_k, backward, group if kinds.shape[1] > 1 else 1)
    shifts, only_shifts = _shifts(mask, data, kinds, tile_q, tile_k)
    per_head = kinds.shape[1] > 1
    J = kinds.shape[3]
    xp = np if isinstance(kinds, np.ndarray) else jnp
    if backward:
        R, N, I, _ = kinds.shape
        G = group if per_head else 1
        # [R, K, J, I, G] -> minor = (query tile, head of the group)
        kinds = kinds.reshape(R, N // G, G, I, J).transpose(0, 1, 4, 3, 2).reshape(R, N // G, J, I * G)
    else:
        G = 1
    R, C, M, m = kinds.shape
    some = kinds > EMPTY
    active = some | ((xp.arange(m) == 0) & ~some.any(-1, keepdims=True))
    fresh = some & (xp.cumsum(some.astype(xp.int32), 2) == 1)
    flat = lambda x: x.reshape(R, C, M * m)
    order = xp.argsort(~flat(active), axis=-1, stable=True)[..., :most]
    count = flat(active).sum(-1, keepdims=True)
    number = xp.arange(most)
    real = number < count
    order = xp.where(real, order, xp.take_along_axis(order, count - 1, -1))
    take = lambda x: xp.take_along_axis(flat(x), order, -1).astype(xp.int32)
    major, minor = order // m, order % m
    change = major[..., 1:] != major[..., :-1]
    edge = xp.ones((R, C, 1), bool)
    first = xp.concatenate([edge, change], -1) & real
    last = xp.concatenate([change, edge], -1) | (number == count - 1)
    q, k = (minor // G, major) if backward else (major, minor)
    words = (
        q
        | (k << TILE_BITS)
        | (xp.where(real, take(kinds), EMPTY) << (2 * TILE_BITS))
        | (
            (first.astype(xp.int32) | ((last & real).astype(xp.int32) << 1) | ((take(fresh) & real) << 2))
            << (2 * TILE_BITS + 2)
        )
        | ((minor % G) << (2 * TILE_BITS + 5))
    )
    static = xp is np
    visited = xp.any(some, 2) if backward else None
    if visited is not None and static and visited.all():
        visited = None
    return Pairs(
        words.astype(xp.int32),
        bool((kinds == PARTIAL).any()) if static else True,
        bool((kinds == FULL).any()) if static else True,
        shifts,
        only_shifts,
        visited,
    )


def _static_part(mask: Mask, data: MaskData) -> tuple[Mask, int] | None:
    """Return a static mask that hides no more than the full mask does, and its offset, or None if there is none."""
    if data.prefix_BS is not None or not isinstance(data.offset, int):
        return None
    strided = mask.strided if data.q_positions_BT is None and data.k_positions_BS is None else None
    return Mask(mask.causal, mask.window, strided), data.offset


def length(mask: Mask, data: MaskData, T: int, S: int, tile_q: int, tile_k: int, backward: bool, heads: int) -> int:
    """Return the number of entries P of a list. `heads`: the heads of a group that the list distinguishes."""
    I, J = -(-T // tile_q), -(-S // tile_k)
    known = _static_part(mask, data)
    if known is None:
        return I * J * (heads if backward else 1)
    kinds = tile_kinds(known[0], MaskData(known[1]), T, S, tile_q, tile_k)
    counts = (np.asarray(kinds)[0, 0] > EMPTY).sum(0 if backward else 1) * (heads if backward else 1)
    return int(np.maximum(counts, 1).sum())


def _shifts(mask: Mask, data: MaskData, kinds, tile_q: int, tile_k: int) -> tuple[tuple[int, ...], bool]:
    """Return the shifts of the tiles at the edges of causal and window, and whether every PARTIAL tile has one of them.

    The shift, q slot - k slot of a tile's first pair, decides which of its pairs causal and window hide. If the tiles
    at the edges have only one or two shifts, the kernel gets a body for each that skips the hidden part."""
    if not isinstance(data.offset, int) or data.prefix_BS is not None or not (mask.causal or mask.window):
        return (), False
    I, J = kinds.shape[2:]
    shift_IJ = data.offset + np.arange(I)[:, None] * tile_q - np.arange(J)[None, :] * tile_k
    edges = tile_kinds(Mask(mask.causal, mask.window), MaskData(data.offset), I * tile_q, J * tile_k, tile_q, tile_k)
    found = np.unique(shift_IJ[np.asarray(edges)[0, 0] == PARTIAL])
    if not 0 < len(found) <= 2:
        return (), False
    only = isinstance(kinds, np.ndarray) and bool(np.isin(shift_IJ[kinds[0, 0] == PARTIAL], found).all())
    return tuple(int(x) for x in found), only


def steps(
    mask: Mask, shift: int | None, tile_q: int, tile_k: int, sub_q: int, sub_k: int, edge: int
) -> tuple[tuple[int, int, int, int], ...]:
    """Return the pieces (q from, q to, k from, k to) of a tile, in order of keys.

    With `shift` (see `Pairs.shifts`), a piece is a row of `edge` queries without the keys that causal and window hide
    from all of them."""
    if shift is None:
        return tuple(
            (q, min(q + sub_q, tile_q), k, min(k + sub_k, tile_k))
            for k in range(0, tile_k, sub_k)
            for q in range(0, tile_q, sub_q)
        )
    edge_q, edge_k = min(edge, tile_q), min(edge, tile_k)
    kinds = tile_kinds(Mask(mask.causal, mask.window), MaskData(shift), tile_q, tile_k, edge_q, edge_k)
    found = []
    for i, row in enumerate(np.asarray(kinds)[0, 0]):
        visible_mask = np.flatnonzero(row > EMPTY)
        if visible_mask.size:
            found.append(
                (
                    i * edge_q,
                    min((i + 1) * edge_q, tile_q),
                    int(visible_mask[0]) * edge_k,
                    min(int(visible_mask[-1] + 1) * edge_k, tile_k),
                )
            )
    return tuple(found)


def zero_unvisited(dq_BNTH: Array, visited_RCm, tile_q: int, group: int) -> Array:
    """Return dq, padded to tiles, with zeros in tiles that no entry visits, which hold uninitialized memory."""
    T = dq_BNTH.shape[2]
    R, C, m = visited_RCm.shape
    I = T // tile_q
    per_head = visited_RCm.reshape(R, C, I, m // I).transpose(0, 1, 3, 2).reshape(R, -1, I)  # [R, heads or 1, I]
    rows = jnp.repeat(jnp.asarray(per_head), tile_q, axis=-1)[..., None]
    return jnp.where(rows, dq_BNTH, jnp.zeros((), dq_BNTH.dtype))
