"""The grouped matmul by `jax.lax.ragged_dot`.

Shapes: M rows, E groups, K contraction, G gates, N columns.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.grouped_matmul.spec import Shaped, Spec, sum_dtype


def unsupported(spec: Spec, lhs: Shaped, rhs: Shaped, scale: Shaped | None) -> str | None:
    """Return the reason why the reference cannot run a call, or None."""
    if spec.tiles != type(spec.tiles)():
        return f"tiles = {spec.tiles}: the reference has no tiles; leave them unset"
    return "interpret = True: only Pallas kernels can be interpreted" if spec.interpret else None


def forward(
    spec: Spec, lhs_MK: Array, rhs_EKGN: Array, scale_EGN: Array | None, sizes_E: Array, keep: bool
) -> tuple[Array, Array | None]:
    """Return (out [M, N], products [M, G, N] if `keep` and there is an activation, else None), in the dtype of lhs."""
    wide = sum_dtype(lhs_MK.dtype)
    E, G = rhs_EKGN.shape[0], 1 if spec.transpose else rhs_EKGN.shape[2]
    rhs = rhs_EKGN.astype(wide)
    rhs_EKX = rhs.swapaxes(1, 2) if spec.transpose else rhs.reshape(E, rhs.shape[1], -1)
    h = jax.lax.ragged_dot(lhs_MK.astype(wide), rhs_EKX, sizes_E, precision=jax.lax.Precision.HIGHEST)
    if scale_EGN is not None:
        expert_M = jnp.repeat(jnp.arange(E), sizes_E, total_repeat_length=h.shape[0])
        h = h * scale_EGN.reshape(E, -1)[expert_M]
    inside_M = jnp.arange(h.shape[0]) < sizes_E.sum()
    h = jnp.where(inside_M[:, None], h, 0)
    if spec.activation is None:
        return h.astype(lhs_MK.dtype), None
    h_MGN = h.reshape(h.shape[0], G, -1)
    out = spec.activation(*(h_MGN[:, g] for g in range(G)))
    return jnp.where(inside_M[:, None], out, 0).astype(lhs_MK.dtype), h_MGN.astype(lhs_MK.dtype) if keep else None


def weights_gradient(spec: Spec, lhs_MK: Array, dout_MN: Array, sizes_E: Array) -> Array:
    """Return lhs^T dout of each group, [E, K, N] float32; zero for an empty group."""
    wide = sum_dtype(lhs_MK.dtype)
    lhs, dout = lhs_MK.astype(wide), dout_MN.astype(wide)
    dims = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    return jax.lax.ragged_dot_general(lhs, dout, sizes_E, dims, precision=jax.lax.Precision.HIGHEST)
