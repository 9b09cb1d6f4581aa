"""The calls that `python -m pallas_kernels.bench grouped_matmul` times: the experts' MLP on sorted rows, forward, and
forward with backward, by our implementations, `jax.lax.ragged_dot`, padded batches and every expert on every row; and
its cost by number of experts.

Shapes: M rows (tokens times experts per token), E experts, D width, F hidden width of an expert.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.bench import Contest
from pallas_kernels.grouped_matmul import best_implementation, grouped_glu, grouped_matmul
from pallas_kernels.grouped_matmul.shapes import swiglu
from pallas_kernels.target import target

EXPERTS = (8, 16, 64, 128, 256)
# Limits for ways that compute every expert on every row: FLOPs on a CPU, where ragged_dot is one of them, and experts
# elsewhere.
DENSE_ON_CPU, DENSE_AT_MOST = 2e10, 16


@dataclass(frozen=True)
class Size:
    """The sizes of one call."""

    name: str
    M: int
    E: int
    D: int
    F: int


def cases(platform: str, quick: bool) -> Iterator[Size]:
    """Yield Mixtral's and fine-grained experts, then two series with E = 8 to 256 and equal FLOPs: one with constant
    rows, where only the number of experts grows, and one with rows * E / 8 and width * 8 / E, where experts are split
    into smaller ones (Dai et al. 2024, DeepSeekMoE)."""
    small = platform == "cpu"
    if small:
        yield Size("8 experts, 2 of each token", 4096, 8, 128, 256)
        if not quick:
            yield Size("64 experts, 8 of each token", 16384, 64, 128, 64)
    else:
        yield Size("Mixtral 8x7B", 16384, 8, 4096, 14336)
        yield Size("DeepSeek-V3, 32 of 256", 16384, 32, 7168, 2048)
        if not quick:
            yield Size("Mixtral 8x7B, decoding 32 tokens", 64, 8, 4096, 14336)
    M, D, F = (1024, 128, 512) if small else (8192, 2048, 8192)
    for E in EXPERTS[:3:2] if quick else EXPERTS:
        yield Size(f"{E} experts, {M} rows", M, E, D, F // 8)
        if not quick:
            yield Size(f"{E} experts, cut finer", M * E // 8, E, D, F * 8 // E)


def contests(platform: str, quick: bool) -> Iterator[Contest]:
    """Yield each size forward, then forward with backward. Rows are assigned at random, so groups are unaligned."""
    dtype = "float32" if platform == "cpu" else "bfloat16"
    for size in cases(platform, quick):
        sizes = np.random.default_rng(0).multinomial(size.M, [1 / size.E] * size.E).astype(np.int32)
        arguments = (*_arrays(size, dtype), jnp.asarray(sizes))
        ways = dict(_ways(platform, size, sizes))
        x, up, down, _ = arguments
        flops = 2.0 * size.M * size.D * size.F * 3
        moved = float(x.dtype.itemsize * (2 * x.size + up.size + down.size))
        notes = {"M": size.M, "E": size.E, "D": size.D, "F": size.F}
        exact = lambda result, arguments=arguments, sizes=sizes: _error(arguments, sizes, result)
        yield Contest(f"{size.name}, forward", flops, moved, dtype, arguments, ways, exact, notes)
        if size.M >= 1024:
            both = {name: _with_gradients(way) for name, way in ways.items()}
            yield Contest(
                f"{size.name}, forward and backward", 3 * flops, 3 * moved, dtype, arguments, both, None, notes
            )


def _arrays(size: Size, dtype: str) -> tuple[Array, ...]:
    """Return rows, up weights (gate and up) and down weights."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((size.M, size.D), (size.E, size.D, 2, size.F), (size.E, size.F, size.D))
    scales = (1.0, size.D**-0.5, size.F**-0.5)
    return tuple(
        jax.random.normal(k, s, dtype) * jnp.asarray(c, dtype) for k, s, c in zip(keys, shapes, scales, strict=True)
    )


def _ways(platform: str, size: Size, sizes: np.ndarray) -> Iterator[tuple[str, Callable]]:
    for name in best_implementation(*target()):

        def ours(x, up, down, sizes, name=name):
            return grouped_matmul(
                grouped_glu(x, up, sizes, swiglu, implementation=name), down, sizes, implementation=name
            )

        yield f"ours: {name}", ours
    on_all = 6.0 * size.M * size.D * size.F * size.E <= DENSE_ON_CPU if platform == "cpu" else size.E <= DENSE_AT_MOST
    if on_all or platform != "cpu":
        yield "jax.lax.ragged_dot", lambda *arguments: _by(jax.lax.ragged_dot, *arguments)
    if platform == "gpu":
        yield "tokamax.ragged_dot", lambda *arguments: _by(importlib.import_module("tokamax").ragged_dot, *arguments)
    if platform == "tpu":

        def megablox(x, rhs, sizes):
            gmm = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox").gmm
            return gmm(x, rhs, sizes, preferred_element_type=x.dtype, tiling=(512, 1024, 1024))

        yield "jax megablox gmm, 512 x 1024 x 1024", lambda *arguments: _by(megablox, *arguments)
    yield "batched matmul, padded to the largest", lambda *arguments: _batched(int(sizes.max()), *arguments)
    if on_all:
        yield "every expert on every row", _dense


def _by(matmul: Callable, x, up, down, sizes):
    h = matmul(x, up.reshape(*up.shape[:2], -1), sizes)
    return matmul(swiglu(*jnp.split(h, 2, 1)), down, sizes)


def _batched(most: int, x, up, down, sizes):
    """Run experts as a batch of `most` rows each, gathered before and after. A capacity without drops would need to
    know `most` in advance."""
    starts = jnp.cumsum(sizes) - sizes
    index = jnp.minimum(starts[:, None] + jnp.arange(most), x.shape[0] - 1)
    h = jnp.einsum("epd,edgf->epgf", x[index], up)
    y = jnp.einsum("epf,efd->epd", swiglu(h[:, :, 0], h[:, :, 1]), down)
    expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])
    return y[expert, jnp.arange(x.shape[0]) - starts[expert]]


def _dense(x, up, down, sizes):
    """Run every expert on every row, with E times the FLOPs, like ragged_dot on a backend without a kernel for it."""
    expert = jnp.repeat(jnp.arange(sizes.shape[0]), sizes, total_repeat_length=x.shape[0])

    def add(total, scanned):
        e, up, down = scanned
        h = jnp.einsum("md,dgf->mgf", x, up)
        return jnp.where((expert == e)[:, None], swiglu(h[:, 0], h[:, 1]) @ down, total), None

    return jax.lax.scan(add, jnp.zeros_like(x), (jnp.arange(sizes.shape[0]), up, down))[0]


def _with_gradients(way: Callable) -> Callable:
    def run(x, up, down, sizes):
        out, pull = jax.vjp(lambda *arrays: way(*arrays, sizes), x, up, down)
        return pull(out)

    return run


def _error(arguments: tuple[Array, ...], sizes: np.ndarray, result: Array) -> float:
    """Return the largest error against float64, relative to the largest entry, of the last row of up to eight
    experts."""
    x, up, down, _ = arguments
    ends, worst, largest = np.cumsum(sizes), 0.0, 0.0
    for e in np.flatnonzero(sizes)[-8:]:
        row, gate_up, out = (np.asarray(a, np.float64) for a in (x[ends[e] - 1], up[e], down[e]))
        gate, other = np.einsum("d,dgf->gf", row, gate_up)
        exact = (gate / (1 + np.exp(-gate)) * other) @ out
        worst = max(worst, float(abs(np.asarray(result[ends[e] - 1], np.float64) - exact).max()))
        largest = max(largest, float(abs(exact).max()))
    return worst / largest
