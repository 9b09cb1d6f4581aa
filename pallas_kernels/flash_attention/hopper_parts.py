"""What the Hopper kernels share: the schedule of tiles, the mask and the logits of a tile, and four operations which the
interpreter of jax's Mosaic GPU does not know, with its stand-ins.

Shapes: B batch, N query heads, T queries, S keys; I tiles of queries, J tiles of keys. Tiles in registers are [Q, K] in the
forward pass and for dq, [K, Q] for dk and dv; `q_axis` says which.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels.flash_attention.dropout import keep
from pallas_kernels.flash_attention.mask import EMPTY, FULL, MASKED, visible
from pallas_kernels.flash_attention.spec import Extra, Spec

LOG2E = math.log2(math.e)
ROWS = 64  # of a tile in one warpgroup: wgmma's M
WARPGROUPS = 2  # that compute; one more copies
START = -1e15  # running maximum before any key; between every logit and MASKED, so that exp2(MASKED - START) is 0, not 1

# 16-bit matrices in shared memory as wgmma and TMA want them.
TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

LOAD_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # jax 0.10 asks for an index, 0.12 for none

Refs = dict[str, Any]


def schedule(kinds_BNIJ: np.ndarray | Array, by_keys: bool = False) -> tuple[Int[Array, "B|1 N|1 L M"], ...]:
    """For each tile of queries (`by_keys`: of keys), the tiles to visit: (order, full, some).

    order [B|1, N|1, I, J]: FULL tiles first, then PARTIAL ones, each kind in its own order, then what is never read.
    full, some [B|1, N|1, I] int32: how many of `order` are FULL, and how many are not EMPTY. Masks are applied from `full` on
    only, and EMPTY tiles are neither loaded nor counted, so that the loops hold no branch. NumPy in, NumPy out.
    """
    xp = np if isinstance(kinds_BNIJ, np.ndarray) else jnp
    kinds = kinds_BNIJ.swapaxes(2, 3) if by_keys else kinds_BNIJ
    order = xp.argsort(FULL - kinds, axis=-1, stable=True).astype(xp.int32)
    count = lambda which: which.sum(-1).astype(xp.int32)
    return jnp.asarray(order), jnp.asarray(count(kinds == FULL)), jnp.asarray(count(kinds != EMPTY))


def pick(ref, batch, head):
    """The index of (batch, head) in an array whose first axes may be 1 long."""
    return (batch if ref.shape[0] > 1 else 0, head if ref.shape[1] > 1 else 0)


def side_arrays(spec: Spec, extra: Extra, T_padded: int, S_padded: int) -> dict[str, Array]:
    """The arrays that masks and logits ask for, by name, padded along the sequence; int32 and float32."""
    data = extra.data
    found = {
        "q_segments": (data.q_segments_BT, T_padded),
        "k_segments": (data.k_segments_BS, S_padded),
        "q_positions": (data.q_positions_BT if spec.mask.strided else None, T_padded),
        "k_positions": (data.k_positions_BS if spec.mask.strided else None, S_padded),
        "prefix": (data.prefix_BS, S_padded),
    }
    arrays = {
        name: jnp.pad(x.astype(jnp.int32), ((0, 0), (0, length - x.shape[1])))
        for name, (x, length) in found.items()
        if x is not None
    }
    if not isinstance(data.offset, int):
        arrays["offset"] = data.offset
    if extra.alibi_N is not None:
        arrays["alibi"] = extra.alibi_N
    if spec.dropout:
        arrays["seed"] = extra.seed.reshape(1)
    return arrays


def pad_sequence(x_BL: Array, length: int) -> Array:
    """[B, L, ...] with zeros behind, a copy only where L is not `length` yet."""
    return x_BL if x_BL.shape[1] == length else jnp.pad(x_BL, ((0, 0), (0, length - x_BL.shape[1])) + ((0, 0),) * (x_BL.ndim - 2))


# Operations that the interpreter lacks.


def vector(ref, index, axis: int, interpret: bool):
    """A vector from device or shared memory, laid out as axis `axis` of a tile that wgmma writes."""
    if interpret:
        return ref[index]
    # Not "optimized": a register holds what its thread needs of the tile's rows or columns, not one piece each.
    return plgpu.load(ref.at[index], *LOAD_INDEX, layout=plgpu.Layout.WGMMA.reduce(1 - axis), optimized=False)


def placed(x, axis: int | None, interpret: bool):
    """x laid out as a tile that wgmma writes, or as axis `axis` of one."""
    if interpret:
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if axis is None else plgpu.Layout.WGMMA.reduce(1 - axis))


def iota(shape: tuple[int, int], axis: int, interpret: bool):
    """int32 index along `axis` of a tile."""
    return placed(jax.lax.broadcasted_iota(jnp.int32, shape, axis), None, interpret)


def accumulate(acc, a, b_ref, interpret: bool):
    """acc + a @ b, with a from registers and b from shared memory; waits for the result."""
    if interpret:
        return acc + jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)

    def body(acc_ref):
        plgpu.wgmma(acc_ref, a, b_ref)

    return pl.run_state(body)(plgpu.ACC.init(acc))


def product(a_ref, b_ref, interpret: bool, meanwhile=lambda: None):
    """a @ b^T float32, both from shared memory; `meanwhile` runs while the tensor cores work."""
    if interpret:
        result = jax.lax.dot_general(a_ref[...], b_ref[...], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        meanwhile()
        return result

    def body(acc_ref):
        plgpu.wgmma(acc_ref, a_ref, b_ref.transpose((1, 0)))
        meanwhile()
        return acc_ref[...]

    return pl.run_scoped(body, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))


def spread(x, shape: tuple[int, int], axis: int):
    """A vector along `axis`, repeated to a tile."""
    return jax.lax.broadcast_in_dim(x, shape, (axis,))


# Logits.


def offset_of(extra_offset: Any, refs: Refs, batch):
    """Slot of the first query of a row."""
    return refs["offset"][batch] if "offset" in refs else extra_offset


def is_plain(spec: Spec, refs: Refs) -> bool:
    """True where a logit is a positive number times q.k, so that its maximum may be taken before that product."""
    return spec.softcap is None and "alibi" not in refs and spec.scale > 0


def logits_base2(spec: Spec, refs: Refs, products, slots, head):
    """log2(e) times the logits, before the mask, and the derivative of a logit by scale * q.k (None: 1). `slots`: (of
    queries, of keys) as tiles."""
    slope = None
    if spec.softcap is None:
        logits = products * (spec.scale * LOG2E)
    else:
        # tanh from exp2: the hardware's own tanh has 11 bits, too few for logits of tens.
        grown = jnp.exp2(products * (2.0 * LOG2E * spec.scale / spec.softcap))
        bent = 1.0 - 2.0 / (1.0 + grown)
        logits = bent * (spec.softcap * LOG2E)
        slope = 1.0 - bent * bent
    if "alibi" in refs:
        distance = jnp.abs(slots[0] - slots[1]).astype(jnp.float32)
        logits = logits - distance * (refs["alibi"][head] * LOG2E)
    return logits, slope


def seen_pairs(spec: Spec, S: int, refs: Refs, batch, firsts, slots, shape, q_axis: int, interpret: bool):
    """Which pairs of a PARTIAL tile are seen, bool tile; keys beyond S are not. `firsts`: index of the first query and key."""
    k_axis = 1 - q_axis

    def tile_of(name: str):
        if name not in refs:
            return None
        axis = q_axis if name.startswith("q_") else k_axis
        index = (batch, pl.ds(firsts[axis != q_axis], shape[axis]))
        return spread(vector(refs[name], index, axis, interpret), shape, axis)

    prefix = tile_of("prefix")
    seen = visible(
        spec.mask, *slots, tile_of("q_segments"), tile_of("k_segments"), tile_of("q_positions"), tile_of("k_positions"),
        None if prefix is None else prefix != 0,
    )  # fmt: skip
    inside = slots[1] < S
    return inside if seen is None else seen & inside


def kept_pairs(spec: Spec, refs: Refs, batch, head, indices):
    """Which weights of a tile dropout keeps; `indices`: (of queries, of keys) as tiles."""
    return keep(refs["seed"][0], batch, head, *indices, spec.dropout)


def masked(seen, x):
    """x where seen, else what no maximum takes and whose exp2 is zero."""
    return jnp.where(seen, x, MASKED)


def interpreter(interpret: bool):
    """What `plgpu.kernel` takes as `interpret`: jax's Mosaic GPU interpreter, shared memory starting as NaN, or None."""
    if not interpret:
        return None
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # public only from jax 0.12 on

    return InterpretGPUParams(detect_races=False, uninitialized_memory="nan", skip_floating_point_ops=False)
