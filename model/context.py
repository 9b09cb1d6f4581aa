"""The inputs of one forward pass that every layer reads besides the hidden states.

Shapes: B batch, T time (tokens of this call), P pages of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
from jaxtyping import Array, Bool, Int

FIELDS = (
    "token_ids_BT", "positions_BT", "valid_BT", "cache_index_BT", "segment_ids_BT", "prefix_BT", "length_B",
    "page_table_BP", "adapter_index_B",
)  # fmt: skip


@partial(jax.tree_util.register_dataclass, data_fields=FIELDS, meta_fields=("decoding",))
@dataclass(frozen=True, eq=False)
class ForwardContext:
    """The tokens of a call and their positions. `forward` creates it once; layers, caches and routers read it."""

    token_ids_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]  # for RoPE and learned positions; they restart with each packed document
    valid_BT: Bool[Array, "B T"]  # False: padding
    cache_index_BT: Int[Array, "B T"]  # index in the row and, with a cache, of the token's key and value
    segment_ids_BT: Int[Array, "B T"] | None = None  # tokens attend only within their segment; 0 is padding
    prefix_BT: Bool[Array, "B T"] | None = None  # True in the bidirectional prefix; with a cache, for the whole row
    length_B: Int[Array, "B"] | None = None  # context length of each row with this call's tokens; for 'dynamic_ntk'
    page_table_BP: Int[Array, "B P"] | None = None  # pages of each row in a paged cache
    adapter_index_B: Int[Array, "B"] | None = None  # adapter of each row, if there are several
    decoding: bool = False  # the tokens continue a cache, so the call does not contain whole sequences

    @property
    def start_B(self) -> Int[Array, "B"]:
        """Index in its row of each row's first token of this call."""
        return self.cache_index_BT[:, 0]
