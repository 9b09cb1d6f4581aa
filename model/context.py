"""What every layer of one forward pass knows beside the hidden states.

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
    """The tokens of a call and where they stand. `forward` makes it once; layers, caches and routers read it."""

    token_ids_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]  # what RoPE and learned positions see; they restart with each packed document
    valid_BT: Bool[Array, "B T"]  # False: padding
    cache_index_BT: Int[Array, "B T"]  # index in the row; with a cache, where the token's key and value belong
    segment_ids_BT: Int[Array, "B T"] | None = None  # tokens attend within their segment only; 0 is padding
    prefix_BT: Bool[Array, "B T"] | None = None  # part of the bidirectional prefix; with a cache, of the whole row
    length_B: Int[Array, "B"] | None = None  # context of each row, this call's tokens included; for 'dynamic_ntk'
    page_table_BP: Int[Array, "B P"] | None = None  # pages of each row in a paged cache
    adapter_index_B: Int[Array, "B"] | None = None  # which of several adapters a row uses
    decoding: bool = False  # the tokens continue a cache: the sequence is not here as a whole

    @property
    def start_B(self) -> Int[Array, "B"]:
        """Index of each row's first token of this call."""
        return self.cache_index_BT[:, 0]
