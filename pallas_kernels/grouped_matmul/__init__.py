"""Grouped matmul: each group of rows times its own matrix (Gale et al. 2022, MegaBlocks; `jax.lax.ragged_dot`).

The rows of group 0 come first, then those of group 1, and so on. A group may have any number of rows, including none,
and needs no alignment. Implementations: 'tpu' (Mosaic), 'triton' (GPUs), 'xla' (plain JAX in blocks of rows, for CPUs),
'reference' (ragged_dot).

Shapes: M rows, E groups, K contraction, G gates, N columns.
"""

from __future__ import annotations

import importlib
from functools import partial
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from pallas_kernels.grouped_matmul.spec import Activation, Spec, Tiles
from pallas_kernels.target import runs_triton, target

__all__ = ["IMPLEMENTATIONS", "Activation", "Tiles", "best_implementation", "grouped_glu", "grouped_matmul"]

IMPLEMENTATIONS = ("tpu", "triton", "xla", "reference")
DTYPES = ("float32", "bfloat16", "float16", "float64")
QUANTIZED = ("int8", "float8_e4m3fn", "float8_e5m2")
DEFAULT_TILES = Tiles()


def grouped_matmul(
    lhs_MK: Float[Array, "M K"],
    rhs_EKN: Num[Array, "E K N"] | Num[Array, "E N K"],
    sizes_E: Int[Array, "E"],
    *,
    scale_EN: Float[Array, "E N"] | None = None,
    transpose: bool = False,
    tiles: Tiles = DEFAULT_TILES,
    implementation: str | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """Return lhs[m] @ rhs[e] for every row m of group e; rows after the last group are zero.

    - lhs: float32, bfloat16 or float16.
    - rhs: the dtype of lhs, or int8 or float8 with `scale_EN`, which multiplies the columns of the product. Quantized
      weights get no gradient.
    - sizes: rows per group, 0 or more, with a sum of at most M.
    - `transpose`: rhs is [E, N, K].
    - `implementation`: None selects the best for the backend that can run the call. If none can, or a named one cannot,
      a ValueError gives the reason.
    - `interpret`: True, or an interpreter's parameters: run the named Pallas kernel on the CPU, slowly, for tests.

    Sums are float32; the result has the dtype of lhs. Differentiable with respect to lhs and rhs. Inside shard_map, use
    check_vma=False, since the kernels' loops do not carry the types of varying axes. Raises ValueError if arguments do
    not fit together, and names them.
    """
    if rhs_EKN.ndim != 3:
        raise ValueError(f"rhs of shape {rhs_EKN.shape}: must be [E, K, N], or [E, N, K] with transpose")
    columns = rhs_EKN.shape[1 if transpose else 2]
    if scale_EN is not None and scale_EN.shape != (rhs_EKN.shape[0], columns):
        raise ValueError(f"scale_EN of shape {scale_EN.shape}: must be ({rhs_EKN.shape[0]}, {columns})")
    rhs = rhs_EKN if transpose else rhs_EKN[:, :, None]
    scale = None if scale_EN is None else scale_EN[:, None]
    return _call(Spec(transpose, None, tiles, interpret), implementation, lhs_MK, rhs, scale, sizes_E)


def grouped_glu(
    lhs_MK: Float[Array, "M K"],
    rhs_EKGN: Num[Array, "E K G N"],
    sizes_E: Int[Array, "E"],
    activation: Activation,
    *,
    scale_EGN: Float[Array, "E G N"] | None = None,
    tiles: Tiles = DEFAULT_TILES,
    implementation: str | None = None,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """Return activation(lhs[m] @ rhs[e, :, 0], ...) of the G products: the first half of a gated MLP (Shazeer 2020), or
    of a plain MLP if G is 1. Without gradients, the kernels do not write the products to memory.

    `activation` is an elementwise function of G arrays, applied in float32. It is compiled in, so pass the same object
    in every call. For gradients the products are kept, in the dtype of lhs. Other arguments as in `grouped_matmul`.
    """
    if rhs_EKGN.ndim != 4:
        raise ValueError(f"rhs of shape {rhs_EKGN.shape}: must be [E, K, G, N]")
    E, _, G, N = rhs_EKGN.shape
    if scale_EGN is not None and scale_EGN.shape != (E, G, N):
        raise ValueError(f"scale_EGN of shape {scale_EGN.shape}: must be ({E}, {G}, {N})")
    return _call(Spec(False, activation, tiles, interpret), implementation, lhs_MK, rhs_EKGN, scale_EGN, sizes_E)


def best_implementation(platform: str, device_kind: str) -> tuple[str, ...]:
    """Return the implementations for a backend, in the order they are tried. `device_kind` is jax.Device's."""
    if runs_triton(platform, device_kind):
        return ("triton", "xla")
    return ("tpu", "xla") if platform == "tpu" else ("xla",)


def _call(spec: Spec, implementation: str | None, lhs, rhs, scale, sizes):
    spec.tiles.validate()
    inner = rhs.shape[2] if spec.transpose else rhs.shape[1]
    if lhs.ndim != 2 or lhs.shape[1] != inner:
        raise ValueError(f"lhs {lhs.shape}, rhs {rhs.shape}: must be [M, K] and [E, K, N] with the same K")
    if 0 in lhs.shape or 0 in rhs.shape:
        raise ValueError(f"lhs {lhs.shape}, rhs {rhs.shape}: no dimension may be empty")
    if lhs.dtype.name not in DTYPES or rhs.dtype.name not in (lhs.dtype.name, *QUANTIZED):
        raise ValueError(
            f"lhs is {lhs.dtype}, rhs {rhs.dtype}: must share one of {', '.join(DTYPES)}, or rhs must be one of "
            f"{', '.join(QUANTIZED)}"
        )
    if (scale is not None) != (rhs.dtype.name in QUANTIZED):
        raise ValueError(
            f"rhs of {rhs.dtype} with{'out' if scale is None else ''} a scale: {', '.join(QUANTIZED)} need a scale, "
            "other dtypes take none"
        )
    if sizes.shape != rhs.shape[:1] or not jnp.issubdtype(sizes.dtype, jnp.integer):
        raise ValueError(
            f"sizes of shape {sizes.shape} and {sizes.dtype}: must be one integer per group, ({rhs.shape[0]},)"
        )
    if spec.interpret and implementation is None:
        raise ValueError("interpret = True: name the kernel to interpret. Set implementation to 'tpu' or 'triton'")
    scale = None if scale is None else jax.lax.stop_gradient(scale.astype(jnp.float32))
    name = _choose(implementation, spec, lhs, rhs, scale)
    return _matmul(name, spec, lhs, rhs, scale, sizes.astype(jnp.int32))


def _choose(implementation: str | None, spec: Spec, lhs: Array, rhs: Array, scale: Array | None) -> str:
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation = {implementation!r}: unknown; use one of {', '.join(IMPLEMENTATIONS)} or None"
            )
        reason = _module(implementation).unsupported(spec, lhs, rhs, scale)
        if reason is not None:
            raise ValueError(f"implementation = {implementation!r}: {reason}")
        return implementation
    reasons = {}
    for name in best_implementation(*target()):
        reasons[name] = _module(name).unsupported(spec, lhs, rhs, scale)
        if reasons[name] is None:
            return name
    listed = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    raise ValueError(f"implementation = None: no implementation for a {target()[0]} can run the call. {listed}")


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"pallas_kernels.grouped_matmul.{name}")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(name: str, spec: Spec, lhs, rhs, scale, sizes):
    return _module(name).forward(spec, lhs, rhs, scale, sizes, False)[0]


def _matmul_forward(name, spec, lhs, rhs, scale, sizes):
    out, products = _module(name).forward(spec, lhs, rhs, scale, sizes, spec.activation is not None)
    return out, (lhs, rhs, scale, sizes, products)


def _matmul_backward(name, spec, kept, dout):
    lhs, rhs, scale, sizes, products = kept
    if spec.activation is not None:
        wide = jnp.promote_types(products.dtype, jnp.float32)
        gates = [products[:, g].astype(wide) for g in range(products.shape[1])]
        _, pull = jax.vjp(spec.activation, *gates)
        # Concatenated, as the next matmul reads them. Stacking would add a copy, which at 20,480 x 28,672 is 1.2 GB.
        dout = jnp.concatenate([dgate.astype(lhs.dtype) for dgate in pull(dout.astype(wide))], axis=1)
    plain = Spec(not spec.transpose, None, spec.tiles, spec.interpret)
    module, E = _module(name), rhs.shape[0]
    # The backward matmul reads [E, K, G N] as its [E, N, K], or [E, N, K] as its [E, K, 1, N].
    back = rhs[:, :, None] if spec.transpose else rhs.reshape(E, rhs.shape[1], -1)
    scaled = dout
    if scale is not None:  # the backward matmul contracts the columns that the scale multiplies
        expert_M = jnp.repeat(jnp.arange(E), sizes, total_repeat_length=lhs.shape[0])
        scaled = (dout * scale.reshape(E, -1)[expert_M]).astype(lhs.dtype)
    dlhs = module.forward(plain, scaled, back, None, sizes, False)[0]
    if rhs.dtype.name in QUANTIZED:
        drhs = np.zeros(rhs.shape, jax.dtypes.float0) if jnp.issubdtype(rhs.dtype, jnp.integer) else jnp.zeros_like(rhs)
    else:
        pair = (dout, lhs) if spec.transpose else (lhs, dout)
        drhs = module.weights_gradient(plain, *pair, sizes).astype(rhs.dtype).reshape(rhs.shape)
    return dlhs, drhs, None, np.zeros(sizes.shape, jax.dtypes.float0)


_matmul.defvjp(_matmul_forward, _matmul_backward)
