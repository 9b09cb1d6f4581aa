"""The position-wise MLP: plain (GELU, ReLU, squared ReLU, SiLU) or gated (SwiGLU, GEGLU, ReGLU, GLU, bilinear;
Shazeer 2020).

Shapes: B batch, T time, D width, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from model.config import ModelConfig
from model.weights import constant, normal, weight_std
from sharding.rules import ShardingRules


def gelu(x: Array) -> Array:
    """GELU in its tanh form (Hendrycks & Gimpel 2016, sec. 2)."""
    return jax.nn.gelu(x, approximate=True)


def swiglu_clamped(gate: Array, up: Array) -> Array:
    """The activation of gpt-oss: SwiGLU with a steeper sigmoid, clipped inputs, and 1 added to `up`."""
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


# Created once: the grouped matmul caches its programs by the identity of the activation.
PLAIN: dict[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}
GATED: dict[str, Callable[[Array, Array], Array]] = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "reglu": lambda gate, up: jax.nn.relu(gate) * up,
    "glu": lambda gate, up: jax.nn.sigmoid(gate) * up,
    "bilinear": lambda gate, up: gate * up,
    "swiglu_clamped": swiglu_clamped,
}
ACTIVATIONS: dict[str, Callable[..., Array]] = PLAIN | GATED


def gates(kind: str) -> int:
    """Return the number of hidden vectors per token: 2 for the gated kinds, else 1."""
    return 2 if kind in GATED else 1


def activate(kind: str, h: Float[Array, "*lead G F"]) -> Float[Array, "*lead F"]:
    """Return the hidden activation: f(h0), or f(h0, h1) for the gated kinds."""
    return ACTIVATIONS[kind](*(h[..., g, :] for g in range(gates(kind))))


class MLP(nnx.Module):
    """An MLP whose gate and up projections are one weight, for one large matmul instead of two."""

    def __init__(
        self,
        key: PRNGKeyArray,
        config: ModelConfig,
        rules: ShardingRules,
        hidden_dim: int | None = None,
        name: str = "mlp",
    ):
        """`hidden_dim` defaults to `config.mlp.hidden_dim`. `name` is the prefix of the weights' names."""
        self.config = config
        D, F, G = config.embed_dim, hidden_dim or config.mlp.hidden_dim, gates(config.mlp.kind)
        up_key, down_key = jax.random.split(key)
        up_std, down_std = weight_std(config, D), weight_std(config, F, residual=True)
        self.up = normal(up_key, (D, G, F), ("embed", "gate", "mlp"), up_std, rules, name=f"{name}.up")
        self.down = normal(down_key, (F, D), ("mlp", "embed"), down_std, rules, name=f"{name}.down")
        biased = config.mlp.bias
        self.up_bias = constant((G, F), ("gate", "mlp"), 0.0, rules, name=f"{name}.up_bias") if biased else None
        self.down_bias = constant((D,), ("embed",), 0.0, rules, name=f"{name}.down_bias") if biased else None

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        h_BTGF = self.up.dot(x_BTD, ("batch", "sequence"))
        if self.up_bias is not None:
            h_BTGF = h_BTGF + self.up_bias.gathered(x_BTD.dtype)
        h_BTF = activate(self.config.mlp.kind, checkpoint_name(h_BTGF, "mlp_hidden"))
        out_BTD = self.down.dot(h_BTF, ("batch", "sequence"))
        if self.down_bias is not None:
            out_BTD = out_BTD + self.down_bias.gathered(x_BTD.dtype)
        return checkpoint_name(out_BTD, "mlp_out")
