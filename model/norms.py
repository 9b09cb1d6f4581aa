"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32.

Shapes: B batch, T time, D width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model.config import NormConfig
from model.weights import Axes, constant
from sharding.rules import ShardingRules


class Norm(nnx.Module):
    """A norm over the last dimensions of its input: those of its scale, which then multiplies them."""

    def __init__(self, shape: tuple[int, ...], axes: Axes, config: NormConfig, rules: ShardingRules, name: str):
        self.config = config
        self.scale = constant(shape, axes, 0.0 if config.unit_offset else 1.0, rules, name=f"{name}.scale")
        self.bias = constant(shape, axes, 0.0, rules, name=f"{name}.bias") if config.bias else None

    def __call__(self, x: Float[Array, "*lead width"]) -> Float[Array, "*lead width"]:
        dims = tuple(range(x.ndim - self.scale.ndim, x.ndim))
        y = x.astype(jnp.float32)
        if self.config.kind == "layernorm":
            y = y - y.mean(dims, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(dims, keepdims=True) + self.config.epsilon)
        scale = self.scale.gathered(jnp.float32)
        y = y * (1.0 + scale if self.config.unit_offset else scale)
        if self.bias is not None:
            y = y + self.bias.gathered(jnp.float32)
        return y.astype(x.dtype)
