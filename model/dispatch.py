"""Runs the experts on the choices of a router, over the mesh.

Shapes: B batch, T time, D width, E experts, C choices of a token, G 2 if gated else 1, F hidden width, N tokens of a
device.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.buffers import buffered_experts
from model.config import ModelConfig
from model.exchange import exchanged_experts
from model.experts import Biases, expert_mlp
from sharding.manual import gather_weight
from sharding.rules import ShardingRules, no_mesh, reshard

UP, DOWN = ("expert", "embed", None, "mlp"), ("expert", "mlp", "embed")  # logical axes of the experts' weights
UP_BIAS, DOWN_BIAS = ("expert", None, "mlp"), ("expert", "embed")


def run_experts(
    x_BTD: Float[Array, "B T D"],
    indices_BTC: Int[Array, "B T C"],
    weights_BTC: Float[Array, "B T C"],
    place_BTC: Int[Array, "B T C"] | None,
    up_EDGF: Float[Array, "E D G F"],
    down_EFD: Float[Array, "E F D"],
    config: ModelConfig,
    rules: ShardingRules,
    biases: Biases | None = None,
) -> Float[Array, "B T D"]:
    """sum over choices c of weights[b, t, c] * MLP of expert indices[b, t, c] at x[b, t]; index E adds nothing.

    `up_EDGF`, `down_EFD`, `biases`: in the dtype of computation, laid out as stored: each device gathers its part.
    `place_BTC`: where the choice stands in its expert's buffer, of config.moe.capacity(T) places; None without a
    capacity. Gradients flow to x, weights, up, down and biases. On a mesh experts lie over the axes of
    `rules.activations.expert`. Where those also divide the tokens, either the pairs travel (`config.moe.exchange` a
    number: model/exchange.py) or all tokens are gathered on each device of the group (None). Tokens are gathered too
    where only some of those axes divide them; where none does, each device has the group's tokens already, and its
    experts' part of the results is summed.
    """
    moe = config.moe
    assert moe is not None
    # Expert choice fills every place, and gives a token a choice of each expert: sorted, most pairs would go nowhere.
    how = "gather" if moe.dispatch == "auto" and moe.router == "expert_choice" else moe.dispatch
    if how in ("gather", "einsum"):
        if place_BTC is None:
            raise ValueError(
                f"model.moe.dispatch = {how!r}: its buffers need places; set model.moe.capacity_factor, or use 'sort'"
            )
        up_EDGF, down_EFD = reshard(up_EDGF, rules, *UP), reshard(down_EFD, rules, *DOWN)
        if biases is not None:
            biases = Biases(reshard(biases.up_EGF, rules, *UP_BIAS), reshard(biases.down_ED, rules, *DOWN_BIAS))
        return buffered_experts(
            x_BTD, indices_BTC, weights_BTC, place_BTC, moe.capacity(x_BTD.shape[1]), up_EDGF, down_EFD,
            config.mlp.kind, rules, how, biases,
        )  # fmt: skip
    run = partial(_run, kind=config.mlp.kind, implementation="dense" if how == "dense" else None)
    weights = (up_EDGF, down_EFD, *(biases or ()))
    if no_mesh():
        x_ND, indices_NC, weights_NC = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, indices_BTC, weights_BTC))
        return run(x_ND, indices_NC, weights_NC, *weights).reshape(x_BTD.shape)
    token_spec = rules.spec("activations", ("batch", "sequence", None))
    stored = [rules.gathered(axes) for axes in (UP, DOWN, UP_BIAS, DOWN_BIAS)[: len(weights)]]
    weights = tuple(jax.sharding.reshard(w, spec) for w, (spec, _) in zip(weights, stored, strict=True))
    # Unchecked: kernels' results do not carry the types of varying axes. The gradients of weights are then summed over
    # every axis that their specs do not name, as they have to be.
    return jax.shard_map(
        partial(_on_a_device, run=run, rules=rules, factor=moe.exchange, spread=[axes for _, axes in stored]),
        in_specs=(token_spec, token_spec, token_spec, *(spec for spec, _ in stored)),
        out_specs=token_spec,
        check_vma=False,
    )(reshard(x_BTD, rules, "batch", "sequence", None), indices_BTC, weights_BTC, *weights)


def _run(x_ND, indices_NC, weights_NC, up, down, *biases: Array, kind: str, implementation: str | None) -> Array:
    return expert_mlp(x_ND, indices_NC, weights_NC, up, down, kind, implementation, Biases(*biases) if biases else None)


def _on_a_device(
    x_BTD, indices_BTC, weights_BTC, *stored, run, rules: ShardingRules, factor: float | None, spread
) -> Array:
    """The device's tokens through their experts. Each device computes with some experts, and some columns of them; it
    holds
    slices of those, `spread` as it says, and gathers them here, so that their gradients are reduced and scattered in
    one."""
    up, down, *biases = (gather_weight(w, axes) for w, axes in zip(stored, spread, strict=True))
    activations = rules.activations
    if biases and (columns := tuple(a for a in activations.mlp if jax.lax.axis_size(a) > 1)):
        # Devices with other columns of the same experts: what these give is summed, the bias is to be in the sum once.
        biases[1] = jnp.where(jax.lax.axis_index(columns) == 0, biases[1], 0)
    expert_axes, token_axes = activations.expert, activations.batch + activations.sequence
    x, indices, weights = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, indices_BTC, weights_BTC))
    apart = tuple(a for a in expert_axes if a in token_axes)  # experts lie over devices with other tokens
    whole = tuple(a for a in expert_axes if a not in token_axes)
    peers = jax.lax.axis_size(expert_axes) if expert_axes else 1
    if peers > 1 and factor is not None and not whole:
        y = exchanged_experts(
            x,
            indices,
            weights,
            up,
            down,
            partial(_rows, run),
            *biases,
            axes=expert_axes,
            agree=token_axes,
            factor=factor,
        )
    else:
        first = jax.lax.axis_index(expert_axes) * up.shape[0] if expert_axes else 0
        if apart:
            x, indices, weights = (jax.lax.all_gather(y, apart, axis=0, tiled=True) for y in (x, indices, weights))
        y = run(x, indices - first, weights, up, down, *biases)
        if apart:
            y = jax.lax.psum_scatter(y, apart, scatter_dimension=0, tiled=True)
    rest = tuple(a for a in activations.mlp + whole if jax.lax.axis_size(a) > 1)
    # Columns of experts, and experts, summed at the end: a row for each token, fewer than the pairs.
    return (_total(y, rest) if rest else y).reshape(x_BTD.shape)


def _rows(run, x_RD: Array, expert_R: Array, *weights: Array) -> Array:
    return run(x_RD, expert_R[:, None], jnp.ones((x_RD.shape[0], 1), jnp.float32), *weights)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _total(y: Array, axes: tuple[str, ...]) -> Array:
    """`jax.lax.psum` whose gradient needs no communication: shard_map, unchecked, divides that of a result by the
    devices
    that hold copies of it, for a psum to put together again. Each has it all."""
    return jax.lax.psum(y, axes)


def _total_forward(y, axes):
    return _total(y, axes), None


def _total_backward(axes, _, dy):
    return (dy * jax.lax.axis_size(axes),)


_total.defvjp(_total_forward, _total_backward)
