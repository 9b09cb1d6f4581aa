"""The position-wise MLP: plain (GELU, ReLU, squared ReLU) or gated (SwiGLU, GEGLU, ReGLU; Shazeer 2020).

Shapes: B batch, T time, D width, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from model.attention import weight_std
from model.config import ModelConfig
from model.weights import constant, matmul, normal, use
from sharding.rules import ShardingRules


def gelu(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, sec. 2)."""
    return jax.nn.gelu(x, approximate=True)


def swiglu_clamped(gate: Array, up: Array) -> Array:
    """gpt-oss's activation: SwiGLU with a steeper sigmoid, bounded inputs and a gate that adds the identity."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


# Made once: the grouped matmul compiles an activation in by its identity.
PLAIN: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
GATED: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "reglu": lambda gate, up: jax.nn.relu(gate) * up,
    "swiglu_clamped": swiglu_clamped,
}
ACTIVATIONS: dict[str, Callable[..., Array]] = PLAIN | GATED


def gates(kind: str) -> int:
    """Hidden vectors a token needs: 2 for the gated kinds, else 1."""
    return 2 if kind in GATED else 1


def activate(kind: str, h: Float[Array, "*lead G F"]) -> Float[Array, "*lead F"]:
    """The hidden activation: f(h0), or f(h0, h1) for the gated kinds."""
    return ACTIVATIONS[kind](*(h[..., g, :] for g in range(gates(kind))))


class MLP(nnx.Module):
    """The gate and the up projection are one weight: one large matmul instead of two."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, hidden_dim: int | None = None):
        """`hidden_dim`: default `config.mlp.hidden_dim`."""
        self.config, self.rules = config, rules
        D, F, G = config.embed_dim, hidden_dim or config.mlp.hidden_dim, gates(config.mlp.kind)
        up_key, down_key = jax.random.split(key)
        self.up = normal(up_key, (D, G, F), ("embed", None, "mlp"), weight_std(config, D), rules)
        self.down = normal(down_key, (F, D), ("mlp", "embed"), weight_std(config, F, residual=True), rules)
        self.up_bias = constant((G, F), (None, "mlp"), 0.0, rules) if config.mlp.bias else None
        self.down_bias = constant((D,), ("embed",), 0.0, rules) if config.mlp.bias else None

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        rules, dtype = self.rules, x_BTD.dtype
        up, down = use(self.up, ("embed", None, "mlp"), dtype, rules), use(self.down, ("mlp", "embed"), dtype, rules)
        h_BTGF = matmul(x_BTD, up, 1, ("batch", "sequence", None, "mlp"), rules)
        if self.up_bias is not None:
            h_BTGF = h_BTGF + use(self.up_bias, (None, "mlp"), dtype, rules)
        h_BTF = activate(self.config.mlp.kind, checkpoint_name(h_BTGF, "mlp_hidden"))
        out_BTD = matmul(h_BTF, down, 1, ("batch", "sequence", "embed"), rules)
        if self.down_bias is not None:
            out_BTD = out_BTD + use(self.down_bias, ("embed",), dtype, rules)
        return checkpoint_name(out_BTD, "mlp_out")
