"""What the implementations are told: the choices that are compiled in, and the arrays beside q, k and v.

Every implementation offers the same two functions on the same shapes:

    forward(spec, q_BTNH, k_BSKH, v_BSKV, extra) -> (out_BTNV in q's dtype, lse_BNT float32)
    backward(spec, q_BTNH, k_BSKH, v_BSKV, extra, lse_BNT, delta_BNT, dout_BTNV) -> (dq, dk, dv, dbias or None)

and `unsupported(spec, q, k, v, extra) -> str | None`, the reason why it cannot run a call. In `backward`, `lse_BNT` is
that of the whole row (it may span more keys than k holds, as in ring attention; +1e30 where a row sees nothing), and
`delta_BNT` is sum(out * dout) minus the cotangent of lse: the gradient of a logit is p * (dp - delta), with p =
exp(logit - lse).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels.flash_attention.mask import Mask, MaskData

Shaped = Array | jax.ShapeDtypeStruct  # for choices that go by shape and dtype alone


@dataclass(frozen=True)
class Tiles:
    """Queries and keys that a kernel works on at once. None: the implementation's choice for the shape and the
    device."""

    q: int | None = None  # forward
    k: int | None = None
    q_dkv: int | None = None  # backward, gradients of keys and values
    k_dkv: int | None = None
    q_dq: int | None = None  # backward, gradients of queries
    k_dq: int | None = None

    def validate(self) -> None:
        """Raises ValueError that names field, value and fix."""
        for field in fields(self):
            size = getattr(self, field.name)
            if size is not None and (size < 8 or size % 8):
                raise ValueError(f"tiles.{field.name} = {size}: a multiple of 8, or None for the default")


@dataclass(frozen=True)
class Spec:
    """Everything about a call that is compiled in."""

    mask: Mask
    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    tiles: Tiles = Tiles()
    interpret: Any = False  # a bool, or the parameters of an interpreter


class Extra(NamedTuple):
    """The arrays of a call beside q, k and v; None where a feature is not used."""

    data: MaskData = MaskData()
    bias_BNTS: Float[Array, "#B #N T S"] | None = None  # added to the logits after the soft cap
    alibi_N: Float[Array, "N"] | None = None  # float32 slopes: slope * |query slot - key slot| is taken from the logits
    sinks_N: Float[Array, "N"] | None = None  # float32 logit of a key that is always seen and whose value is zero
    seed: Int[Array, ""] | None = None  # int32, of the dropout
