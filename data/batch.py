"""The batch that training steps and evaluations read, made once from windows of T + 1 tokens.

Letters: B rows, T predicted tokens per row, W = T + 1 tokens per window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from data.packing import positions_of, target_weights


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and targets of equal length: NumPy arrays on the host, JAX arrays on the device.

    A preference pair is two batches. `loss_weights` alone defines which tokens count: no other code compares segments,
    looks for padding or shifts by one.
    """

    tokens: Any  # int32 [B, T]: token t is the input at position t
    targets: Any  # int32 [B, T]: the token that follows token t in its window
    loss_weights: Any  # float32 [B, T]: weight of predicting target t; 0 across documents and for padding
    positions: Any  # int32 [B, T]: position of token t within its document's part of the window
    segment_ids: Any  # int32 [B, T]: document of token t, counted from 1 in each window; 0 for padding

    @classmethod
    def of_windows(
        cls, tokens_BW: np.ndarray | jax.Array, segment_ids_BW: np.ndarray, loss_weights_BT: np.ndarray | None = None
    ) -> Self:
        """Return the batch for windows of T + 1 tokens.

        Weights are 1 for a target in the same document as its input, else 0. `loss_weights_BT` multiplies them.
        """
        weights_BT = target_weights(segment_ids_BW)
        return cls(
            tokens=tokens_BW[:, :-1],
            targets=tokens_BW[:, 1:],
            loss_weights=weights_BT if loss_weights_BT is None else weights_BT * loss_weights_BT,
            positions=positions_of(segment_ids_BW)[:, :-1],
            segment_ids=segment_ids_BW[:, :-1],
        )

    def window(self) -> tuple[jax.Array, jax.Array]:
        """Return (tokens, segment ids), both int32 [B, W], with the last target as the last token.

        The last token's segment id is 0 unless its loss weight is above 0.
        """
        last = jnp.where(self.loss_weights[:, -1:] > 0, self.segment_ids[:, -1:], 0)
        return (
            jnp.concatenate([self.tokens, self.targets[:, -1:]], axis=1),
            jnp.concatenate([self.segment_ids, last], axis=1),
        )

    def with_window(self, tokens_BW: np.ndarray | jax.Array) -> Self:
        """Return the batch with other tokens and the same documents, positions and weights."""
        return replace(self, tokens=tokens_BW[:, :-1], targets=tokens_BW[:, 1:])

    def arrays(self) -> dict[str, Any]:
        """Return the arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
