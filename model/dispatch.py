"""Runs the experts on the choices of a router, over the mesh.

Shapes: B batch, T time, D width, E experts, C choices of a token, G 2 if gated else 1, F hidden width, N tokens of a
device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.buffers import buffered_experts
from model.config import ModelConfig
from model.exchange import exchanged_experts
from model.experts import Biases, expert_mlp
from model.weights import Weight
from sharding.manual import all_gather, sum_scatter
from sharding.rules import ShardingRules, no_mesh, reshard

# Logical axes of the experts' weights.
UP, DOWN = ("expert", "embed", "gate", "mlp"), ("expert", "mlp", "embed")
UP_BIAS, DOWN_BIAS = ("expert", "gate", "mlp"), ("expert", "embed")


class ExpertWeights(NamedTuple):
    """The weights of a layer's experts as they are stored."""

    up: Weight  # [E, D, G, F]
    down: Weight  # [E, F, D]
    up_bias: Weight | None = None  # [E, G, F]
    down_bias: Weight | None = None  # [E, D]

    def arrays(self, of: Callable[[Weight], Array]) -> tuple[Array, Array, Biases | None]:
        """Return `of` each weight: (up, down, biases)."""
        up, down = of(self.up), of(self.down)
        if self.up_bias is None or self.down_bias is None:
            return up, down, None
        return up, down, Biases(of(self.up_bias), of(self.down_bias))


def run_experts(
    x_BTD: Float[Array, "B T D"],
    indices_BTC: Int[Array, "B T C"],
    weights_BTC: Float[Array, "B T C"],
    position_BTC: Int[Array, "B T C"] | None,
    experts: ExpertWeights,
    config: ModelConfig,
    rules: ShardingRules,
) -> Float[Array, "B T D"]:
    """Return the sum over choices c of weights[b, t, c] * MLP of expert indices[b, t, c] at x[b, t]; index E adds
    nothing.

    `position_BTC`: where the choice stands in its expert's buffer of config.moe.capacity(T) rows; None without a
    capacity. Gradients flow to x, weights and experts. On a mesh experts lie over the axes of
    `rules.activations.expert`. Where those also divide the tokens, either the pairs travel (`config.moe.exchange` a
    number: model/exchange.py) or all tokens are gathered on each device of the group (None). Tokens are gathered too
    where only some of those axes divide them; where none does, each device has the group's tokens already, and its
    experts' part of the results is summed.
    """
    moe, dtype = config.moe, x_BTD.dtype
    assert moe is not None
    # Expert choice fills every row, and gives a token a choice of each expert: sorted, most pairs would go nowhere.
    how = "gather" if moe.dispatch == "auto" and moe.router == "expert_choice" else moe.dispatch
    if how in ("gather", "einsum"):
        if position_BTC is None:
            raise ValueError(
                f"model.moe.dispatch = {how!r}: its buffers need a size; set model.moe.capacity_factor, or use 'sort'"
            )
        up, down, biases = experts.arrays(lambda weight: weight.gathered(dtype))
        return buffered_experts(
            x_BTD, indices_BTC, weights_BTC, position_BTC, moe.capacity(x_BTD.shape[1]), up, down,
            config.mlp.kind, rules, how, biases,
        )  # fmt: skip
    chosen = None if moe.implementation == "auto" else moe.implementation
    run = partial(_run, kind=config.mlp.kind, implementation="dense" if how == "dense" else chosen)
    if no_mesh():
        x_ND, indices_NC, weights_NC = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, indices_BTC, weights_BTC))
        up, down, biases = experts.arrays(lambda weight: weight.local(dtype))
        return run(x_ND, indices_NC, weights_NC, up, down, *(biases or ())).reshape(x_BTD.shape)
    token_spec = rules.spec("activations", ("batch", "sequence", None))
    entering = [None if weight is None else weight.entering(dtype) for weight in experts]
    weights, specs = (ExpertWeights(*(None if e is None else e[i] for e in entering)) for i in range(2))  # type: ignore[arg-type]
    # Unchecked: kernels' results do not carry the types of varying axes. The gradients of weights are then summed over
    # every axis that their specs do not name, as they have to be.
    return jax.shard_map(
        partial(_on_a_device, run=run, rules=rules, factor=moe.exchange),
        in_specs=(token_spec, token_spec, token_spec, specs),
        out_specs=token_spec,
        check_vma=False,
    )(reshard(x_BTD, rules, "batch", "sequence", None), indices_BTC, weights_BTC, weights)


def _run(x_ND, indices_NC, weights_NC, up, down, *biases: Array, kind: str, implementation: str | None) -> Array:
    return expert_mlp(x_ND, indices_NC, weights_NC, up, down, kind, implementation, Biases(*biases) if biases else None)


def _on_a_device(
    x_BTD, indices_BTC, weights_BTC, experts: ExpertWeights, *, run, rules: ShardingRules, factor: float | None
) -> Array:
    """Return what the device's tokens get from their experts. Each device computes with some experts, and some columns
    of them; it holds slices of those and gathers them here, so that their gradients are reduced and scattered in one.
    """
    up, down, biases = experts.arrays(lambda weight: weight.local(x_BTD.dtype))
    activations = rules.activations
    if biases and (columns := tuple(a for a in activations.mlp if jax.lax.axis_size(a) > 1)):
        # Devices with other columns of the same experts: their results are summed, and the bias must be added once.
        biases = biases._replace(down_ED=jnp.where(jax.lax.axis_index(columns) == 0, biases.down_ED, 0))
    expert_axes, token_axes = activations.expert, activations.batch + activations.sequence
    x, indices, weights = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, indices_BTC, weights_BTC))
    divides_tokens = tuple(a for a in expert_axes if a in token_axes)  # experts lie over devices with other tokens
    shares_tokens = tuple(a for a in expert_axes if a not in token_axes)
    peers = jax.lax.axis_size(expert_axes) if expert_axes else 1
    if peers > 1 and factor is not None and not shares_tokens:
        y = exchanged_experts(
            x, indices, weights, up, down, partial(_rows, run), *(biases or ()),
            axes=expert_axes, agree=token_axes, factor=factor,
        )  # fmt: skip
    else:
        first = jax.lax.axis_index(expert_axes) * up.shape[0] if expert_axes else 0
        if divides_tokens:
            gather = partial(all_gather, axes=divides_tokens, dimension=0)
            x, indices, weights = gather(x), gather(indices), gather(weights)
        y = run(x, indices - first, weights, up, down, *(biases or ()))
        if divides_tokens:
            y = sum_scatter(y, divides_tokens, 0)
    rest = tuple(a for a in activations.mlp + shares_tokens if jax.lax.axis_size(a) > 1)
    # Columns of experts, and experts, summed at the end: a row for each token, fewer than the pairs.
    return (_total(y, rest) if rest else y).reshape(x_BTD.shape)


def _rows(run, x_RD: Array, expert_R: Array, *weights: Array) -> Array:
    return run(x_RD, expert_R[:, None], jnp.ones((x_RD.shape[0], 1), jnp.float32), *weights)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _total(y: Array, axes: tuple[str, ...]) -> Array:
    """`jax.lax.psum` whose gradient needs no communication: shard_map, unchecked, divides that of a result by the
    devices that hold copies of it, for a psum to put together again. Each has it all."""
    return jax.lax.psum(y, axes)


def _total_forward(y, axes):
    return _total(y, axes), None


def _total_backward(axes, _, dy):
    return (dy * jax.lax.axis_size(axes),)


_total.defvjp(_total_forward, _total_backward)
