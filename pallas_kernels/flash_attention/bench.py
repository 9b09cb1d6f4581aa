"""The calls that `python -m pallas_kernels.bench flash_attention` times: forward, and forward with backward, by our
implementations and by public ones."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import Contest
from pallas_kernels.flash_attention import Mask, best_implementation, flash_attention
from pallas_kernels.flash_attention.shapes import Case
from pallas_kernels.target import target

TOKENS = {"cpu": 4096, "gpu": 32768, "tpu": 32768}  # of all rows together
WIDTH = {"cpu": 256, "gpu": 2048, "tpu": 2048}  # heads times head dimension


def cases(platform: str, quick: bool) -> Iterator[Case]:
    """Yield calls with T from 1k to 32k (on CPUs 1k and 4k) and head dimensions 64 and 128: causal and full, packed
    rows, a window, grouped queries."""
    dtype = "float32" if platform == "cpu" else "bfloat16"
    lengths = (1024,) if quick else (1024, 4096) if platform == "cpu" else (1024, 2048, 4096, 8192, 16384, 32768)
    for H in (64,) if quick or platform == "cpu" else (64, 128):
        N = WIDTH[platform] // H
        for T in lengths:
            base = Case("", B=TOKENS[platform] // T, T=T, S=T, N=N, K=N, H=H, V=H, dtype=dtype)
            shape = f"T={T} H={H}"
            yield replace(base, name=f"{shape} causal")
            yield replace(base, name=f"{shape} full", mask=Mask(causal=False))
            yield replace(base, name=f"{shape} causal, 8 documents", segments=8)
            if T >= 4096 or quick:
                yield replace(base, name=f"{shape} window {T // 8}", mask=Mask(window=T // 8))
            if H == 128 or platform == "cpu":
                yield replace(base, name=f"{shape} causal, 4 queries a key head", K=max(N // 4, 1))


def contests(platform: str, quick: bool) -> Iterator[Contest]:
    """Yield each case forward, then forward with backward, by our implementations for the device and by public ones."""
    for case in cases(platform, quick):
        arrays, kwargs = case.arguments()
        q, k, v = (jnp.asarray(x, case.dtype) for x in arrays)
        segments = tuple(jnp.asarray(x) for x in kwargs["segment_ids"]) if case.segments else None
        pairs = visible_pairs(case, segments)
        matmul = 2 * pairs * case.N
        ways = dict(_ours(case, segments)) | dict(_theirs(platform, case, segments))
        size = q.dtype.itemsize
        moved = size * (2 * q.size + k.size + v.size)
        error = partial(_error, case, [np.asarray(x[:1], np.float64) for x in (q, k, v)], segments)
        notes = {"T": case.T, "H": case.H, "B": case.B, "N": case.N, "K": case.K}
        yield Contest(
            f"{case.name}, forward", matmul * (case.H + case.V), moved, case.dtype, (q, k, v), ways, error, notes
        )
        both = {name: _with_gradients(way) for name, way in ways.items()}
        flops = matmul * (4 * case.H + 3 * case.V)  # 7 products, 2 forward and 5 backward, recomputed logits included
        yield Contest(f"{case.name}, forward and backward", flops, 3 * moved, case.dtype, (q, k, v), both, None, notes)


def visible_pairs(case: Case, segments) -> float:
    """Return the number of visible (query, key) pairs of all rows."""
    total = 0
    for b in range(case.B):
        ids = np.zeros(case.T, np.int32) if segments is None else np.asarray(segments[0][b])
        for length in np.unique(ids, return_counts=True)[1]:
            if not case.mask.causal:
                total += int(length) ** 2
            else:
                w = min(case.mask.window or length, length)
                total += int(w) * (int(w) + 1) // 2 + (int(length) - int(w)) * int(w)
    return float(total)


def _with_gradients(way: Callable) -> Callable:
    def run(q, k, v):
        out, pull = jax.vjp(way, q, k, v)
        return pull(out)

    return run


def _ours(case: Case, segments) -> Iterator[tuple[str, Callable]]:
    hopper = ("hopper",) if any(f"H{n}00" in target()[1] for n in (1, 2)) else ()
    for name in (*best_implementation(*target()), *hopper, "reference"):
        if name != "reference" or case.B * case.N * case.T**2 <= 2**28:
            yield (
                f"ours: {name}",
                lambda q, k, v, name=name: flash_attention(
                    q, k, v, mask=case.mask, segment_ids=segments, implementation=name
                ),
            )


def _theirs(platform: str, case: Case, segments) -> Iterator[tuple[str, Callable]]:
    """Yield public implementations, called as their documentation says. Skips those that cannot express the case."""
    T, H = case.T, case.H
    window = None if case.mask.window is None else (case.mask.window - 1, 0)
    if platform == "gpu" or case.B * case.N * T**2 <= 2**28:
        for name in ("xla", "cudnn") if platform == "gpu" else ("xla",):
            if name == "cudnn" and segments is not None:
                continue  # it takes lengths, not packed rows
            mask = None if segments is None else segments[0][:, None, :, None] == segments[1][:, None, None, :]
            yield (
                f"jax.nn.dot_product_attention, {name}",
                lambda q, k, v, name=name, mask=mask: jax.nn.dot_product_attention(
                    q, k, v, mask=mask, is_causal=case.mask.causal, local_window_size=window, implementation=name
                ),
            )
    grouped = case.K != case.N
    if platform == "gpu" and case.mask.window is None and not grouped:

        def pallas_triton(q, k, v):
            from jax.experimental.pallas.ops.gpu.attention import mha

            return mha(
                q,
                k,
                v,
                segment_ids=None if segments is None else segments[0],
                sm_scale=H**-0.5,
                causal=case.mask.causal,
            )

        yield "jax Pallas Triton", pallas_triton
    if platform == "gpu":

        def tokamax(q, k, v):
            rival = importlib.import_module("tokamax")  # not one of our dependencies
            mask = None if segments is None else segments[0][:, None, :, None] == segments[1][:, None, None, :]
            return rival.dot_product_attention(q, k, v, mask=mask, is_causal=case.mask.causal, local_window_size=window)

        yield "tokamax", tokamax
    if platform == "tpu":
        heads_first = lambda x: x.transpose(0, 2, 1, 3)
        if case.mask.window is None and not grouped:

            def flash(q, k, v):
                from jax.experimental.pallas.ops.tpu import flash_attention as theirs

                ids = None if segments is None else theirs.SegmentIds(*segments)
                out = theirs.flash_attention(
                    *map(heads_first, (q, k, v)), segment_ids=ids, causal=case.mask.causal, sm_scale=H**-0.5
                )
                return heads_first(out)

            yield "jax flash_attention", flash

        def splash(q, k, v):
            from jax.experimental.pallas.ops.tpu import splash_attention as theirs

            mask = theirs.CausalMask((T, T)) if case.mask.causal else theirs.FullMask((T, T))
            if window is not None:
                mask = theirs.LocalMask((T, T), window, 0)
            make = theirs.make_splash_mqa_single_device if case.K == 1 else theirs.make_splash_mha_single_device
            kernel = make(theirs.MultiHeadMask([mask] * case.N))
            ids = None if segments is None else theirs.SegmentIds(*segments)
            run = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))
            return heads_first(run(heads_first(q) * jnp.asarray(H**-0.5, q.dtype), heads_first(k), heads_first(v), ids))

        yield "jax splash_attention", splash


def _error(case: Case, inputs: list[np.ndarray], segments, result) -> float:
    """Return the largest error of the first row's first head against float64, relative to the largest entry, over at
    most 512 queries."""
    q, k, v = (x[0, :, 0] for x in inputs)
    rows = np.linspace(0, case.T - 1, min(case.T, 512)).astype(int)
    logits = q[rows] @ k.T * case.H**-0.5
    mask = np.ones_like(logits, bool)
    distance = rows[:, None] - np.arange(case.S)
    if case.mask.causal:
        mask &= distance >= 0
    if case.mask.window is not None:
        mask &= distance < case.mask.window
    if segments is not None:
        mask &= np.asarray(segments[0][0])[rows][:, None] == np.asarray(segments[1][0])
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    exact = weights @ v / weights.sum(-1, keepdims=True)
    return float(abs(np.asarray(result[0, rows, 0], np.float64) - exact).max() / abs(exact).max())
