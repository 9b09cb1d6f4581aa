"""Grouped matmul on TPUs (Mosaic). tpu_walk.py lists the visits, tpu_tiles.py chooses the tiles, and tpu_forward.py and
tpu_gradient.py have the kernels.

M may have any size, and in the gradient so may K and N; the excess of the last tiles is ignored. XLA pads the weights,
which copies them, if K is not a multiple of 128, or if N is not and there are several gates. float16, which the matrix
units lack, is computed in float32, for which XLA also copies the weights. float32 is multiplied in six passes of
bfloat16 (Precision.HIGHEST).

Shapes: M rows, E groups, K contraction, G gates, N columns.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.flash_attention.tpu_tiles import generation
from pallas_kernels.grouped_matmul import tpu_tiles, tpu_walk
from pallas_kernels.grouped_matmul.spec import Shaped, Spec
from pallas_kernels.grouped_matmul.tpu_forward import forward_call
from pallas_kernels.grouped_matmul.tpu_gradient import gradient_call
from pallas_kernels.grouped_matmul.tpu_tiles import Call, Cut
from pallas_kernels.target import target


def unsupported(spec: Spec, lhs: Shaped, rhs: Shaped, scale: Shaped | None) -> str | None:
    """Return the reason why the kernels cannot run a call, or None."""
    if target()[0] != "tpu" and not spec.interpret:
        return f"needs a TPU, not a {target()[0]}; interpret=True runs it there, slowly"
    if lhs.dtype == jnp.float64:
        return "TPUs have no float64; use float32"
    (M, K), E = lhs.shape, rhs.shape[0]
    G, N = (1, rhs.shape[1]) if spec.transpose else rhs.shape[2:]
    try:
        cuts = [_forward_cut(spec, lhs, rhs, spec.activation is not None)]
        back = Call(M, E, G * N, K, b=cuts[0][0].b, wb=cuts[0][0].wb)
        cuts.append((back, tpu_tiles.forward_cut(generation(), back, spec.tiles)))
        cuts.append((back, tpu_tiles.gradient_cut(generation(), Call(M, E, K, G * N, b=cuts[0][0].b), spec.tiles)))
    except ValueError as error:
        return str(error)
    visits = max(tpu_walk.max_visits(M, E, cut.m) for _, cut in cuts)
    if visits > tpu_walk.MAX_VISITS:
        most = tpu_walk.MAX_VISITS
        return f"{visits} visits of a tile and a group: at most {most} fit in scalar memory; use a larger tiles.m"
    return None


def forward(
    spec: Spec, lhs_MK: Array, rhs_EKGN: Array, scale_EGN: Array | None, sizes_E: Array, keep: bool
) -> tuple[Array, Array | None]:
    """Return (out [M, N], products [M, G, N] if `keep` and there is an activation, else None), in the dtype of lhs.

    rhs: [E, K, G, N], or [E, N, K] if spec.transpose; float32, bfloat16, float16, int8 or float8."""
    call, cut = _forward_cut(spec, lhs_MK, rhs_EKGN, keep and spec.activation is not None)
    E, G, N = call.E, call.G, call.N
    lhs, rhs = (x.astype(jnp.float32) if x.dtype == jnp.float16 else x for x in (lhs_MK, rhs_EKGN))
    k_pad = -call.K % cut.k
    n_pad = -N % cut.n if G > 1 else 0
    if spec.transpose:
        rhs = _pad(rhs, (0, 0, k_pad))
    else:
        rhs = _pad(rhs, (0, k_pad, 0, n_pad)).reshape(E, call.K + k_pad, G * (N + n_pad))
    scale = None
    if scale_EGN is not None:
        scale = _pad(scale_EGN, (0, 0, n_pad)).reshape(E * G, 1, N + n_pad)
    words, visits = tpu_walk.walk(sizes_E, call.M, cut.m, empty=False)
    made = forward_call(
        spec, cut, _pad(lhs, (0, k_pad)), rhs, scale, words, visits, G, N, call.keep,
        int(tpu_tiles.forward_bytes(call, cut)),
    )  # fmt: skip
    made = [x.astype(lhs_MK.dtype) for x in made]
    # The kernel writes gates outermost. XLA may keep that layout for [M, G, N].
    return made[0], made[1].transpose(1, 0, 2) if call.keep else None


def weights_gradient(spec: Spec, lhs_MK: Array, dout_MN: Array, sizes_E: Array) -> Array:
    """Return lhs^T dout of each group, [E, K, N] float32; zero for an empty group."""
    (M, K), E, N = lhs_MK.shape, sizes_E.shape[0], dout_MN.shape[1]
    lhs, dout = (x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32) for x in (lhs_MK, dout_MN))
    call = Call(M, E, K, N, b=lhs.dtype.itemsize)
    cut = tpu_tiles.gradient_cut(generation(), call, spec.tiles)
    words, visits = tpu_walk.walk(sizes_E, M, cut.m, empty=True)
    return gradient_call(cut, lhs, dout, words, visits, E, spec.interpret, int(tpu_tiles.gradient_bytes(call, cut)))


def _forward_cut(spec: Spec, lhs: Shaped, rhs: Shaped, keep: bool) -> tuple[Call, Cut]:
    G, N = (1, rhs.shape[1]) if spec.transpose else rhs.shape[2:]
    b = 2 if lhs.dtype == jnp.bfloat16 else 4
    wb = 1 if rhs.dtype.itemsize == 1 else b
    call = Call(lhs.shape[0], rhs.shape[0], lhs.shape[1], N, G, b, wb, keep)
    return call, tpu_tiles.forward_cut(generation(), call, spec.tiles)


def _pad(x: Array, by: tuple[int, ...]) -> Array:
    return jnp.pad(x, [(0, n) for n in by]) if any(by) else x
