"""One layer's experts, or the MLP of equal active FLOPs, forward and backward, in the shapes of `quickstart`:
python -m experiments.bench.layer dense|moe [EXPERTS TOP_K HIDDEN_DIM [DISPATCH [CAPACITY_FACTOR]]]"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench.contest import serve
from experiments.resolve import resolve
from model.context import ForwardContext
from model.mlp import MLP
from model.moe import MoE
from model.moe_config import MoEConfig
from sharding.rules import ShardingRules
from train.host_memory import keep_freed_memory

REPEATS = 5  # forward and backward passes of one piece of work


def changed(moe: MoEConfig, words: list[str]) -> MoEConfig:
    """`moe` with what the command line's words say."""
    if not words:
        return moe
    experts, top_k, hidden_dim, *rest = words
    rest_given: dict[str, Any] = dict(
        zip(("dispatch", "capacity_factor"), (*rest[:1], *map(float, rest[1:])), strict=False)
    )
    return replace(moe, num_experts=int(experts), top_k=int(top_k), hidden_dim=int(hidden_dim), **rest_given)


def main(kind: str, *words: str) -> None:
    keep_freed_memory()
    experiment = resolve("quickstart" if kind == "moe" else "quickstart_dense", [], 1)
    config, data = experiment.model, experiment.data
    if config.moe is not None:
        config = replace(config, moe=changed(config.moe, list(words)))
    x_BTD = jax.random.normal(jax.random.key(1), (data.batch_size, data.sequence_length, config.embed_dim))
    ids_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    ctx = ForwardContext(ids_BT, ids_BT, jnp.ones_like(ids_BT, bool), ids_BT)

    @jax.jit
    def gradient(layer, x_BTD):
        def total(layer, x_BTD):
            if isinstance(layer, MLP):
                return jnp.square(layer(x_BTD)).sum()
            y, stats = layer(x_BTD, ctx)
            return jnp.square(y).sum() + stats.load_balance + stats.z

        return jax.grad(total, argnums=(0, 1))(layer, x_BTD)

    layer = (MoE if kind == "moe" else MLP)(jax.random.key(0), config, ShardingRules())
    serve(lambda: [jax.block_until_ready(gradient(layer, x_BTD)) for _ in range(REPEATS)], {})


if __name__ == "__main__":
    main(*sys.argv[1:])
