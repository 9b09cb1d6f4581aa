"""The lowered program of an MoE layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from model.moe import MoE
from model.moe_config import MoEConfig
from sharding.rules import ShardingRules
from tests.models import context, tiny_config


def test_a_float32_router_requests_the_highest_precision():
    """By default, accelerators round factors to bfloat16 or TF32. The forward pass and both gradients must not."""
    layers = {}
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(moe=MoEConfig(6, 2, 8, router_dtype=dtype, dispatch="dense"))
        layer = jax.eval_shape(lambda c=config: MoE(jax.random.key(0), c, ShardingRules()))
        x = jax.ShapeDtypeStruct((1, 4, config.embed_dim), jnp.float32)
        tokens = [jax.ShapeDtypeStruct((1, 4), t) for t in (jnp.int32, jnp.int32, bool)]

        def total(layer, x, ids, positions, valid):
            return layer(x, context(ids, positions, valid))[0].sum()

        layers[dtype] = (
            jax.jit(jax.grad(total, argnums=(0, 1))).lower(layer, x, *tokens[:3]).as_text().count("[HIGHEST, HIGHEST]")
        )
    assert layers == {"float32": 3, "bfloat16": 0}
