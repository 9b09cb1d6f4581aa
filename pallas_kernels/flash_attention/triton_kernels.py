"""The bodies of the Triton kernels: one tile of queries (forward, dq) or of keys (dk and dv) against the tiles that it
visits.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head dimension, V head dimension of
the values; t, s: the queries and keys of a tile. A "part" is a slice of H or V whose size is a power of two, as Triton
requires: 80 is computed as 64 + 16, without padding to 128. Every ref except `walk` holds one row of the batch, with T,
S, H and V rounded up to whole tiles and parts; elements beyond the array are neither read nor written. Logits are in
base 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.mask import MASKED, visible
from pallas_kernels.flash_attention.spec import Spec

# Far below the first running maximum, MASKED. GPUs fuse x * unit - top into one operation, whose product is not rounded
# as `top` is. If UNSEEN were MASKED too, the difference could be large and positive, and its exponential infinite.
UNSEEN = 2 * MASKED

LOG2E = log2(2.718281828459045)
MIN_PART = 16  # the smallest side of a matrix product in Triton


@dataclass(frozen=True)
class Plan:
    """The static arguments of a kernel, other than the shapes of its refs."""

    spec: Spec
    T: int
    S: int
    N: int
    K: int
    H: int
    V: int
    tile_q: int
    tile_k: int
    max_part: int  # the widest part of H or V, a power of two
    offset: int | None  # None: it is data
    ranges: bool  # whether the tiles to visit form ranges, so that they need not be listed
    any_full: bool  # some tile may be FULL
    any_partial: bool  # some tile may be PARTIAL

    @property
    def heavy_last(self) -> bool:
        """Whether later queries see more keys, so that their tiles should start first."""
        return self.spec.mask.causal and self.spec.mask.window is None

    def parts(self, size: int) -> list[tuple[int, int]]:
        """Return (start, length) of each part of H or V."""
        return parts(size, self.max_part)

    def q_tile(self) -> Any:
        """Return the tile of queries of this program (axis 0 of the grid)."""
        i = pl.program_id(0)
        return pl.num_programs(0) - 1 - i if self.heavy_last else i


class Side(NamedTuple):
    """The mask's inputs for the queries or the keys of a tile, as [t, 1] or [1, s] (in `dkv`: [1, t], [s, 1])."""

    index: Any
    segment: Any = None
    position: Any = None
    prefix: Any = None


def parts(size: int, most: int) -> list[tuple[int, int]]:
    """Return (start, length) of parts that cover `size`, largest first. Lengths are powers of two up to `most`; the
    last part may reach beyond `size`."""
    covered = -(-size // MIN_PART) * MIN_PART
    rest = covered % most
    lengths = [most] * (covered // most) + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [(sum(lengths[:n]), length) for n, length in enumerate(lengths)]


def forward(p: Plan, refs: dict[str, Any], out_ref, lse_ref) -> None:
    """Compute out and the log-sum-exp (natural logarithm) for one tile of queries of one head."""
    i, n, b = p.q_tile(), pl.program_id(1), pl.program_id(2)
    first, head = i * p.tile_q, lax.div(n, jnp.int32(p.N // p.K))
    q = _load(p, refs["q"], first, p.tile_q, n, p.H, p.T)
    queries = _side(p, refs, "q", first, p.tile_q, p.T, 0)
    draw, logits = _dropout(p, refs, b, n), _logits(p, refs, b, n)

    def step(j, carry, masked):
        top, total, out = carry
        k_first = j * p.tile_k
        keys = _side(p, refs, "k", k_first, p.tile_k, p.S, 1)
        k = _load(p, refs["k"], k_first, p.tile_k, head, p.H, p.S, masked)
        x, unit, _ = logits(_product(p, q, k), queries, keys, masked)
        new_top = jnp.maximum(top, x.max(1) * unit)
        weights = jnp.exp2(x * unit - new_top[:, None])
        shrink = jnp.exp2(top - new_top)
        total = total * shrink + weights.sum(1)
        if draw is not None:
            weights = jnp.where(draw(queries, keys), weights, 0.0)
        v = _load(p, refs["v"], k_first, p.tile_k, head, p.V, p.S, masked)
        weights = weights.astype(v[0].dtype)
        return (
            new_top,
            total,
            tuple(o * shrink[:, None] + _dot(p, weights, part) for o, part in zip(out, v, strict=True)),
        )

    if "sinks" in refs:
        top, total = jnp.full((p.tile_q,), refs["sinks"][n] * LOG2E), jnp.ones((p.tile_q,), jnp.float32)
    else:
        top, total = jnp.full((p.tile_q,), MASKED, jnp.float32), jnp.zeros((p.tile_q,), jnp.float32)
    out = tuple(jnp.zeros((p.tile_q, size), jnp.float32) for _, size in p.parts(p.V))
    top, total, out = _sweep(p, refs["walk"], n, step, (top, total, out))
    # Until a query sees a key, `top` is MASKED and its weights are exp2(UNSEEN - MASKED) = 0.
    no_keys = top <= MASKED / 2
    factor = jnp.where(no_keys, 0.0, 1.0 / (total * (1.0 - p.spec.dropout)))
    _store(p, out_ref, first, p.tile_q, n, p.V, p.T, tuple(o * factor[:, None] for o in out))
    lse = jnp.where(no_keys, MASKED, top * (1.0 / LOG2E) + jnp.log(total))
    _store_vector(lse_ref, first, p.tile_q, n, p.T, lse)


def dq(p: Plan, refs: dict[str, Any], dq_ref) -> None:
    """Compute the gradient of q for one tile of queries of one head."""
    i, n, b = p.q_tile(), pl.program_id(1), pl.program_id(2)
    first, head = i * p.tile_q, lax.div(n, jnp.int32(p.N // p.K))
    q = _load(p, refs["q"], first, p.tile_q, n, p.H, p.T)
    dout = _load(p, refs["dout"], first, p.tile_q, n, p.V, p.T)
    lse = _load_vector(refs["lse"], first, p.tile_q, n, p.T, -MASKED)[:, None] * LOG2E
    delta = _load_vector(refs["delta"], first, p.tile_q, n, p.T, 0.0)[:, None]
    queries = _side(p, refs, "q", first, p.tile_q, p.T, 0)
    draw, logits = _dropout(p, refs, b, n), _logits(p, refs, b, n)

    def step(j, carry, masked):
        k_first = j * p.tile_k
        keys = _side(p, refs, "k", k_first, p.tile_k, p.S, 1)
        k = _load(p, refs["k"], k_first, p.tile_k, head, p.H, p.S, masked)
        v = _load(p, refs["v"], k_first, p.tile_k, head, p.V, p.S, masked)
        x, unit, slope = logits(_product(p, q, k), queries, keys, masked)
        dweights = _product(p, dout, v)
        if draw is not None:
            dweights = jnp.where(draw(queries, keys), dweights * (1.0 / (1.0 - p.spec.dropout)), 0.0)
        dlogits = jnp.exp2(x * unit - lse) * (dweights - delta) * slope
        dlogits = dlogits.astype(k[0].dtype)
        return tuple(acc + _dot(p, dlogits, part) for acc, part in zip(carry, k, strict=True))

    zeros = tuple(jnp.zeros((p.tile_q, size), jnp.float32) for _, size in p.parts(p.H))
    grads = _sweep(p, refs["walk"], n, step, zeros)
    _store(p, dq_ref, first, p.tile_q, n, p.H, p.T, tuple(g * p.spec.scale for g in grads))


def dkv(p: Plan, refs: dict[str, Any], dk_ref, dv_ref) -> None:
    """Compute the gradients of k and v for one tile of keys of one key/value head, summed over the G query heads in
    order. Tiles are [s, t], so that the products with dout and q need no transpose."""
    first, head, b = pl.program_id(0) * p.tile_k, pl.program_id(1), pl.program_id(2)
    G = p.N // p.K
    k = _load(p, refs["k"], first, p.tile_k, head, p.H, p.S)
    v = _load(p, refs["v"], first, p.tile_k, head, p.V, p.S)
    keys = _side(p, refs, "k", first, p.tile_k, p.S, 0)

    def of_head(g, carry):
        n = head * G + g
        draw, logits = _dropout(p, refs, b, n), _logits(p, refs, b, n)

        def step(i, carry, masked):
            dk, dv = carry
            q_first = i * p.tile_q
            queries = _side(p, refs, "q", q_first, p.tile_q, p.T, 1)
            q = _load(p, refs["q"], q_first, p.tile_q, n, p.H, p.T, masked)
            dout = _load(p, refs["dout"], q_first, p.tile_q, n, p.V, p.T, masked)
            lse = _load_vector(refs["lse"], q_first, p.tile_q, n, p.T, -MASKED, masked)[None, :] * LOG2E
            delta = _load_vector(refs["delta"], q_first, p.tile_q, n, p.T, 0.0, masked)[None, :]
            x, unit, slope = logits(_product(p, k, q), queries, keys, masked)
            weights = jnp.exp2(x * unit - lse)
            dweights, kept = _product(p, v, dout), weights
            if draw is not None:
                keeps, rest = draw(queries, keys), 1.0 / (1.0 - p.spec.dropout)
                kept, dweights = jnp.where(keeps, kept * rest, 0.0), jnp.where(keeps, dweights * rest, 0.0)
            kept = kept.astype(dout[0].dtype)
            dv = tuple(acc + _dot(p, kept, part) for acc, part in zip(dv, dout, strict=True))
            dlogits = (weights * (dweights - delta) * slope).astype(q[0].dtype)
            return tuple(acc + _dot(p, dlogits, part) for acc, part in zip(dk, q, strict=True)), dv

        return _sweep(p, refs["walk"], n, step, carry)

    zeros = tuple(tuple(jnp.zeros((p.tile_k, c), jnp.float32) for _, c in p.parts(size)) for size in (p.H, p.V))
    dk, dv = of_head(0, zeros) if G == 1 else lax.fori_loop(0, G, of_head, zeros)
    _store(p, dk_ref, first, p.tile_k, head, p.H, p.S, tuple(g * p.spec.scale for g in dk))
    _store(p, dv_ref, first, p.tile_k, head, p.V, p.S, dv)


def _sweep(p: Plan, walk, n, step, carry):
    """Run `step` over the tiles to visit: FULL ones without the mask, then PARTIAL ones with it. For `walk`, see
    `list_tiles` in triton.py."""
    n = n if walk.shape[0] > 1 else 0
    full, partial = walk[n, 0], walk[n, 1]
    if p.ranges:
        start, left = walk[n, 2], walk[n, 3]
        full_tile = lambda j: start + left + j
        partial_tile = lambda j: start + j + jnp.where(j < left, 0, full)  # on both sides of the FULL tiles
    else:
        full_tile, partial_tile = lambda j: walk[n, 2 + j], lambda j: walk[n, 2 + full + j]
    if p.any_full:
        carry = lax.fori_loop(0, full, lambda j, c: step(full_tile(j), c, False), carry)
    if p.any_partial:
        carry = lax.fori_loop(0, partial, lambda j, c: step(partial_tile(j), c, True), carry)
    return carry


def _logits(p: Plan, refs, b, n):
    """Return a function from the products q.k to (x, unit, slope). The logits in base 2 are x * unit, about UNSEEN for
    unseen pairs; slope is d logit / d (scale * q.k)."""
    spec, offset = p.spec, refs["offset"][0] if p.offset is None else p.offset
    alibi = refs["alibi"][n] * LOG2E if "alibi" in refs else None

    def logits(x, queries: Side, keys: Side, masked: bool):
        unit, slope = spec.scale * LOG2E, 1.0
        if spec.softcap is not None:
            bent = _tanh(x * (spec.scale / spec.softcap))
            x, unit, slope = bent * (spec.softcap * LOG2E), 1.0, 1.0 - bent * bent
        if alibi is not None:
            distance = jnp.abs(queries.index + offset - keys.index).astype(jnp.float32)
            x, unit = x * unit - alibi * distance, 1.0
        elif unit < 1e-3:
            x, unit = x * unit, 1.0  # `unit` is a divisor below, and must be positive for the maximum
        if masked:
            visible_mask = visible(
                spec.mask, queries.index + offset, keys.index, queries.segment, keys.segment,
                queries.position, keys.position, keys.prefix,
            )  # fmt: skip
            if p.S % p.tile_k:
                inside = keys.index < p.S
                visible_mask = inside if visible_mask is None else visible_mask & inside
            if visible_mask is not None:
                x = jnp.where(visible_mask, x, UNSEEN / unit)
        return x, unit, slope

    return logits


def _dropout(p: Plan, refs, b, n):
    if not p.spec.dropout:
        return None
    seed = refs["seed"][0]
    return lambda queries, keys: keep(seed, b, n, queries.index, keys.index, p.spec.dropout)


def _tanh(x):
    """Return tanh by exp2, which is one instruction. Its error of 1e-7 is small against tanh's limit of 1."""
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2E)))


def _side(p: Plan, refs, name: str, first, tile: int, length: int, axis: int) -> Side:
    index = first + lax.iota(jnp.int32, tile)
    column = lambda x: x[:, None] if axis == 0 else x[None, :]

    def of(field):
        ref = refs.get(f"{name}_{field}")
        if ref is None:
            return None
        mask = {"mask": index < length, "other": 0} if length % tile else {}
        return column(plgpu.load(ref.at[pl.ds(first, tile)], **mask))

    prefix = of("prefix")
    return Side(column(index), of("segments"), of("positions"), None if prefix is None else prefix != 0)


def _product(p: Plan, a: tuple, b: tuple):
    """Return a b^T, summed over the parts."""
    total = _dot(p, a[0], b[0], 1)
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total + _dot(p, x, y, 1)
    return total


def _dot(p: Plan, a, b, axis: int = 0):
    """Return a matrix product summed in float32; `axis` is the contracted axis of b.

    float32 inputs take three passes of TF32 on the tensor cores, with an error of about 1e-6, where one pass would err
    by 1e-3. The interpreter has no TF32."""
    three = lax.Precision.HIGHEST if p.spec.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=three if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )  # fmt: skip


def _mask(first, tile: int, length: int, column: int = 0, size: int = 0, columns: int = 0, check: bool = True):
    """Return the mask of a tile's elements that lie in the array, or None if all do."""
    mask = None
    if check and length % tile:
        mask = first + lax.iota(jnp.int32, tile) < length
        mask = mask[:, None] if size else mask
    if column + size > columns:
        inside = (column + lax.iota(jnp.int32, size) < columns)[None, :]
        mask = inside if mask is None else mask & inside
    return mask


def _load(p: Plan, ref, first, tile: int, head, columns: int, length: int, check: bool = True) -> tuple:
    """Load [tile, part] for each part of `columns`, with 0 beyond the array. `check`: whether the tile may reach beyond
    it."""
    loaded = []
    for column, size in p.parts(columns):
        mask = _mask(first, tile, length, column, size, columns, check)
        at = ref.at[pl.ds(first, tile), head, pl.ds(column, size)]
        loaded.append(plgpu.load(at, mask=mask, other=None if mask is None else 0.0))
    return tuple(loaded)


def _store(p: Plan, ref, first, tile: int, head, columns: int, length: int, values: tuple) -> None:
    for (column, size), value in zip(p.parts(columns), values, strict=True):
        mask = _mask(first, tile, length, column, size, columns)
        plgpu.store(ref.at[pl.ds(first, tile), head, pl.ds(column, size)], value.astype(ref.dtype), mask=mask)


def _load_vector(ref, first, tile: int, head, length: int, other: float, check: bool = True):
    mask = _mask(first, tile, length, check=check)
    return plgpu.load(ref.at[head, pl.ds(first, tile)], mask=mask, other=None if mask is None else other)


def _store_vector(ref, first, tile: int, head, length: int, value) -> None:
    plgpu.store(ref.at[head, pl.ds(first, tile)], value, mask=_mask(first, tile, length))
