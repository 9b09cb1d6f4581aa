"""Differential attention (Ye et al. 2024, arXiv:2410.05258, sec. 2.1) as a user would add it: one file, and one line of
config, `AttentionConfig(layers=("tests.model.differential:DifferentialAttention",))`.

It subtracts one softmax from another over the same values. Unlike in the paper, the scalar lambda is one weight per
head, and the heads are not normalized afterwards.

Shapes: B batch, T time, D width, N query heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from model.attend import AttendSpec, keys_seen
from model.cache import ContiguousCache, append
from model.config import ModelConfig
from model.positions import apply_rope
from model.weights import constant, normal, weight_std

START = 0.3  # initial lambda


class DifferentialAttention(nnx.Module):
    def __init__(self, key, config: ModelConfig, rules, kind: str):
        self.config, self.rules, self.kind = config, rules, kind
        a, D = config.attention, config.embed_dim
        N, K, H = a.num_heads, a.num_kv_heads, a.head_dim
        keys, std = jax.random.split(key, 4), weight_std(config, D)
        of_q, of_kv, of_out = ("embed", "heads", None), ("embed", "kv_heads", None), ("heads", None, "embed")
        self.q = normal(keys[0], (D, 2 * N, H), of_q, std, rules, name="attention.q")
        self.k = normal(keys[1], (D, 2 * K, H), of_kv, std, rules, name="attention.k")
        self.v = normal(keys[2], (D, K, H), of_kv, std, rules, name="attention.v")
        self.out = normal(
            keys[3], (N, H, D), of_out, weight_std(config, N * H, True), rules, name="attention.out", inputs=2
        )
        self.weight = constant((N,), ("heads",), START, rules, name="attention.lambda")

    def __call__(self, x_BTD, ctx, cache):
        rows = ("batch", "sequence")
        q, k, v = self.q.dot(x_BTD, rows), self.k.dot(x_BTD, rows), self.v.dot(x_BTD, rows)
        q, k = (apply_rope(self.config, self.kind, y, ctx.positions_BT, None) for y in (q, k))
        keys, cache = append(cache, k, jnp.concatenate((v, v), axis=2), ctx)
        first, second = jnp.split(keys.attend(q, ctx, AttendSpec(self.config, self.rules, self.kind)), 2, axis=2)
        difference = first - self.weight.gathered(x_BTD.dtype)[:, None] * second
        return self.out.dot(difference, rows), cache

    def init_cache(self, repeats, batch, capacity, dtype):
        a = self.config.attention
        return ContiguousCache.empty(
            repeats, batch, 2 * a.num_kv_heads, capacity, a.head_dim, a.head_dim, dtype, self.rules
        )

    @staticmethod
    def flops(config: ModelConfig, kind: str, length: int) -> float:
        a, D = config.attention, config.embed_dim
        matrices = D * a.head_dim * (3 * a.num_heads + 3 * a.num_kv_heads)
        return 2 * matrices + 8 * a.num_heads * a.head_dim * keys_seen(config, kind, length)

    @staticmethod
    def divisibility(config: ModelConfig) -> list[tuple[str, str, int]]:
        a = config.attention
        return [("model.attention.num_kv_heads", "kv_heads", a.num_kv_heads)]
