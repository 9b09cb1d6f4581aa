"""Decode attention: one query a row, or the last few, against a long cache.

Every weight is used for a handful of queries, so that the step is bound by memory: keys and values are read once,
K (H + V) * itemsize bytes for each token held (and 8 K bytes of scales where they are quantized), for 2 N T (H + V)
FLOPs; with bfloat16 that is N T / K FLOPs a byte, where a v5e is balanced at 240 and an H100 at 295. The time to expect
is therefore sum(lengths) * K * (H + V) * itemsize / bandwidth. Query heads that share a key head are rows of one
matrix, so that a cache is read once for all of them. A long row may be read in `splits` parts that are merged by their
log-sum-exps (flash-decoding, Dao et al. 2023). Pages: PagedAttention, Kwon et al. 2023.

Implementations: 'tpu' (Mosaic), 'gpu' (Triton), 'reference' (plain JAX: any device).

Shapes: B rows, T queries of each, N query heads, K key/value heads, H head dimension, V that of the values, S slots of
a row, P pages of a row.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.decode_attention.merge import merge
from pallas_kernels.decode_attention.spec import EIGHT_BITS, MASKED, Cache, Shaped, Spec
from pallas_kernels.target import target

__all__ = ["IMPLEMENTATIONS", "MASKED", "MAX_QUERIES", "best_implementation", "decode_attention", "merge"]

IMPLEMENTATIONS = ("tpu", "gpu", "reference")
MAX_QUERIES = 16
Q_DTYPES = ("float32", "bfloat16", "float16")


def decode_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_cache: Array,
    v_cache: Array,
    lengths_B: Int[Array, "B"],
    *,
    page_table_BP: Int[Array, "B P"] | None = None,
    k_scales: Float[Array, "..."] | None = None,
    v_scales: Float[Array, "..."] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_N: Float[Array, "N"] | None = None,
    sinks_N: Float[Array, "N"] | None = None,
    scale: float | None = None,
    splits: int | None = None,
    implementation: str | None = None,
    interpret: Any = False,
    return_lse: bool = False,
    slots_innermost: bool = False,
    finite: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Attention of the last T tokens of each row over the row, whose keys and values are in the cache already.

    q: float32, bfloat16 or float16; T from 1 to 16. Query t of a row of n = lengths_B tokens has slot n - T + t and
    sees the slots up to its own and, with `window`, those less than `window` before it. Slots that no query sees may
    hold anything. Caches: contiguous, k [B, K, S, H] and v [B, K, S, V]; or, with `page_table_BP` (int32), pages, k
    [pages, K, page_size, H] and v [pages, K, page_size, V], where slot s of row b is in page page_table_BP[b, s //
    page_size]; entries that no query's slots fall in are not followed. Float32, bfloat16, float16, or int8,
    float8_e4m3fn, float8_e5m2 with
    `k_scales` and `v_scales`, float32, the cache's shape without its last dimension: a key is its numbers times its
    scale.
    `lengths_B`: int32, from 0 (an idle row: out 0, lse -1e30) to the slots of a row, to which larger ones are cut.
    A logit is scale * q.k; then softcap * tanh(logit / softcap); then - alibi * (query slot - key slot); then the mask.
    `scale`: default H ** -0.5. `sinks_N`: logits of a key that is always seen and whose value is zero.
    `splits`: parts of each row's used length that are worked on apart, then merged. Default: on GPUs as many as fill
    the device; on TPUs one for each core that a device has (2 on v4 and v5p, else 1), since within a core parts run in
    turn.
    `implementation`: None takes the backend's kernel where it can run the call, else the reference; a named one that
    cannot raises ValueError. `interpret` (True, or an interpreter's
    parameters) runs a named kernel on the CPU, slowly, for tests.

    `finite`: a promise that slots which no query sees hold finite numbers, which spares the reference a copy of the
    values.
    `slots_innermost`: for 'tpu' and H (or V) that is no multiple of 128: the caches lie with their slots innermost, as
    XLA keeps arguments of a program, rather than as it keeps what a loop updates. A wrong word costs copies of the
    cache on the way into the kernel (tpu.py says more), never the result. Caches of 128 or 256 wide heads are best: no
    copies.

    Sums and softmax are float32; weights are multiplied with values in q's dtype where q is no wider than the cache,
    else in float32. Returns out in q's dtype and, with `return_lse`, the float32 log-sum-exp of each query's logits,
    sinks included (of caches spread over devices, give the sinks to one and `merge`). A query that sees no key has out
    0 and lse -1e30. No gradients. Under a mesh call it inside shard_map: rows and key heads divide. Raises ValueError
    on arguments that do not fit, naming them.
    """
    cache = Cache(k_cache, v_cache, k_scales, v_scales, page_table_BP)
    _check(q_BTNH, cache, lengths_B, alibi_N, sinks_N, window, softcap, splits)
    B, T, N, H = q_BTNH.shape
    K, V = k_cache.shape[1], v_cache.shape[-1]
    G = N // K
    spec = Spec(
        T, H**-0.5 if scale is None else float(scale), window, softcap, splits or 1, interpret, slots_innermost, finite
    )
    name = _choose(implementation, spec, q_BTNH, cache)
    if implementation is None and name == "reference":
        spec = dataclasses.replace(spec, splits=1)  # it has no parts, and needs none
    module = _module(name)
    if splits is None and name != "reference":
        spec = replace(spec, splits=module.default_splits(q_BTNH, cache))
    in_float32 = lambda x: None if x is None else x.astype(jnp.float32)
    lengths_B = jnp.clip(lengths_B.astype(jnp.int32), 0, cache.capacity)
    if page_table_BP is not None:
        cache = cache._replace(page_table_BP=page_table_BP.astype(jnp.int32))
    whole = spec.splits == 1 and sinks_N is None
    q_BKRH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 2).reshape(B, K, T * G, H)
    outs, lses = module.forward(
        spec, q_BKRH, cache, lengths_B, in_float32(alibi_N), q_BTNH.dtype if whole else jnp.float32
    )
    out, lse = (outs[0], lses[0]) if spec.splits == 1 else merge(outs, lses)
    if sinks_N is not None:
        # The sink is one more part: a key of value zero, for those who see any key at all.
        sinks = jnp.broadcast_to(
            jnp.tile(sinks_N.astype(jnp.float32).reshape(1, K, 1, G), (1, 1, T, 1)).reshape(1, K, T * G), lse.shape
        )
        sinks = jnp.where(lse > MASKED / 2, sinks, MASKED)
        out, lse = merge(jnp.stack([out, jnp.zeros_like(out)]), jnp.stack([lse, sinks]))
    out_BTNV = jnp.moveaxis(out.reshape(B, K, T, G, V), 2, 1).reshape(B, T, N, V).astype(q_BTNH.dtype)
    if not return_lse:
        return out_BTNV
    return out_BTNV, jnp.moveaxis(lse.reshape(B, K, T, G), 3, 2).reshape(B, N, T)


def best_implementation(platform: str) -> tuple[str, ...]:
    """Implementations for a backend, the fastest first."""
    return {"tpu": ("tpu", "reference"), "gpu": ("gpu", "reference"), "cuda": ("gpu", "reference")}.get(
        platform, ("reference",)
    )


def _choose(implementation: str | None, spec: Spec, q_BTNH: Shaped, cache: Cache) -> str:
    if implementation is None:
        if spec.interpret:
            raise ValueError("interpret = True: name the kernel to interpret, implementation = 'tpu' or 'gpu'")
        for name in best_implementation(target()[0]):
            if name == "reference" or _module(name).unsupported(spec, q_BTNH, cache) is None:
                return name
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation = {implementation!r}: unknown; use one of {', '.join(IMPLEMENTATIONS)} or None"
        )
    reason = _module(implementation).unsupported(spec, q_BTNH, cache)
    if reason is not None:
        raise ValueError(f"implementation = {implementation!r}: {reason}")
    return implementation


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.decode_attention.{name}")


def _check(q, cache: Cache, lengths, alibi, sinks, window, softcap, splits) -> None:
    k, v, table = cache.k, cache.v, cache.page_table_BP
    layout = "[B, K, S, H]" if table is None else "[pages, K, page_size, H]"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q {q.shape}, k_cache {k.shape}, v_cache {v.shape}: must be [B, T, N, H] and {layout} twice")
    B, T, N, H = q.shape
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"q {q.shape}, k_cache {k.shape}, v_cache {v.shape}: no dimension may be empty")
    if k.shape[3] != H or v.shape[:3] != k.shape[:3] or (table is None and k.shape[0] != B):
        raise ValueError(f"q {q.shape}, k_cache {k.shape}, v_cache {v.shape}: do not fit [B, T, N, H] and {layout}")
    if N % k.shape[1]:
        raise ValueError(f"k_cache has {k.shape[1]} heads: must divide the {N} heads of q")
    if T > MAX_QUERIES:
        raise ValueError(f"q has T = {T} queries a row: at most {MAX_QUERIES}; use flash_attention for more")
    if q.dtype.name not in Q_DTYPES:
        raise ValueError(f"q is {q.dtype}: use one of {', '.join(Q_DTYPES)}")
    if k.dtype != v.dtype or k.dtype.name not in Q_DTYPES + EIGHT_BITS:
        raise ValueError(
            f"k_cache is {k.dtype}, v_cache {v.dtype}: must share one of {', '.join(Q_DTYPES + EIGHT_BITS)}"
        )
    for name, scales in (("k_scales", cache.k_scales), ("v_scales", cache.v_scales)):
        if (scales is not None) != (k.dtype.name in EIGHT_BITS):
            raise ValueError(f"{name} go with caches of 8 bits and only those; k_cache is {k.dtype}")
        if scales is not None and (scales.shape != k.shape[:3] or scales.dtype != jnp.float32):
            raise ValueError(f"{name} {scales.shape} {scales.dtype}: must be {k.shape[:3]} float32")
    for name, x, shape in (("lengths_B", lengths, (B,)), ("alibi_N", alibi, (N,)), ("sinks_N", sinks, (N,))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of shape {x.shape}: must be {shape}")
    for name, x in (("lengths_B", lengths), ("page_table_BP", table)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} is {x.dtype}: must be int32")
    if table is not None and (table.ndim != 2 or table.shape[0] != B or not table.shape[1]):
        raise ValueError(f"page_table_BP of shape {table.shape}: must be [{B}, pages of a row]")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1; None for all")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap}: must be above 0; None for none")
    if splits is not None and splits < 1:
        raise ValueError(f"splits = {splits}: must be at least 1; None for the default")
