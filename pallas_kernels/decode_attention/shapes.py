"""The calls that tests, check and benchmark share: each feature alone, some together, and the sizes to compile and
time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.spec import EIGHT_BITS

NOWHERE = 2**30  # the page of slots that no kernel may read


@dataclass(frozen=True)
class Case:
    """A call of `decode_attention`; `arguments` makes its arrays, `shapes` only their shapes."""

    name: str
    B: int = 3
    T: int = 1
    N: int = 2
    K: int = 1
    H: int = 64
    V: int = 64
    S: int = 256
    lengths: tuple[int, ...] = (0, 129, 256)
    page: int | None = None
    dtype: str = "float32"
    cache: str | None = None  # dtype of keys and values; None: `dtype`
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    splits: int | None = 1
    slots_innermost: bool = False

    @property
    def cache_dtype(self) -> str:
        return self.cache or self.dtype

    def choices(self) -> dict[str, Any]:
        """Return the keyword arguments that are not arrays."""
        return {
            "window": self.window,
            "softcap": self.softcap,
            "splits": self.splits,
            "slots_innermost": self.slots_innermost,
        }

    def arguments(self, seed: int = 0) -> dict[str, jax.Array]:
        """Return the arrays by parameter name. Slots that no query of a row sees hold NaN (int8 slots have a NaN
        scale), and page table entries that no query needs are NOWHERE."""
        r = np.random.default_rng(seed)
        B, K, S = self.B, self.K, self.S
        made = {"q_BTNH": jnp.asarray(r.normal(size=(B, self.T, self.N, self.H)), self.dtype)}
        lengths = np.asarray(self.lengths, np.int32)
        slots = np.arange(S)
        low = 0 if self.window is None else np.maximum(lengths - self.T - self.window + 1, 0)[:, None]
        needed = (slots < lengths[:, None]) & (slots >= low)
        table = self._table(np.random.default_rng(seed + 1), needed) if self.page else None
        for name, width in (("k", self.H), ("v", self.V)):
            x = r.normal(size=(B, K, S, width)).astype(np.float32)
            scales = None
            if self.cache_dtype in EIGHT_BITS:
                top = 127.0 if self.cache_dtype == "int8" else 100.0
                scales = np.abs(x).max(-1) / top
                x = x / scales[..., None]
                x = np.round(x) if self.cache_dtype == "int8" else x
                scales = np.where(needed[:, None], scales, np.nan).astype(np.float32)
            x = np.where(needed[:, None, :, None], x, 127.0 if self.cache_dtype == "int8" else np.nan)
            made[f"{name}_cache"] = jnp.asarray(self._paged(x, table), self.cache_dtype)
            if scales is not None:
                made[f"{name}_scales"] = jnp.asarray(self._paged(scales, table))
        made["lengths_B"] = jnp.asarray(lengths)
        if table is not None:
            made["page_table_BP"] = jnp.asarray(table)
        if self.alibi:
            made["alibi_N"] = jnp.asarray(2.0 ** -np.linspace(1, 8, self.N), jnp.float32)
        if self.sinks:
            made["sinks_N"] = jnp.asarray(r.normal(size=self.N), jnp.float32)
        return made

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of `arguments()`."""
        lead = (self.B, self.K, self.S)
        if self.page:
            lead = (self.B * self.S // self.page, self.K, self.page)
        shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, jnp.dtype(dtype))
        made = {
            "q_BTNH": shape((self.B, self.T, self.N, self.H), self.dtype),
            "k_cache": shape((*lead, self.H), self.cache_dtype),
            "v_cache": shape((*lead, self.V), self.cache_dtype),
            "lengths_B": shape((self.B,), "int32"),
        }
        if self.page:
            made["page_table_BP"] = shape((self.B, self.S // self.page), "int32")
        if self.cache_dtype in EIGHT_BITS:
            made |= {"k_scales": shape(lead, "float32"), "v_scales": shape(lead, "float32")}
        for name, wanted in (("alibi_N", self.alibi), ("sinks_N", self.sinks)):
            if wanted:
                made[name] = shape((self.N,), "float32")
        return made

    def _table(self, r: np.random.Generator, needed: np.ndarray) -> np.ndarray:
        assert self.page is not None
        pages = r.permutation(self.B * self.S // self.page).reshape(self.B, -1)
        used = needed.reshape(self.B, -1, self.page).any(-1)
        return np.where(used, pages, NOWHERE).astype(np.int32)

    def _paged(self, x: np.ndarray, table: np.ndarray | None) -> np.ndarray:
        """Return x [B, K, S, ...] in pages; pages in no row's table are NaN."""
        if table is None or self.page is None:
            return x
        B, K, S = x.shape[:3]
        pages = np.full((B * S // self.page, K, self.page, *x.shape[3:]), np.nan, x.dtype)
        if self.cache_dtype == "int8" and x.ndim == 4:
            pages[...] = 127.0
        rows = np.moveaxis(x.reshape(B, K, -1, self.page, *x.shape[3:]), 2, 1)
        used = table != NOWHERE
        pages[table[used]] = rows[used]
        return pages

    @property
    def cache_bytes(self) -> int:
        """Bytes that a step reads from full caches."""
        shapes = self.shapes()
        names = ("k_cache", "v_cache", "k_scales", "v_scales")
        return sum(math.prod(x.shape) * x.dtype.itemsize for name, x in shapes.items() if name in names)


CASES = (
    Case("one_query", N=4, K=2),
    Case("slots_innermost", V=80, lengths=(1, 130, 256), slots_innermost=True),
    Case("four_queries", T=4, lengths=(2, 131, 128)),
    Case("odd_slots", S=264, lengths=(1, 264, 257)),
    Case("window", T=3, S=512, window=70, lengths=(512, 60, 200)),
    Case("softcap_alibi_sinks", T=2, N=6, K=3, softcap=2.0, alibi=True, sinks=True),
    Case("head_dim_128_splits", H=128, V=128, S=512, splits=3, lengths=(300, 512, 3)),
    Case("head_dim_80_value_96", H=80, V=96, lengths=(64, 65, 250)),
    Case("pages_of_16", H=128, V=128, page=16, lengths=(0, 129, 249)),
    Case("pages_of_128_bfloat16", T=2, page=128, dtype="bfloat16", lengths=(1, 129, 249)),
    Case("int8", cache="int8", N=4, K=4, H=128, V=128),
    Case("int8_pages_of_32_bfloat16", cache="int8", dtype="bfloat16", H=128, V=128, page=32),
    Case("float8_e4m3fn", cache="float8_e4m3fn", page=128, H=128, V=128),
    Case("float8_e5m2", cache="float8_e5m2", T=2),
    Case("float16_queries", dtype="float16", cache="bfloat16"),
    Case(
        "all_together",
        T=4,
        N=6,
        K=2,
        H=96,
        V=64,
        S=512,
        page=32,
        cache="int8",
        window=100,
        softcap=5.0,
        alibi=True,
        sinks=True,
        splits=2,
        lengths=(3, 512, 301),
    ),
)

# The heads of Llama 3 8B and of other models, with every layout of a cache.
SIZES = (
    Case("llama", B=8, N=32, K=8, H=128, V=128, S=8192, dtype="bfloat16"),
    Case("llama_pages_of_16", B=8, N=32, K=8, H=128, V=128, S=8192, dtype="bfloat16", page=16),
    Case("llama_int8_pages_of_128", B=8, N=32, K=8, H=128, V=128, S=8192, dtype="bfloat16", cache="int8", page=128),
    Case("llama_float8", B=8, N=32, K=8, H=128, V=128, S=8192, dtype="bfloat16", cache="float8_e4m3fn"),
    Case("head_dim_64", B=4, N=16, K=16, H=64, V=64, S=4096, dtype="bfloat16", slots_innermost=True),
    Case(
        "head_dim_192_value_128_speculative",
        B=4,
        T=4,
        N=16,
        K=16,
        H=192,
        V=128,
        S=2048,
        dtype="bfloat16",
        slots_innermost=True,
    ),
    Case(
        "head_dim_96_features",
        B=4,
        T=2,
        N=16,
        K=4,
        H=96,
        V=96,
        S=2048,
        window=500,
        softcap=30.0,
        alibi=True,
        sinks=True,
        splits=2,
        slots_innermost=True,
    ),
    Case("head_dim_256_multi_query", B=4, T=16, N=16, K=1, H=256, V=256, S=4096, dtype="bfloat16"),
)
