"""Runs the experts on the choices of a router, over the mesh.

Shapes: B batch, T time, D width, E experts, C choices of a token, G 2 if gated else 1, F hidden width.
"""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from model.config import ModelConfig
from model.experts import expert_mlp
from sharding.manual import vary, varying_axes
from sharding.rules import ShardingRules, no_mesh, reshard


def run_experts(
    x_BTD: Float[Array, "B T D"],
    indices_BTC: Int[Array, "B T C"],
    weights_BTC: Float[Array, "B T C"],
    place_BTC: Int[Array, "B T C"] | None,
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    config: ModelConfig,
    rules: ShardingRules,
) -> Float[Array, "B T D"]:
    """sum over choices c of weights[b, t, c] * MLP of expert indices[b, t, c] at x[b, t]; index E adds nothing.

    `place_BTC`: where the choice stands in its expert's buffer, of config.moe.capacity(T) places; None without a capacity.
    Gradients flow to x, weights, up and down.
    """
    return _dispatch(x_BTD, indices_BTC, weights_BTC, up_EDGF, down_EFD, config.mlp.kind, rules)


def _dispatch(x_BTD, indices_BTC, weights_BTC, up, down, kind: str, rules: ShardingRules) -> Array:
    """Runs the experts where they are: tokens are gathered over the devices that share a batch slice's experts, each
    device computes the pairs of its own experts (and its own columns of them), and the sums return to the tokens' owners.
    """
    D, C = x_BTD.shape[-1], indices_BTC.shape[-1]
    if no_mesh():
        x_ND, indices_NC, weights_NC = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, indices_BTC, weights_BTC))
        return expert_mlp(x_ND, indices_NC, weights_NC, up, down, kind).reshape(x_BTD.shape)

    activations = rules.activations
    expert_axes, mlp_axes = activations.expert, activations.mlp
    gathered = tuple(a for a in expert_axes if a in activations.batch)  # experts spread over devices with other tokens

    def local(x, indices, weights, up, down):
        first = jax.lax.axis_index(expert_axes) * up.shape[0] if expert_axes else 0
        if gathered:
            x, indices, weights = (jax.lax.all_gather(y, gathered, axis=0, tiled=True) for y in (x, indices, weights))
        # Weights are used by tokens that differ between devices: said here, so that their gradients are summed over them.
        axes = varying_axes(x) | varying_axes(up)
        x, indices, weights, up, down = (vary(y, axes) for y in (x, indices, weights, up, down))
        y = expert_mlp(x.reshape(-1, D), indices.reshape(-1, C) - first, weights.reshape(-1, C), up, down, kind)
        y = y.reshape(x.shape)
        if gathered:
            y = jax.lax.psum_scatter(y, gathered, scatter_dimension=0, tiled=True)
        rest = mlp_axes + tuple(a for a in expert_axes if a not in gathered)
        return jax.lax.psum(y, rest) if rest else y

    token_spec = rules.spec("activations", ("batch", "sequence", None))
    return jax.shard_map(
        local,
        in_specs=(
            token_spec,
            token_spec,
            token_spec,
            rules.spec("activations", ("expert", None, None, "mlp")),
            rules.spec("activations", ("expert", "mlp", None)),
        ),
        out_specs=token_spec,
    )(reshard(x_BTD, rules, "batch", "sequence", None), indices_BTC, weights_BTC, up, down)
