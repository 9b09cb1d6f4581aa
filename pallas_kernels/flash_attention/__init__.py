"""Flash attention (Dao et al. 2022): softmax(q k^T) v without the matrix of weights in memory, forward and backward.

`flash_attention` is the whole operation; `flash_attention_backward` is its backward pass alone, for attention whose
keys are spread over devices. Implementations: 'tpu' (Mosaic), 'hopper' (Mosaic GPU: wgmma, TMA, warp specialization),
'triton' (other GPUs), 'xla' (plain JAX in tiles, any device, with the same memory bound), 'reference' (the formula,
O(T S) memory).

Shapes: B batch, T queries, S keys, N query heads, K key/value heads, H head dimension, V head dimension of the values.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.flash_attention.mask import (
    EMPTY,
    FULL,
    MASKED,
    PARTIAL,
    Mask,
    MaskData,
    Strided,
    tile_kinds,
    visible,
)
from pallas_kernels.flash_attention.spec import Extra, Spec, Tiles
from pallas_kernels.target import runs_triton, target

__all__ = [
    "EMPTY", "FULL", "IMPLEMENTATIONS", "MASKED", "PARTIAL", "Mask", "Strided", "Tiles", "best_implementation",
    "flash_attention", "flash_attention_backward", "tile_kinds", "visible",
]  # fmt: skip

IMPLEMENTATIONS = ("tpu", "hopper", "triton", "xla", "reference")
CAUSAL, DEFAULT_TILES = Mask(), Tiles()
DTYPES = ("float32", "bfloat16", "float16", "float64")

Pair = tuple[Int[Array, "B T"], Int[Array, "B S"]]


def flash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    *,
    mask: Mask = CAUSAL,
    offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    segment_ids: Int[Array, "B T"] | Pair | None = None,
    positions: Int[Array, "B T"] | Pair | None = None,
    prefix_BS: Bool[Array, "B S"] | None = None,
    blocks_BNIJ: Bool[Array, "#B #N I J"] | None = None,
    bias_BNTS: Float[Array, "#B #N T S"] | None = None,
    alibi_N: Float[Array, "N"] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    dropout: float = 0.0,
    seed: Int[Array, ""] | None = None,
    tiles: Tiles = DEFAULT_TILES,
    implementation: str | None = None,
    interpret: Any = False,
    return_lse: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Return softmax(scale * q k^T ...) v over the keys that each query sees.

    A logit is scale * q.k; then softcap * tanh(logit / softcap) (Gemma 2); then + bias - alibi * |query slot - key
    slot| (Press et al. 2022); then the mask. Head n attends to key/value head n // (N / K) (Ainslie et al. 2023).

    q, k and v share one dtype, float32, bfloat16 or float16; sums, softmax and lse are float32.

    - `offset`: slot of the first query, where the first key has slot 0; S - T continues a row. One number, or one per
      row. An int is compiled in, so the tiles that it leaves empty cost nothing; an array is data.
    - `segment_ids`: for packed rows; a query sees only keys with its id. One array for both, or (queries', keys').
    - `positions`: the positions by which `mask.strided` counts blocks; default: slots.
    - `prefix_BS`: keys that every query of their segment sees, regardless of causal, window and strided.
    - `blocks_BNIJ`: which blocks of mask.block_shape may be visible.
    - `scale`: default H ** -0.5.
    - `sinks_N`: the logit of an extra key that every query sees and whose value is zero (gpt-oss).
    - `dropout`: probability that a weight is dropped; the others are scaled by 1 / (1 - dropout). Needs `seed`, an
      int32; the same seed drops the same weights in every implementation and tiling.
    - `implementation`: None selects the best for the backend that can run the call. A named one that cannot run it
      raises ValueError.
    - `interpret`: True, or an interpreter's parameters: run the named Pallas kernel on the CPU, slowly, for tests.

    Inside shard_map, use check_vma=False, since the kernels' loops do not carry the types of varying axes.

    Differentiable with respect to q, k, v, bias and sinks, through both results, but not to alibi. Memory in addition
    to inputs and outputs is O(B N T), except with 'reference' and for a bias, whose gradient is as large as the bias.
    Returns out in q's dtype and, with `return_lse`, the float32 log-sum-exp of each query's logits, sinks included. A
    query that sees no key has out 0 and lse MASKED, or its sink's logit if there are sinks. Raises ValueError if
    arguments do not fit together, and names them.
    """
    B, T, N, H = _check_qkv(q_BTNH, k_BSKH, v_BSKV)
    S = k_BSKH.shape[1]
    mask.validate()
    tiles.validate()
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap}: must be above 0, or None for no soft cap")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout = {dropout}: must be a probability in [0, 1)")
    if dropout and (seed is None or jnp.shape(seed) != () or not jnp.issubdtype(jnp.asarray(seed).dtype, jnp.integer)):
        raise ValueError(
            f"dropout = {dropout}: needs seed, an int32 scalar that changes with each step and layer, not {seed}"
        )
    if interpret and implementation is None:
        raise ValueError(
            "interpret = True: name the kernel to interpret. Set implementation to 'tpu', 'hopper' or 'triton'"
        )
    q_segments, k_segments = _pair("segment_ids", segment_ids, (B, T), (B, S))
    q_positions, k_positions = _pair("positions", positions, (B, T), (B, S))
    offset = _offset(offset, B)
    _check_shape("prefix_BS", prefix_BS, ((B,), (S,)))
    if (blocks_BNIJ is None) != (mask.block_shape is None):
        raise ValueError(f"blocks_BNIJ and mask.block_shape = {mask.block_shape}: give both or neither")
    if mask.block_shape is not None:
        counts = -(-T // mask.block_shape[0]), -(-S // mask.block_shape[1])
        _check_shape("blocks_BNIJ", blocks_BNIJ, ((1, B), (1, N), counts[:1], counts[1:]))
    _check_shape("bias_BNTS", bias_BNTS, ((1, B), (1, N), (T,), (S,)))
    _check_shape("alibi_N", alibi_N, ((N,),))
    _check_shape("sinks_N", sinks_N, ((N,),))
    prefix_BS, blocks_BNIJ = (None if x is None else jnp.asarray(x, bool) for x in (prefix_BS, blocks_BNIJ))
    data = MaskData(offset, q_segments, k_segments, q_positions, k_positions, prefix_BS, blocks_BNIJ)
    in_float32 = lambda x: None if x is None else x.astype(jnp.promote_types(x.dtype, jnp.float32))
    extra = Extra(
        data,
        in_float32(bias_BNTS),
        None if alibi_N is None else jax.lax.stop_gradient(in_float32(alibi_N)),
        in_float32(sinks_N),
        jnp.asarray(seed, jnp.int32) if dropout else None,
    )
    spec = Spec(mask, H**-0.5 if scale is None else float(scale), softcap, float(dropout), tiles, interpret)
    name = _choose(implementation, spec, q_BTNH, k_BSKH, v_BSKV, extra)
    static = offset if isinstance(offset, int) else None
    out, lse = _attend(name, spec, static, q_BTNH, k_BSKH, v_BSKV, _without_offset(extra))
    return (out, lse) if return_lse else out


def flash_attention_backward(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKV: Float[Array, "B S K V"],
    out_BTNV: Float[Array, "B T N V"],
    lse_BNT: Float[Array, "B N T"],
    dout_BTNV: Float[Array, "B T N V"],
    *,
    mask: Mask = CAUSAL,
    offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    segment_ids: Int[Array, "B T"] | Pair | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    alibi_N: Float[Array, "N"] | None = None,
    tiles: Tiles = DEFAULT_TILES,
    implementation: str | None = None,
    interpret: Any = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Return the gradients (dq, dk, dv) that these keys contribute.

    `out`, `lse` and `dout` belong to whole rows, which may also see other keys. The sum of the results over all parts
    of the keys is the gradient of the whole. Other arguments as in `flash_attention`."""
    B, T, _, H = _check_qkv(q_BTNH, k_BSKH, v_BSKV)
    q_segments, k_segments = _pair("segment_ids", segment_ids, (B, T), (B, k_BSKH.shape[1]))
    if mask.strided is not None or mask.block_shape is not None:
        raise ValueError(f"mask = {mask}: strided and block_shape need whole rows; use flash_attention instead")
    mask.validate()
    tiles.validate()
    _check_shape("alibi_N", alibi_N, ((q_BTNH.shape[2],),))
    _check_shape("lse_BNT", lse_BNT, ((B,), (q_BTNH.shape[2],), (T,)))
    for name, x in (("out_BTNV", out_BTNV), ("dout_BTNV", dout_BTNV)):
        _check_shape(name, x, tuple((n,) for n in (*q_BTNH.shape[:3], v_BSKV.shape[3])))
    alibi_N = None if alibi_N is None else alibi_N.astype(jnp.promote_types(alibi_N.dtype, jnp.float32))
    extra = Extra(MaskData(_offset(offset, B), q_segments, k_segments), alibi_N=alibi_N)
    spec = Spec(mask, H**-0.5 if scale is None else float(scale), softcap, 0.0, tiles, interpret)
    name = _choose(implementation, spec, q_BTNH, k_BSKH, v_BSKV, extra)
    return _backward(name, spec, q_BTNH, k_BSKH, v_BSKV, extra, out_BTNV, lse_BNT, dout_BTNV, None)[:3]


def best_implementation(platform: str, device_kind: str) -> tuple[str, ...]:
    """Return the implementations for a backend, in the order they are tried. `device_kind` is jax.Device's.

    'hopper' is never a default and must be named: its matrix instructions have neither run on a device nor been
    interpreted."""
    if runs_triton(platform, device_kind):
        return ("triton", "xla")
    return ("tpu", "xla") if platform == "tpu" else ("xla",)


def _choose(implementation: str | None, spec: Spec, q: Array, k: Array, v: Array, extra: Extra) -> str:
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation = {implementation!r}: unknown; use one of {', '.join(IMPLEMENTATIONS)} or None"
            )
        reason = _module(implementation).unsupported(spec, q, k, v, extra)
        if reason is not None:
            raise ValueError(f"implementation = {implementation!r}: {reason}")
        return implementation
    for name in best_implementation(*target()):
        if _module(name).unsupported(spec, q, k, v, extra) is None:
            return name
    raise AssertionError("xla supports every call")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.flash_attention.{name}")


def _without_offset(extra: Extra) -> Extra:
    """Return `extra` without a static offset, which is not an array and is passed separately."""
    static = isinstance(extra.data.offset, int)
    return extra._replace(data=extra.data._replace(offset=None)) if static else extra


def _with_offset(extra: Extra, offset: int | None) -> Extra:
    return extra if offset is None else extra._replace(data=extra.data._replace(offset=offset))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(name: str, spec: Spec, offset: int | None, q, k, v, extra: Extra):
    return _module(name).forward(spec, q, k, v, _with_offset(extra, offset))


def _attend_forward(name, spec, offset, q, k, v, extra):
    out, lse = _attend(name, spec, offset, q, k, v, extra)
    return (out, lse), (q, k, v, extra, out, lse)


def _attend_backward(name, spec, offset, kept, cotangents):
    q, k, v, extra, out, lse = kept
    dout, dlse = cotangents
    dq, dk, dv, dbias, dsinks = _backward(name, spec, q, k, v, _with_offset(extra, offset), out, lse, dout, dlse)
    zeros = jax.tree.map(lambda x: None, extra)
    return dq, dk, dv, zeros._replace(bias_BNTS=dbias, sinks_N=dsinks)


_attend.defvjp(_attend_forward, _attend_backward)


def _backward(name, spec, q, k, v, extra: Extra, out, lse, dout, dlse):
    wide = lse.dtype
    delta_BNT = jnp.einsum("btnv,btnv->bnt", out.astype(wide), dout.astype(wide))
    if dlse is not None:
        delta_BNT = delta_BNT - dlse
    no_keys = lse <= MASKED / 2
    safe_lse_BNT = jnp.where(no_keys, -MASKED, lse)  # so that exp(logit - lse) is zero for every key
    dq, dk, dv, dbias = _module(name).backward(spec, q, k, v, extra, safe_lse_BNT, delta_BNT, dout)
    dsinks = None
    if extra.sinks_N is not None:
        dsinks = -(jnp.exp(extra.sinks_N[:, None] - safe_lse_BNT) * delta_BNT).sum((0, 2))
    return dq, dk, dv, dbias, dsinks


def _check_qkv(q: Array, k: Array, v: Array) -> tuple[int, int, int, int]:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: must be [B, T, N, H], [B, S, K, H] and [B, S, K, V]")
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise ValueError(f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: must share one of {', '.join(DTYPES)}; cast them")
    B, T, N, H = q.shape
    if k.shape[0] != B or v.shape[:3] != k.shape[:3] or k.shape[3] != H:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: must be [B, T, N, H], [B, S, K, H] and [B, S, K, V]")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: no dimension may be empty")
    if N % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads: must divide the {N} heads of q")
    return B, T, N, H


def _offset(given, B: int) -> int | Array:
    if isinstance(given, int):
        return given
    array = jnp.asarray(given)
    if array.shape not in ((), (B,)) or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"offset of shape {array.shape} and dtype {array.dtype}: must be an int, an integer scalar, or an integer "
            f"array of shape ({B},), one per row"
        )
    return jnp.broadcast_to(array.astype(jnp.int32), (B,))


def _pair(name: str, given, q_shape: tuple[int, int], k_shape: tuple[int, int]):
    if given is None:
        return None, None
    q, k = (jnp.asarray(x) for x in (given if isinstance(given, tuple) else (given, given)))
    if not (jnp.issubdtype(q.dtype, jnp.integer) and jnp.issubdtype(k.dtype, jnp.integer)):
        raise ValueError(f"{name} of dtypes {q.dtype} and {k.dtype}: must be integers")
    if q.shape != q_shape or k.shape != k_shape:
        raise ValueError(
            f"{name} of shapes {q.shape} and {k.shape}: must be {q_shape} for queries and {k_shape} for keys; "
            "give a pair (queries', keys') where they differ"
        )
    return q.astype(jnp.int32), k.astype(jnp.int32)


def _check_shape(name: str, x: Array | None, allowed: tuple[tuple[int, ...], ...]) -> None:
    if x is not None and (x.ndim != len(allowed) or any(n not in ok for n, ok in zip(x.shape, allowed, strict=True))):
        wanted = ", ".join(" or ".join(str(n) for n in dict.fromkeys(ok)) for ok in allowed)
        raise ValueError(f"{name} of shape {x.shape}: must be ({wanted})")
