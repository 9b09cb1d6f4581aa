"""The calls that tests, check and benchmark share: each feature alone and some together.

They are small enough for an interpreter. In cases named odd, T and S are not multiples of any tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels.flash_attention.mask import Mask, Strided


@dataclass(frozen=True)
class Case:
    """A call of `flash_attention`; `arguments` makes its arrays."""

    name: str
    B: int = 1
    T: int = 256
    S: int = 256
    N: int = 2
    K: int = 2
    H: int = 64
    V: int = 64
    dtype: str = "float32"
    mask: Mask = Mask()
    offset: int | tuple[int, ...] = 0  # a tuple is data, one offset per row
    segments: int = 0  # documents per row, of uneven lengths
    positions: bool = False  # pass positions that restart with each segment
    prefix: int = 0  # leading tokens that all queries see
    blocks: float | None = None  # fraction of the blocks of mask.block_shape that are visible, 0 to 1
    bias: bool = False
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    dropout: float = 0.0

    def arguments(self, seed: int = 0) -> tuple[tuple[np.ndarray, ...], dict[str, Any]]:
        """Return (q, k, v) in float32 and the keyword arguments, as NumPy arrays. The caller casts q, k and v to
        `dtype`."""
        r = np.random.default_rng(seed)
        B, T, S, N = self.B, self.T, self.S, self.N
        q, k, v = (r.normal(size=shape).astype(np.float32)
                   for shape in ((B, T, N, self.H), (B, S, self.K, self.H), (B, S, self.K, self.V)))  # fmt: skip
        kwargs: dict[str, Any] = {"mask": self.mask, "softcap": self.softcap}
        kwargs["offset"] = np.asarray(self.offset, np.int32) if isinstance(self.offset, tuple) else self.offset
        if self.segments:
            k_ids = np.stack([_documents(r, S, self.segments) for _ in range(B)])
            first = np.broadcast_to(np.asarray(self.offset), (B,))
            q_ids = np.stack([ids[np.clip(np.arange(T) + f, 0, S - 1)] for ids, f in zip(k_ids, first, strict=True)])
            kwargs["segment_ids"] = (q_ids, k_ids)
            if self.positions:
                starts = [np.searchsorted(ids, ids) for ids in k_ids]
                k_positions = np.stack([np.arange(S) - start for start in starts]).astype(np.int32)
                q_positions = np.stack(
                    [row[np.clip(np.arange(T) + f, 0, S - 1)] for row, f in zip(k_positions, first, strict=True)]
                )
                kwargs["positions"] = (q_positions, k_positions)
        if self.prefix:
            kwargs["prefix_BS"] = np.broadcast_to(np.arange(S) < self.prefix, (B, S))
        if self.blocks is not None and self.mask.block_shape is not None:
            counts = -(-T // self.mask.block_shape[0]), -(-S // self.mask.block_shape[1])
            kwargs["blocks_BNIJ"] = r.random((B, N, *counts)) < self.blocks
        if self.bias:
            kwargs["bias_BNTS"] = r.normal(size=(1, N, T, S)).astype(np.float32)
        if self.alibi:
            kwargs["alibi_N"] = (2.0 ** -np.linspace(1, 8, N)).astype(np.float32)
        if self.sinks:
            kwargs["sinks_N"] = r.normal(size=N).astype(np.float32)
        if self.dropout:
            kwargs |= {"dropout": self.dropout, "seed": np.array(seed + 17, np.int32)}
        return (q, k, v), kwargs


def _documents(r: np.random.Generator, length: int, count: int) -> np.ndarray:
    """Return ascending document ids from 1 up; each document has at least one token."""
    cuts = np.sort(r.choice(np.arange(1, length), size=count - 1, replace=False))
    return (np.searchsorted(cuts, np.arange(length), side="right") + 1).astype(np.int32)


BIDIRECTIONAL = Mask(causal=False)

CASES = (
    Case("causal"),
    Case("bidirectional", mask=BIDIRECTIONAL),
    Case("window", mask=Mask(window=100)),
    Case("window_both_sides", mask=Mask(causal=False, window=60)),
    Case("prefix", prefix=70),
    Case("strided", mask=Mask(strided=Strided(16, 2, 4))),
    Case("strided_before_the_keys", T=128, S=64, mask=Mask(causal=False, strided=Strided(16, 1, 4)), offset=-70),
    Case("strided_packed", mask=Mask(strided=Strided(16, 2, 4)), segments=3, positions=True),
    Case("block_sparse", mask=Mask(block_shape=(128, 128)), blocks=0.6, T=384, S=384),
    Case("block_sparse_bidirectional", mask=Mask(causal=False, block_shape=(128, 128)), blocks=0.4, T=384, S=384),
    Case("segments", B=2, segments=4),
    Case("grouped_query", N=4, K=2),
    Case("multi_query", N=4, K=1),
    Case("alibi", alibi=True),
    Case("alibi_bidirectional", alibi=True, mask=BIDIRECTIONAL),
    Case("softcap", softcap=2.0),
    Case("sinks", sinks=True),
    Case("bias", bias=True),
    Case("dropout", dropout=0.25),
    Case("head_dim_80", H=80, V=80),
    Case("head_dim_96", H=96, V=96),
    Case("head_dim_128", H=128, V=128),
    Case("head_dim_192_value_128", H=192, V=128),
    Case("head_dim_256", H=256, V=256),
    Case("odd_lengths", T=197, S=197),
    Case("odd_bidirectional", T=131, S=77, mask=BIDIRECTIONAL),
    Case("chunked_prefill", T=100, S=260, offset=160),
    Case("offset_by_row", B=2, T=64, S=256, offset=(192, 37)),
    Case("sees_nothing", T=128, S=128, offset=-64),
    Case("window_head_dim_48", H=48, V=48, mask=Mask(window=40), segments=5),
    Case("bfloat16", dtype="bfloat16", N=4, K=2),
    Case("float16", dtype="float16"),
    Case(
        "all_together",
        B=2,
        T=200,
        S=330,
        N=4,
        K=2,
        H=80,
        V=64,
        mask=Mask(window=150),
        offset=130,
        segments=3,
        alibi=True,
        softcap=5.0,
        sinks=True,
        dropout=0.1,
    ),
    Case(
        "all_together_bfloat16",
        B=2,
        T=200,
        S=330,
        N=4,
        K=2,
        H=128,
        V=128,
        dtype="bfloat16",
        mask=Mask(window=150),
        offset=130,
        segments=3,
        softcap=5.0,
        sinks=True,
    ),
)
