"""Run the experts on a router's choices, on one device or over a mesh.

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
    """The stored weights of a layer's experts."""

    up: Weight  # [E, D, G, F]
    down: Weight  # [E, F, D]
    up_bias: Weight | None = None  # [E, G, F]
    down_bias: Weight | None = None  # [E, D]

    def arrays(self, of: Callable[[Weight], Array]) -> tuple[Array, Array, Biases | None]:
        """Apply `of` to each weight and return (up, down, biases)."""
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

    `position_BTC`: row of each choice in its expert's buffer of config.moe.capacity(T) rows; None without a capacity.
    Gradients flow to x, weights and experts. Raises ValueError if config.moe.dispatch needs a capacity and there is
    none.

    On a mesh, experts are sharded over the axes of `rules.activations.expert`. If all of these axes also divide the
    tokens, either the pairs (token, choice) are sent to their experts (`config.moe.all_to_all_buffer_factor` is a
    number; model/exchange.py) or each device of the group gathers all tokens (None). If only some of them divide the
    tokens, the tokens are gathered along those. If none does, each device already has the group's tokens. Without the
    all-to-all, the partial results of the devices are summed.
    """
    moe, dtype = config.moe, x_BTD.dtype
    assert moe is not None
    # Expert choice fills every buffer row and lists E choices per token. Sorting would handle mostly empty pairs.
    how = "gather" if moe.dispatch == "auto" and moe.router == "expert_choice" else moe.dispatch
    if how in ("gather", "einsum"):
        if position_BTC is None:
            raise ValueError(
                f"model.moe.dispatch = {how!r}: needs a buffer size. Set model.moe.capacity_factor, or use 'sort'"
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
    # check_vma=False: the results of kernels do not carry the types of varying axes. shard_map then sums the gradients
    # of weights over every axis that their specs do not name, as required.
    return jax.shard_map(
        partial(_on_a_device, run=run, rules=rules, factor=moe.all_to_all_buffer_factor),
        in_specs=(token_spec, token_spec, token_spec, specs),
        out_specs=token_spec,
        check_vma=False,
    )(reshard(x_BTD, rules, "batch", "sequence", None), indices_BTC, weights_BTC, weights)


def _run(x_ND, indices_NC, weights_NC, up, down, *biases: Array, kind: str, implementation: str | None) -> Array:
    return expert_mlp(x_ND, indices_NC, weights_NC, up, down, kind, implementation, Biases(*biases) if biases else None)


def _on_a_device(
    x_BTD, indices_BTC, weights_BTC, experts: ExpertWeights, *, run, rules: ShardingRules, factor: float | None
) -> Array:
    """Return the experts' outputs for this device's tokens.

    Each device computes with some experts, and with some of their columns. It stores slices of these and gathers them
    here, so that one collective reduces and scatters their gradients.
    """
    up, down, biases = experts.arrays(lambda weight: weight.local(x_BTD.dtype))
    activations = rules.activations
    if biases and (columns := tuple(a for a in activations.mlp if jax.lax.axis_size(a) > 1)):
        # The results of devices with other columns of the same experts are summed, so only one of them adds the bias.
        biases = biases._replace(down_ED=jnp.where(jax.lax.axis_index(columns) == 0, biases.down_ED, 0))
    expert_axes, token_axes = activations.expert, activations.batch + activations.sequence
    x, indices, weights = (y.reshape(-1, y.shape[-1]) for y in (x_BTD, indices_BTC, weights_BTC))
    divides_tokens = tuple(a for a in expert_axes if a in token_axes)  # devices along these have different tokens
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
    # Sum over columns and over experts last: there is one row per token, and there are more pairs than tokens.
    return (_total(y, rest) if rest else y).reshape(x_BTD.shape)


def _rows(run, x_RD: Array, expert_R: Array, *weights: Array) -> Array:
    return run(x_RD, expert_R[:, None], jnp.ones((x_RD.shape[0], 1), jnp.float32), *weights)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _total(y: Array, axes: tuple[str, ...]) -> Array:
    """Return `jax.lax.psum(y, axes)`, with a gradient that needs no communication.

    With check_vma=False, shard_map divides the gradient of a replicated result by the number of copies and expects a
    psum to restore it. Every device has the whole gradient, so multiplying is enough.
    """
    return jax.lax.psum(y, axes)


def _total_forward(y, axes):
    return _total(y, axes), None


def _total_backward(axes, _, dy):
    return (dy * jax.lax.axis_size(axes),)


_total.defvjp(_total_forward, _total_backward)
