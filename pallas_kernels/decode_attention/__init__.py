"""Decode attention: the last query of each row, or its last few, against a long cache.

The step is bound by memory. It reads each key and value once, K (H + V) * itemsize bytes per cached token (plus 8 K
bytes of scales if the cache is quantized), and spends 2 N T (H + V) FLOPs on them. In bfloat16 that is N T / K FLOPs
per byte, while a v5e balances at 240 and an H100 at 295, so the expected time is sum(lengths) * K * (H + V) * itemsize
/ bandwidth. Query heads that share a key head are rows of one matrix, so one read of the cache serves them all. A long
row may be read in `splits` parts, merged by their log-sum-exps (flash-decoding, Dao et al. 2023). Pages follow
PagedAttention (Kwon et al. 2023).

Implementations: 'tpu' (Mosaic), 'gpu' (Triton), 'reference' (plain JAX, any device).

Shapes: B rows, T queries per row, N query heads, K key/value heads, H head dimension, V head dimension of the values,
S slots per row, P pages per row.
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
    """Return the attention of the last T tokens of each row over the row, whose keys and values are already cached.

    q is float32, bfloat16 or float16, with T from 1 to 16. In a row of n = lengths_B tokens, query t has slot n - T + t
    and sees every slot up to its own or, with `window`, the last `window` of them. Slots that no query sees may hold
    anything.

    Caches are contiguous, k [B, K, S, H] and v [B, K, S, V], or paged if `page_table_BP` (int32) is given, k [pages, K,
    page_size, H] and v [pages, K, page_size, V]. Slot s of row b is then in page page_table_BP[b, s // page_size]; page
    table entries that no query needs are not followed. Caches are float32, bfloat16 or float16, or they are int8,
    float8_e4m3fn or float8_e5m2 with float32 `k_scales` and `v_scales` of the cache's shape without its last dimension.
    A quantized key is its stored numbers times its scale.

    A logit is scale * q.k; then softcap * tanh(logit / softcap); then - alibi * (query slot - key slot); then the mask.

    - `lengths_B`: int32, from 0 (an idle row: out 0, lse -1e30) to the slots of a row. Larger values are clipped.
    - `scale`: default H ** -0.5.
    - `sinks_N`: the logit of an extra key that every query sees and whose value is zero.
    - `splits`: number of parts of each row's used length that are computed separately, then merged. Default: on GPUs
      enough to fill the device; on TPUs one per core of a device (2 on v4 and v5p, else 1), since the parts of one core
      run in turn.
    - `implementation`: None selects the backend's kernel if it can run the call, else the reference. A named
      implementation that cannot run the call raises ValueError.
    - `interpret`: True, or an interpreter's parameters: run the named kernel on the CPU, slowly, for tests.
    - `finite`: a promise that slots which no query sees hold finite numbers. It saves the reference a copy of the
      values.
    - `slots_innermost`: for 'tpu' if H or V is not a multiple of 128. True if the caches are arguments of the compiled
      program, where XLA stores slots innermost; False if a loop updates them. A wrong value costs copies of the cache
      on the way into the kernel (see tpu.py) but does not change the result. Head dimensions of 128 or 256 need no
      copies.

    Sums and softmax are float32. Weights and values are multiplied in q's dtype if the cache has 8 bits or q's dtype,
    else in float32. Returns out in q's dtype and, with `return_lse`, the float32 log-sum-exp of each query's logits,
    sinks included. For a cache spread over devices, give the sinks to one device and call `merge`. A query that sees no
    key has out 0 and lse -1e30. Has no gradients. Under a mesh, call it inside shard_map, sharded by rows or key heads.
    Raises ValueError if arguments do not fit together, and names them.
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
        spec = dataclasses.replace(spec, splits=1)  # the reference does not split rows
    module = _module(name)
    if splits is None and name != "reference":
        spec = replace(spec, splits=module.default_splits(q_BTNH, cache))
    in_float32 = lambda x: None if x is None else x.astype(jnp.float32)
    lengths_B = jnp.clip(lengths_B.astype(jnp.int32), 0, cache.capacity)
    if page_table_BP is not None:
        cache = cache._replace(page_table_BP=page_table_BP.astype(jnp.int32))
    is_final = spec.splits == 1 and sinks_N is None
    q_BKRH = jnp.moveaxis(q_BTNH.reshape(B, T, K, G, H), 1, 2).reshape(B, K, T * G, H)
    outs, lses = module.forward(
        spec, q_BKRH, cache, lengths_B, in_float32(alibi_N), q_BTNH.dtype if is_final else jnp.float32
    )
    out, lse = (outs[0], lses[0]) if spec.splits == 1 else merge(outs, lses)
    if sinks_N is not None:
        # Merge the sink as one more part, a key whose value is zero, for queries that see any key at all.
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
    """Return the implementations for a backend, fastest first."""
    return {"tpu": ("tpu", "reference"), "gpu": ("gpu", "reference"), "cuda": ("gpu", "reference")}.get(
        platform, ("reference",)
    )


def _choose(implementation: str | None, spec: Spec, q_BTNH: Shaped, cache: Cache) -> str:
    if implementation is None:
        if spec.interpret:
            raise ValueError("interpret = True: name the kernel to interpret. Set implementation to 'tpu' or 'gpu'")
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
        raise ValueError(f"q has T = {T} queries per row: at most {MAX_QUERIES}; use flash_attention for more")
    if q.dtype.name not in Q_DTYPES:
        raise ValueError(f"q is {q.dtype}: use one of {', '.join(Q_DTYPES)}")
    if k.dtype != v.dtype or k.dtype.name not in Q_DTYPES + EIGHT_BITS:
        raise ValueError(
            f"k_cache is {k.dtype}, v_cache {v.dtype}: must share one of {', '.join(Q_DTYPES + EIGHT_BITS)}"
        )
    for name, scales in (("k_scales", cache.k_scales), ("v_scales", cache.v_scales)):
        if (scales is not None) != (k.dtype.name in EIGHT_BITS):
            raise ValueError(f"{name}: required for 8-bit caches and refused for others; k_cache is {k.dtype}")
        if scales is not None and (scales.shape != k.shape[:3] or scales.dtype != jnp.float32):
            raise ValueError(f"{name} {scales.shape} {scales.dtype}: must be {k.shape[:3]} float32")
    for name, x, shape in (("lengths_B", lengths, (B,)), ("alibi_N", alibi, (N,)), ("sinks_N", sinks, (N,))):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} of shape {x.shape}: must be {shape}")
    for name, x in (("lengths_B", lengths), ("page_table_BP", table)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} is {x.dtype}: must be int32")
    if table is not None and (table.ndim != 2 or table.shape[0] != B or not table.shape[1]):
        raise ValueError(f"page_table_BP of shape {table.shape}: must be [{B}, pages per row]")
    if window is not None and window < 1:
        raise ValueError(f"window = {window}: must be at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap = {softcap}: must be above 0, or None for no soft cap")
    if splits is not None and splits < 1:
        raise ValueError(f"splits = {splits}: must be at least 1, or None for the default")
