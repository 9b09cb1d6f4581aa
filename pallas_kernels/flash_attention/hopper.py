"""Flash attention for Hopper (H100, H200, GH200) in Pallas Mosaic GPU: wgmma, TMA, warp specialization.

The forward kernel is in hopper_forward.py. The backward pass uses hopper_backward.py if H + V <= 256, and the Triton
kernels otherwise, because the sums for dk and dv, [64, H] and [64, V], would leave a warpgroup no registers. The shapes
alone decide this; it is not a fallback.

These kernels have never run on a GPU. The evidence for them:
- jax's Mosaic GPU interpreter runs them on a CPU, barriers, rings and TMA copies included, compares them with the
  reference and finds no race. It lacks transposed and register operands of wgmma, so there a dot of the same shared
  memory replaces wgmma, and layouts are left out (hopper_parts.py has the four stand-ins).
- They lower for CUDA on jax 0.10.2 and 0.12.0.1.
- XLA, Mosaic and ptxas 13.0 compile them for sm_90a without a device. ptxas reports no serialized wgmma. The kernel for
  dk and dv spills (at H = V = 128, 44 bytes per thread with jax 0.10.2 and 184 with 0.12.0.1; up to 224 with masks),
  and the forward kernel spills 4 bytes with windows and segments; nothing else spills.

jax's attention_mgpu.py refuses causal masks under CUDA 12.8.0 to 12.9.0 because ptxas miscompiles them; use 12.9.1 or
later.
"""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Array

from pallas_kernels.flash_attention import hopper_backward, hopper_forward, triton
from pallas_kernels.flash_attention.hopper_parts import TILE
from pallas_kernels.flash_attention.spec import Extra, Shaped, Spec, Tiles

FIXED = {"q": TILE, "q_dkv": hopper_backward.STEP, "k_dkv": TILE, "q_dq": TILE, "k_dq": hopper_backward.STEP}


def unsupported(spec: Spec, q: Shaped, k: Shaped, v: Shaped, extra: Extra) -> str | None:
    """Return the reason why the kernels cannot run a call, or None."""
    H, V, block = q.shape[-1], v.shape[-1], spec.mask.block_shape
    if extra.bias_BNTS is not None:
        return (
            "bias_BNTS is not supported: the bias and its gradient take O(T S) memory. Use implementation='xla', or "
            "alibi_N, which the kernel computes"
        )
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"inputs are {q.dtype}: wgmma multiplies bfloat16 or float16; implementation='triton' takes float32"
    if H % 64 or V % 64 or max(H, V) > 256:
        return f"head dimensions {H} and {V}: must be 64, 128, 192 or 256; implementation='triton' takes others"
    for name, size in FIXED.items():
        if getattr(spec.tiles, name) not in (None, size):
            return f"tiles.{name} = {getattr(spec.tiles, name)}: must be {size} or None"
    if block is not None and (block[0] % TILE or block[1] % TILE):
        return (
            f"mask.block_shape = {block}: both must be multiples of {TILE}; "
            "implementation='triton' takes smaller blocks"
        )
    if hopper_forward.plan(H, V, k.shape[1], block and block[1], None) is None:
        return f"head dimensions {H} and {V}: two tiles of keys and values do not fit in shared memory"
    if hopper_forward.plan(H, V, k.shape[1], block and block[1], spec.tiles.k) is None:
        return (
            f"tiles.k = {spec.tiles.k}: must be a multiple of 64 that divides the mask's blocks, and two tiles of "
            f"keys and values must fit in shared memory at head dimensions {H} and {V}; use None for the default"
        )
    return None


forward = hopper_forward.forward


def backward(spec: Spec, q_BTNH: Array, k_BSKH: Array, v_BSKV: Array, extra: Extra, lse_BNT, delta_BNT, dout_BTNV):
    """See spec.py. Runs the Triton kernels if H + V > 256."""
    given = q_BTNH, k_BSKH, v_BSKV, extra, lse_BNT, delta_BNT, dout_BTNV
    if q_BTNH.shape[-1] + v_BSKV.shape[-1] > 256:
        return triton.backward(replace(spec, tiles=Tiles()), *given)
    return hopper_backward.backward(spec, *given)
