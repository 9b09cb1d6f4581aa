"""Upcycling: initialize a mixture of experts from a trained dense network (Komatsuzaki et al. 2022).

Every expert starts as a copy of its layer's MLP, the router is initialized at random, and all other weights are copied.
A token's experts are then equal. If their weights sum to one, the layer computes the same as the MLP, and the logits
equal those of the dense network for any choice of experts. (For the same reason, the loss gives the router of full
copies no gradient at the first step; only the balance loss does. The copies diverge because they receive different
tokens.)

Fine-grained experts (He et al. 2024, "Upcycling large language models into mixture of experts", virtual groups): an
expert of width F / m holds one of m shards of the MLP's hidden columns, since y = sum over shards of act(x up_s)
down_s. Experts g m .. g m + m - 1 are the shards of one copy and share a router column. Their logits are equal and
adjacent, and top-k breaks ties by index, so a token's top_k = k m choices are k complete copies. A shard gets 1 / m of
the weight of its copy, so `down` is multiplied by m (and divided by `scale`, a factor of all weights). Biases of hidden
columns are split with the columns. Each shard has the full output bias (divided by `scale`): m of them at 1 / m of the
weight. The router's bias starts at zero.

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

# Routers whose weights for a token sum to `scale`, also in training; for those that read `weights`, only with some of
# its values.
WHOLE = ("top_k", "noisy_top_k", "sinkhorn", "hash", "random", "dense")
# Routers in WHOLE that choose experts of equal logits together.
TOGETHER = ("top_k", "sinkhorn", "dense")
# Fields that may differ between the two networks: they affect training or execution, but not the function.
FREE = ("moe", "init", "dropout", "dtype", "remat", "remat_names", "scan_unroll")


def upcycle(dense: Transformer, config: ModelConfig, key: PRNGKeyArray, rules: ShardingRules) -> Transformer:
    """Return a network of `config` (with experts) that computes the same as `dense` (without), up to rounding. `key`
    draws its routers.

    On a mesh, the weights are sharded by `rules`. Call it inside jit, which skips the initial values that are replaced.
    Raises ValueError with the field, its value and a fix if the logits could not equal those of `dense`.
    """
    shards = check(dense.config, config)
    fresh = Transformer(key, config, rules)
    layers = [pattern[0] for pattern in unstack(dense).stacks]  # every weight has a leading axis of 1
    first = 0
    for pattern in fresh.stacks:
        count = repeats(pattern) * len(pattern)
        for i, block in enumerate(pattern):
            pattern[i] = _block(block, layers[first + i : first + count : len(pattern)], shards)
        first += count
    copied = _weights(dense)
    return _replace(fresh, {name: copied[name] for name in _weights(fresh) if not name.startswith("stacks")})


def check(dense: ModelConfig, config: ModelConfig) -> int:
    """Return the number of experts that one MLP is split into (1: each expert is a full copy). Raises ValueError with
    the field, its value and a fix if a network of `config` cannot start from one of `dense`."""
    moe = config.moe
    if dense.moe is not None:
        raise ValueError("model.moe: the network to upcycle has experts already. Use one with model.moe = none")
    if moe is None:
        raise ValueError("model.moe = none: upcycling needs a config with experts. Try model.moe.num_experts=8")
    for field in fields(ModelConfig):
        old, new = getattr(dense, field.name), getattr(config, field.name)
        if field.name == "attention":
            new = replace(new, implementation=old.implementation, context_parallel=old.context_parallel)
        if field.name not in FREE and old != new:
            raise ValueError(
                f"model.{field.name} = {new}: the dense network has {old}. Use that; upcycling changes model.moe alone"
            )
    if moe.shared_experts:
        raise ValueError(
            f"model.moe.shared_experts = {moe.shared_experts}: would add an output that the dense network lacks. Set "
            "it to 0"
        )
    if moe.capacity_factor is not None:
        raise ValueError(
            f"model.moe.capacity_factor = {moe.capacity_factor}: a dropped token would lose its MLP. Set it to none "
            "(and model.moe.dispatch to auto)"
        )
    if moe.router not in WHOLE:
        raise ValueError(
            f"model.moe.router = {moe.router!r}: the weights of a token's experts do not always sum to one, so the "
            f"logits would change. Use one of {', '.join(WHOLE)}"
        )
    if moe.router in WEIGHTED and moe.weights not in ALWAYS_ONE:
        more = " and model.moe.top_k = 2 or more" if moe.top_k == 1 else ""
        raise ValueError(
            f"model.moe.weights = {moe.weights!r}: the weights of a token's experts do not sum to one, so the "
            f"logits would change. Use one of {', '.join(ALWAYS_ONE)}{more}"
        )
    return _check_shards(config)


def _check_shards(config: ModelConfig) -> int:
    moe, hidden = config.moe, config.mlp.hidden_dim
    assert moe is not None
    if hidden % moe.hidden_dim:
        divisors = [str(hidden // m) for m in range(1, 17) if hidden % m == 0]
        raise ValueError(
            f"model.moe.hidden_dim = {moe.hidden_dim}: does not divide model.mlp.hidden_dim = {hidden}, which is "
            f"split into experts. Use one of {', '.join(divisors)}"
        )
    shards = hidden // moe.hidden_dim
    if shards == 1:
        return 1
    if moe.router not in TOGETHER:
        raise ValueError(
            f"model.moe.router = {moe.router!r}: does not choose the {shards} shards of an MLP together "
            f"(model.moe.hidden_dim = {moe.hidden_dim} of {hidden}). Use one of {', '.join(TOGETHER)}, or experts of "
            f"width {hidden}"
        )
    chosen = {"model.moe.num_experts": moe.num_experts} | (
        {} if moe.router == "dense" else {"model.moe.top_k": moe.top_k}
    )
    for name, count in chosen.items():
        if count % shards:
            raise ValueError(
                f"{name} = {count}: {shards} experts of width {moe.hidden_dim} make up one MLP of width {hidden}. Use "
                f"a multiple of {shards}, like {-(-count // shards) * shards}"
            )
    groups = moe.groups[0]
    if groups > 1 and moe.num_experts // groups % shards:
        raise ValueError(
            f"model.moe.groups = {moe.groups}: groups of {moe.num_experts // groups} experts would separate the "
            f"{shards} shards of an MLP. Use groups of a multiple of {shards} experts, or (1, 1)"
        )
    return shards


def _block(fresh: Block, layers: list[Block], shards: int) -> Block:
    """Return the block `fresh` [R, ...] with the weights of R dense layers [1, ...]."""
    dense = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
    copied = _weights(dense)
    if not isinstance(fresh.mlp, MoE):
        return _replace(fresh, copied)
    moe = fresh.mlp.config.moe
    assert moe is not None
    shared = {name: weight for name, weight in copied.items() if not name.startswith("mlp.")}
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
    """Return the weight with its hidden columns gathered on every device, so that they can be split differently."""
    return weight if no_mesh() else jax.sharding.reshard(weight, rules.spec("weights", (None, *axes)))


def _weights(module: Any) -> dict[str, Array]:
    """Return the stored value of every weight by its dotted path."""
    return {path: weight.value for path, weight in named_weights(module)}


def _replace(module: Tree, values: dict[str, Array]) -> Tree:
    """Return `module` with the named values replaced. Every value keeps the sharding that it has in `module`."""
    own = _weights(module)
    new = own | values
    assert new.keys() == own.keys() and all(new[n].shape == own[n].shape for n in own), (
        "the networks have different weights"
    )

    def replaced(path: str, weight: Weight) -> Weight:
        value = new[path] if no_mesh() else jax.sharding.reshard(new[path], jax.typeof(weight.value).sharding)
        return replace(weight, value=value)

    return map_named_weights(replaced, module)
