"""The calls that `python -m pallas_kernels.bench decode_attention` times: a decode step's attention over full caches,
by our implementations and by public ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.bench import Contest
from pallas_kernels.decode_attention import best_implementation, decode_attention
from pallas_kernels.decode_attention.shapes import SIZES, Case
from pallas_kernels.decode_attention.spec import EIGHT_BITS

ON_CPU = (
    Case("8 rows of 1024", B=8, N=8, K=8, H=64, V=64, S=1024),
    Case("1 row of 8192, grouped", B=1, N=16, K=4, H=64, V=64, S=8192),
    Case("8 rows of 1024, int8", B=8, N=8, K=8, H=64, V=64, S=1024, cache="int8"),
)


def contests(platform: str, quick: bool) -> Iterator[Contest]:
    """Yield each call with full rows, so that it reads the whole cache."""
    for size in (
        ON_CPU[:1] if quick and platform == "cpu" else ON_CPU if platform == "cpu" else SIZES[: 2 if quick else None]
    ):
        case = replace(size, splits=None, lengths=(size.S,) * size.B)
        arrays = _arrays(case)
        ways: dict[str, Callable] = {}
        for name in dict.fromkeys((*best_implementation(platform), "reference")):
            choices = case.choices() | {"implementation": name, "finite": True}
            ways[f"ours: {name}"] = partial(_call, tuple(arrays), choices)
        if case.page is None and case.cache_dtype not in EIGHT_BITS and case.window is None and case.V == case.H:
            for name in ("xla", "cudnn") if platform == "gpu" else ("xla",):
                ways[f"jax.nn.dot_product_attention, {name}"] = lambda q, k, v, lengths, *rest, name=name: (
                    jax.nn.dot_product_attention(
                        q,
                        *(x.transpose(0, 2, 1, 3) for x in (k, v)),
                        key_value_seq_lengths=lengths,
                        implementation=name,
                    )
                )
        flops = 2.0 * case.B * case.T * case.N * case.S * (case.H + case.V)
        dtype = "float32" if case.dtype == "float32" else "bfloat16"
        notes = {
            "B": case.B,
            "T": case.T,
            "N": case.N,
            "K": case.K,
            "H": case.H,
            "S": case.S,
            "cache": case.cache_dtype,
        }
        yield Contest(case.name, flops, float(case.cache_bytes), dtype, tuple(arrays.values()), ways, None, notes)


def _call(names: tuple[str, ...], choices: dict, *arrays: jax.Array) -> Any:
    arguments: dict[str, Any] = dict(zip(names, arrays, strict=True))
    return decode_attention(**arguments, **choices)


def _arrays(case: Case) -> dict[str, jax.Array]:
    """Return random arrays of the case's shapes, made on the device so that the host does not transfer gigabytes."""
    made = {}
    for i, (name, shape) in enumerate(case.shapes().items()):
        key = jax.random.fold_in(jax.random.key(0), i)
        if name == "lengths_B":
            made[name] = jnp.full(shape.shape, case.S, jnp.int32)
        elif name == "page_table_BP":
            pages = np.random.default_rng(0).permutation(shape.shape[0] * shape.shape[1])
            made[name] = jnp.asarray(pages.reshape(shape.shape), jnp.int32)
        elif name.endswith("_scales"):
            made[name] = jnp.full(shape.shape, 0.01, jnp.float32)
        elif shape.dtype == jnp.int8:
            made[name] = jax.random.randint(key, shape.shape, -127, 128, jnp.int8)
        else:
            made[name] = jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype)
    return made
