"""The arguments that all implementations take: the static choices, and the arrays other than q, k and v.

Every implementation provides the same two functions on the same shapes:

    forward(spec, q_BTNH, k_BSKH, v_BSKV, extra) -> (out_BTNV in q's dtype, lse_BNT float32)
    backward(spec, q_BTNH, k_BSKH, v_BSKV, extra, lse_BNT, delta_BNT, dout_BTNV) -> (dq, dk, dv, dbias or None)

and `unsupported(spec, q, k, v, extra) -> str | None`, the reason why it cannot run a call. In `backward`, `lse_BNT`
belongs to the whole row, which may span more keys than k holds, as in ring attention; it is +1e30 where a query sees no
key. `delta_BNT` is sum(out * dout) minus the cotangent of lse. The gradient of a logit is p * (dp - delta), with p =
exp(logit - lse).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.mask import Mask, MaskData

Shaped = Array | jax.ShapeDtypeStruct  # where only shape and dtype matter


@dataclass(frozen=True)
class Tiles:
    """Tile sizes: the queries and keys that a kernel processes at once. None: the implementation chooses for the shape
    and the device."""

    q: int | None = None  # queries per tile, forward
    k: int | None = None  # keys per tile, forward
    q_dkv: int | None = None  # queries per tile, gradients of keys and values
    k_dkv: int | None = None
    q_dq: int | None = None  # queries per tile, gradient of queries
    k_dq: int | None = None

    def validate(self) -> None:
        """Raise ValueError if a size is not a multiple of 8."""
        for field in fields(self):
            size = getattr(self, field.name)
            if size is not None and (size < 8 or size % 8):
                raise ValueError(f"tiles.{field.name} = {size}: must be a multiple of 8, or None for the default")


@dataclass(frozen=True)
class Spec:
    """The static arguments of a call, which are compiled in."""

    mask: Mask
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    tiles: Tiles = Tiles()
    interpret: Any = False  # a bool, or the parameters of an interpreter


class Extra(NamedTuple):
    """The arrays of a call other than q, k and v; None if a feature is not used."""

    data: MaskData = MaskData()
    bias_BNTS: Float[Array, "#B #N T S"] | None = None  # added to the logits after the soft cap
    alibi_N: Float[Array, "N"] | None = None  # float32 slopes; logits lose slope * |query slot - key slot|
    sinks_N: Float[Array, "N"] | None = None  # float32 logit of a key that every query sees and whose value is zero
    seed: Int[Array, ""] | None = None  # int32 seed of the dropout
