"""Upcycling: a mixture of experts that starts as a trained dense network (Komatsuzaki et al. 2022).

Every expert starts as a copy of its layer's MLP, the router is drawn anew, everything else is taken over. A token's
chosen experts are then equal, and where their weights sum to one the layer computes what the MLP did: whatever the
router chooses, the logits are the dense network's. (For the same reason the loss gives routers of whole copies no
gradient at the first step, only the balance does: the copies part by the tokens that they are given.)

Fine-grained experts (He et al. 2024, "Upcycling large language models into mixture of experts", virtual groups): of
width F / m an expert holds one of m shards of the MLP's hidden columns, since y = sum over shards of act(x up_s)
down_s. Experts g m .. g m + m - 1 are the shards of one copy and share a router column, so that a token's top_k = k m
choices are k whole copies, their equal logits side by side in the order in which top-k breaks ties. A shard's weight is
the m-th part of its copy's, so `down` is multiplied by m (and divided by `scale`, which all the weights carry). Biases
of the hidden columns are cut with them; each shard has the whole bias of the output (over `scale`), m of an m-th. The
router's bias starts at zero.

Shapes: R layers of a stack, D width, G 2 if gated else 1, F hidden width of the MLP, E experts, M shards, f hidden
width of an expert.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from model.config import ModelConfig
from model.layers import Block
from model.moe import MoE
from model.moe_config import ALWAYS_ONE, WEIGHTED
from model.transformer import Transformer, unstack
from model.weights import Tree, Weight, map_named_weights, named_weights, repeats
from sharding.rules import ShardingRules, no_mesh

# Routers whose weights for a token sum to `scale`, in training too; those that read `weights` only with some of its
# forms.
WHOLE = ("top_k", "noisy_top_k", "sinkhorn", "hash", "random", "dense")
# Of those, the ones that take experts of equal logits together.
TOGETHER = ("top_k", "sinkhorn", "dense")
# What may differ between the two networks: it changes how the function is trained or computed, not the function.
FREE = ("moe", "init", "dropout", "dtype", "remat", "remat_names", "scan_unroll")


def upcycle(dense: Transformer, config: ModelConfig, key: PRNGKeyArray, rules: ShardingRules) -> Transformer:
    """The network of `config` (with experts) that computes what `dense` (without) does, to rounding. `key` draws its
    routers.

    Under a mesh the weights are laid out as `rules` says. Meant to be jitted: what is drawn only to be replaced is then
    not computed. Raises ValueError that names field, value and fix where the logits could not be those of `dense`.
    """
    shards = check(dense.config, config)
    fresh = Transformer(key, config, rules)
    layers = [unit[0] for unit in unstack(dense).stacks]  # each with a leading axis of 1
    first = 0
    for unit in fresh.stacks:
        count = repeats(unit) * len(unit)
        for i, block in enumerate(unit):
            unit[i] = _block(block, layers[first + i : first + count : len(unit)], shards)
        first += count
    taken = _weights(dense)
    return _replace(fresh, {name: taken[name] for name in _weights(fresh) if not name.startswith("stacks")})


def check(dense: ModelConfig, config: ModelConfig) -> int:
    """Into how many experts the MLP is cut (1: each is all of it). Raises ValueError that names field, value and fix
    where a network of `config` cannot start as one of `dense`."""
    moe = config.moe
    if dense.moe is not None:
        raise ValueError("model.moe: the network to upcycle has experts already; give one whose model.moe is none")
    if moe is None:
        raise ValueError("model.moe = none: say which experts the network is to have, like model.moe.num_experts=8")
    for field in fields(ModelConfig):
        old, new = getattr(dense, field.name), getattr(config, field.name)
        if field.name == "attention":
            new = replace(new, implementation=old.implementation, context=old.context)
        if field.name not in FREE and old != new:
            raise ValueError(
                f"model.{field.name} = {new}: the dense network has {old}; upcycling changes model.moe alone"
            )
    if moe.shared_experts:
        raise ValueError(
            f"model.moe.shared_experts = {moe.shared_experts}: what they add, the dense network does not have; set it "
            f"to 0"
        )
    if moe.capacity_factor is not None:
        raise ValueError(
            f"model.moe.capacity_factor = {moe.capacity_factor}: a token that finds no place loses its MLP; set it to "
            "none (and model.moe.dispatch to auto)"
        )
    if moe.router not in WHOLE:
        raise ValueError(
            f"model.moe.router = {moe.router!r}: the weights of a token's experts do not always sum to one, so that "
            f"the logits would change; use one of {', '.join(WHOLE)}"
        )
    if moe.router in WEIGHTED and moe.weights not in ALWAYS_ONE:
        more = " and model.moe.top_k = 2 or more" if moe.top_k == 1 else ""
        raise ValueError(
            f"model.moe.weights = {moe.weights!r}: the weights of a token's experts do not sum to one, so that the "
            f"logits would change; use one of {', '.join(ALWAYS_ONE)}{more}"
        )
    return _check_shards(config)


def _check_shards(config: ModelConfig) -> int:
    moe, hidden = config.moe, config.mlp.hidden_dim
    assert moe is not None
    if hidden % moe.hidden_dim:
        divisors = [str(hidden // m) for m in range(1, 17) if hidden % m == 0]
        raise ValueError(
            f"model.moe.hidden_dim = {moe.hidden_dim}: does not divide model.mlp.hidden_dim = {hidden}, which the "
            f"experts are cut from; set it to {', '.join(divisors)}"
        )
    shards = hidden // moe.hidden_dim
    if shards == 1:
        return 1
    if moe.router not in TOGETHER:
        raise ValueError(
            f"model.moe.router = {moe.router!r}: does not choose the {shards} shards of an MLP together "
            f"(model.moe.hidden_dim = {moe.hidden_dim} of {hidden}); use one of {', '.join(TOGETHER)}, or experts of "
            f"width {hidden}"
        )
    chosen = {"model.moe.num_experts": moe.num_experts} | (
        {} if moe.router == "dense" else {"model.moe.top_k": moe.top_k}
    )
    for name, count in chosen.items():
        if count % shards:
            raise ValueError(
                f"{name} = {count}: experts of width {moe.hidden_dim} are {shards} to an MLP of width {hidden}, and "
                f"come by whole MLPs; set it to a multiple of {shards}, like {-(-count // shards) * shards}"
            )
    groups = moe.groups[0]
    if groups > 1 and moe.num_experts // groups % shards:
        raise ValueError(
            f"model.moe.groups = {moe.groups}: groups of {moe.num_experts // groups} experts would cut the {shards} "
            f"shards of an MLP apart; use groups of a multiple of {shards} experts, or (1, 1)"
        )
    return shards


def _block(fresh: Block, layers: list[Block], shards: int) -> Block:
    """The block `fresh` [R, ...] with the weights of R dense layers [1, ...]."""
    dense = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
    taken = _weights(dense)
    if not isinstance(fresh.mlp, MoE):
        return _replace(fresh, taken)
    moe = fresh.mlp.config.moe
    assert moe is not None
    shared = {name: weight for name, weight in taken.items() if not name.startswith("mlp.")}
    mlp = _weights(dense.mlp)
    rules = dense.mlp.up.rules
    up_RDGF = _gathered(mlp["up"], rules, "embed", None, None)
    down_RFD = _gathered(mlp["down"], rules, None, "embed")
    (R, D, G, _), E, f = up_RDGF.shape, moe.num_experts, moe.hidden_dim
    up_RMDGf = jnp.moveaxis(up_RDGF.reshape(R, D, G, shards, f), 3, 1)
    down_RMfD = down_RFD.reshape(R, shards, f, D) * (shards / moe.scale)
    copies = E // shards
    cut = {"mlp.up": up_RMDGf, "mlp.down": down_RMfD}
    if "up_bias" in mlp:
        up_bias_RGF, down_bias_RD = _gathered(mlp["up_bias"], rules, None, None), mlp["down_bias"]
        cut["mlp.up_bias"] = jnp.moveaxis(up_bias_RGF.reshape(R, G, shards, f), 2, 1)
        cut["mlp.down_bias"] = jnp.stack([down_bias_RD / moe.scale] * shards, axis=1)
    experts = {name: jnp.concatenate([weight] * copies, axis=1) for name, weight in cut.items()}
    if fresh.mlp.router is not None:  # hash and random have none
        experts["mlp.router"] = jnp.repeat(fresh.mlp.router.value[..., :copies], shards, axis=-1)
    return _replace(fresh, shared | experts)


def _gathered(weight: Float[Array, "R ..."], rules: ShardingRules, *axes: str | None) -> Array:
    """The weight with its hidden columns on every device, so that they can be cut anew."""
    return weight if no_mesh() else jax.sharding.reshard(weight, rules.spec("weights", (None, *axes)))


def _weights(module: Any) -> dict[str, Array]:
    """Return the stored value of every weight by its dotted path."""
    return {path: weight.value for path, weight in named_weights(module)}


def _replace(module: Tree, values: dict[str, Array]) -> Tree:
    """Return `module` with the values that are named, all others as they are; each in the layout that it has there."""
    own = _weights(module)
    new = own | values
    assert new.keys() == own.keys() and all(new[n].shape == own[n].shape for n in own), "the networks do not fit"

    def replaced(path: str, weight: Weight) -> Weight:
        value = new[path] if no_mesh() else jax.sharding.reshard(new[path], jax.typeof(weight.value).sharding)
        return replace(weight, value=value)

    return map_named_weights(replaced, module)
