"""Flash attention on TPUs (Mosaic): the interface of spec.py. The kernels are in tpu_forward.py and tpu_backward.py,
the list of tiles they visit in tpu_pairs.py, tile sizes and memory in tpu_tiles.py.

Outside the kernels, queries, keys and values are transposed to heads first, which XLA fuses with the operations that
produce them, and padded to whole tiles. float16, which the matrix units lack, is computed in float32.

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension, V head dimension of the values;
for R, C and P see tpu_pairs.py.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pallas_kernels.flash_attention import tpu_pairs
from pallas_kernels.flash_attention.spec import Extra, Shaped, Spec
from pallas_kernels.flash_attention.tpu_backward import backward_call
from pallas_kernels.flash_attention.tpu_forward import LOG2E, Job, forward_call
from pallas_kernels.flash_attention.tpu_pairs import MAX_HEADS, MAX_TILES, MAX_WORDS, Pairs
from pallas_kernels.flash_attention.tpu_tiles import LANES, Cut, backward_cut, forward_cut, generation, round_up
from pallas_kernels.target import target


def unsupported(spec: Spec, q: Shaped, k: Shaped, v: Shaped, extra: Extra) -> str | None:
    """Return the reason why the kernels cannot run a call, or None."""
    if target()[0] != "tpu" and not spec.interpret:
        return f"needs a TPU, not a {target()[0]}; interpret=True runs it there, slowly"
    if q.dtype == jnp.float64:
        return "TPUs have no float64; use float32"
    if extra.bias_BNTS is not None:
        return (
            "bias_BNTS is not supported: the bias and its gradient take O(T S) memory. Use implementation='xla', or "
            "alibi_N, which the kernel computes"
        )
    try:
        for backward in (False, True):
            _check_list(spec, q, k, v, extra, backward)
    except ValueError as error:
        return str(error)
    return None


def forward(spec: Spec, q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, extra: Extra) -> tuple[Array, Array]:
    """See spec.py."""
    B, T, N, _ = q_BTNH.shape
    S, V = v_BSKV.shape[1], v_BSKV.shape[3]
    dtype = _working(q_BTNH.dtype)
    cut, pairs = _plan(spec, q_BTNH, k_BSKH, v_BSKV, extra, backward=False)
    wide = generation().mxu > LANES
    scale = spec.scale * LOG2E if spec.softcap is None else spec.scale / spec.softcap
    q, k, v = (_by_head(x, tile, dtype) for x, tile in ((q_BTNH, cut.q), (k_BSKH, cut.k), (v_BSKV, cut.k)))
    sums = not spec.dropout and (V % LANES != 0 or (wide and V % (2 * LANES) != 0))
    if V % LANES:
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, round_up(V) - V)), constant_values=1.0 if sums else 0.0)
    after_max = spec.softcap is None and scale > 0
    job = _job(
        spec, cut, pairs, S, V, N // k.shape[1], dtype,
        scale_before_max=None if after_max else scale, scale_after_max=scale if after_max else None,
        ones=LANES if sums and V % LANES == 0 else 0, sums=sums,
    )  # fmt: skip
    arrays = {"q": q, "k": k, "v": v, **_ints(extra, cut, lanes_of_queries=False), **_floats(extra)}
    if extra.sinks_N is not None:
        arrays["sinks"] = extra.sinks_N.astype(jnp.float32) * LOG2E
    out, lse = _call(forward_call, job, pairs, arrays, extra, B, N, k.shape[1], spec.interpret)
    return out[:, :, :T].transpose(0, 2, 1, 3).astype(q_BTNH.dtype), lse[:, :, 0, :T]


def backward(spec: Spec, q_BTNH, k_BSKH, v_BSKV, extra: Extra, lse_BNT, delta_BNT, dout_BTNV):
    """See spec.py."""
    B, T, N, _ = q_BTNH.shape
    S, V = v_BSKV.shape[1], v_BSKV.shape[3]
    K = k_BSKH.shape[2]
    dtype = _working(q_BTNH.dtype)
    cut, pairs = _plan(spec, q_BTNH, k_BSKH, v_BSKV, extra, backward=True)
    scale = spec.scale * LOG2E if spec.softcap is None else spec.scale / spec.softcap
    q, do = (_by_head(x, cut.q, dtype) for x in (q_BTNH, dout_BTNV))
    k, v = (_by_head(x, cut.k, dtype) for x in (k_BSKH, v_BSKV))
    rows = lambda x, fill: _pad(x.astype(jnp.float32), 2, cut.q, fill)[:, :, None, :]
    scales = {"scale_before_max": scale, "scale_after_max": None}
    job = _job(spec, cut, pairs, S, V, N // K, dtype, **scales, ones=0, sums=False)
    arrays = {
        "q": q, "k": k, "v": v, "do": do, "lse": rows(lse_BNT * LOG2E, 1e30), "delta": rows(delta_BNT, 0.0),
        **_ints(extra, cut, lanes_of_queries=True), **_floats(extra),
    }  # fmt: skip
    dq, dk, dv = _call(backward_call, job, pairs, arrays, extra, B, N, K, spec.interpret)
    if pairs.visited_RCm is not None:
        dq = tpu_pairs.zero_unvisited(dq, pairs.visited_RCm, cut.q, N // K)
    back = lambda x, length, like: x[:, :, :length].transpose(0, 2, 1, 3).astype(like.dtype)
    return back(dq * spec.scale, T, q_BTNH), back(dk, S, k_BSKH), back(dv, S, v_BSKV), None


def _working(dtype) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32)


def _plan(spec: Spec, q, k, v, extra: Extra, backward: bool) -> tuple[Cut, Pairs]:
    cut = _cut(spec, q, k, v, extra, backward)
    made = tpu_pairs.pairs(
        spec.mask, extra.data, q.shape[1], k.shape[1], cut.q, cut.k, backward=backward, group=q.shape[2] // k.shape[2]
    )
    return cut, made


def _cut(spec: Spec, q, k, v, extra: Extra, backward: bool) -> Cut:
    data = extra.data
    q_ints = sum(x is not None for x in (data.q_segments_BT, data.q_positions_BT))
    k_ints = sum(x is not None for x in (data.k_segments_BS, data.k_positions_BS, data.prefix_BS))
    make = backward_cut if backward else forward_cut
    return make(spec, q.shape[1], k.shape[1], q.shape[3], v.shape[3], _working(q.dtype).itemsize, q_ints, k_ints)


def _check_list(spec: Spec, q, k, v, extra: Extra, backward: bool) -> None:
    """Raise ValueError if the tiles do not fit in VMEM or their list does not fit in scalar memory."""
    cut = _cut(spec, q, k, v, extra, backward)
    T, S, G = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    tiles = max(-(-T // cut.q), -(-S // cut.k))
    if tiles > MAX_TILES:
        raise ValueError(f"{tiles} tiles of {cut.q} queries or {cut.k} keys: at most {MAX_TILES}; use larger tiles")
    per_head = extra.data.blocks_BNIJ is not None and extra.data.blocks_BNIJ.shape[1] > 1
    if per_head and G > MAX_HEADS:
        raise ValueError(f"blocks_BNIJ by head, {G} query heads per key/value head: at most {MAX_HEADS}")
    heads = G if per_head and backward else 1
    words = tpu_pairs.length(spec.mask, extra.data, T, S, cut.q, cut.k, backward, heads)
    words *= 1 if not per_head else k.shape[2] if backward else q.shape[2]
    if words > MAX_WORDS:
        raise ValueError(
            f"a list of {words} tiles of {cut.q} x {cut.k} per row of the batch: at most {MAX_WORDS} fit in scalar "
            "memory; use larger tiles, or blocks that all heads share"
        )


def _job(spec: Spec, cut: Cut, pairs: Pairs, S: int, V: int, group: int, dtype, **how) -> Job:
    R, C, _ = pairs.words_RCP.shape
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return Job(
        spec=spec, cut=cut, S=S, V=V, group=group, rows_differ=R > 1, heads_differ=C > 1, partial=pairs.partial,
        full=pairs.full, shifts=pairs.shifts, only_shifts=pairs.only_shifts, precision=precision, **how,
    )  # fmt: skip


def _pad(x: Array, axis: int, tile: int, fill=0) -> Array:
    short = -x.shape[axis] % tile
    return jnp.pad(x, [(0, short if a == axis else 0) for a in range(x.ndim)], constant_values=fill) if short else x


def _by_head(x_BTNH: Array, tile: int, dtype) -> Array:
    """Return x as [B, N, T, H], with T padded to whole tiles."""
    return _pad(x_BTNH.astype(dtype).transpose(0, 2, 1, 3), 2, tile)


def _ints(extra: Extra, cut: Cut, lanes_of_queries: bool) -> dict[str, Array]:
    """Return the integers of queries and keys by name: along the lanes, repeated in 8 sublanes [B, 8, T], or along the
    sublanes, repeated in 128 lanes [B, T, 128]."""
    data = extra.data
    found = {}
    for name, x, tile in (
        ("q_segments", data.q_segments_BT, cut.q), ("q_positions", data.q_positions_BT, cut.q),
        ("k_segments", data.k_segments_BS, cut.k), ("k_positions", data.k_positions_BS, cut.k),
        ("prefix", data.prefix_BS, cut.k),
    ):  # fmt: skip
        if x is not None:
            x = _pad(x.astype(jnp.int32), 1, tile)
            lanes = name.startswith("q_") == lanes_of_queries
            found[name] = jnp.repeat(x[:, None, :], 8, 1) if lanes else jnp.repeat(x[:, :, None], LANES, 2)
    return found


def _floats(extra: Extra) -> dict[str, Array]:
    return {} if extra.alibi_N is None else {"alibi": extra.alibi_N.astype(jnp.float32) * LOG2E}


def _call(kernel, job: Job, pairs: Pairs, arrays: dict[str, Array], extra: Extra, B: int, N: int, K: int, interpret):
    """Run the kernel on the whole batch, or row by row if the lists of all rows together are too long."""
    words = jnp.asarray(pairs.words_RCP)
    offsets = jnp.broadcast_to(jnp.asarray(extra.data.offset, jnp.int32), (B,))
    seed = jnp.zeros((), jnp.int32) if extra.seed is None else extra.seed
    if words.size <= MAX_WORDS:
        numbers = jnp.concatenate([offsets, seed[None], jnp.zeros((1,), jnp.int32)])
        return kernel(job, words, numbers, arrays, B, N, K, interpret)
    shared = {name: x for name, x in arrays.items() if x.ndim == 1}

    def one(row):
        words, offset, index, per_row = row
        numbers = jnp.stack([offset, seed, index])
        made = kernel(job, words[None], numbers, {**per_row, **shared}, 1, N, K, interpret)
        return [x[0] for x in made]

    per_row = {name: x[:, None] for name, x in arrays.items() if x.ndim > 1}
    return lax.map(one, (words, offsets, jnp.arange(B, dtype=jnp.int32), per_row))
