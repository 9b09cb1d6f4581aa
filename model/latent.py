"""Multi-head latent attention (DeepSeek-V2, sec. 2.1): keys and values of all heads are read out of one small vector a
token.

Whole rows are attended to as any heads are: the latents are read out into N keys and values. New tokens of a cache,
which holds latents alone, are absorbed: a head's queries go through its key matrix, so that the latents are the one key
that all heads share and, weighted, go through its value matrix (sec. 2.1.2: the same product in another order). The
Triton kernel of decode_attention takes heads of up to 256, and so on GPUs absorbed decoding at the published C = 576 is
done in plain JAX.

Shapes: B batch, T queries, S slots, D width, N heads, H head dimension, P its last part, which RoPE turns, V value
dimension, Q rank of the queries, R rank of keys and values, C = R + P numbers that a token leaves in the cache.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from model.attend import LatentCache, LayerCache, Places, absorbs, attend, attend_cache, attend_latents
from model.attention import turn, weight_std, write_cache
from model.config import ModelConfig
from model.norms import Norm
from model.weights import constant, matmul, normal, use
from sharding.rules import ShardingRules, activation_spec, reshard

# Of the norms of latents: the published code has it whatever the model's own is (Moonlight: 1e-5).
NORM_EPSILON = 1e-6


class LatentAttention(nnx.Module):
    """Attention as `AttentionConfig.latent` says. Heads divide over devices; latents, the cache among them, are on
    each."""

    def __init__(self, key: PRNGKeyArray, config: ModelConfig, rules: ShardingRules, layer: str):
        latent = config.attention.latent
        assert latent is not None
        self.config, self.rules, self.layer, self.latent = config, rules, layer, latent
        a, D = config.attention, config.embed_dim
        N, H, P, V, Q, R = a.num_heads, a.head_dim, latent.rope_dim, latent.value_dim, latent.q_rank, latent.kv_rank
        norm = replace(config.norm, epsilon=NORM_EPSILON)
        keys = jax.random.split(key, 6)
        out_std = weight_std(config, N * V, residual=True)
        self.q_down = None if Q is None else normal(keys[0], (D, Q), ("embed", None), weight_std(config, D), rules)
        self.q_down_norm = None if Q is None else Norm((Q,), (None,), norm, rules)
        self.q = normal(keys[1], (Q or D, N, H), ("embed", "heads", None), weight_std(config, Q or D), rules)
        self.kv_down = normal(keys[2], (D, R + P), ("embed", None), weight_std(config, D), rules)
        self.kv_down_norm = Norm((R,), (None,), norm, rules)
        self.k_up = normal(keys[3], (R, N, H - P), ("embed", "heads", None), weight_std(config, R), rules)
        self.v_up = normal(keys[4], (R, N, V), ("embed", "heads", None), weight_std(config, R), rules)
        self.out = normal(keys[5], (N, V, D), ("heads", None, "embed"), out_std, rules)
        biased = a.bias != "none"
        self.q_down_bias = constant((Q,), (None,), 0.0, rules) if biased and Q is not None else None
        self.kv_down_bias = constant((R + P,), (None,), 0.0, rules) if biased else None
        self.out_bias = constant((D,), ("embed",), 0.0, rules) if a.bias == "all" else None
        self.sinks = constant((N,), ("heads",), 0.0, rules) if a.sinks else None

    def empty_cache(self, repeats: int, batch: int, capacity: int, dtype: jnp.dtype) -> LatentCache:
        """A cache for a stack of `repeats` such layers."""
        shape = (repeats, batch, 1, capacity, self.latent.kv_rank + self.latent.rope_dim)
        spec = activation_spec(self.rules, "layer", "batch", None, None, None)
        return LatentCache(jnp.zeros(shape, dtype, out_sharding=spec))

    def __call__(
        self, x_BTD: Float[Array, "B T D"], places: Places, cache: LatentCache | None
    ) -> tuple[Float[Array, "B T D"], LatentCache | None]:
        """The output and, if one was given, the cache with this call's latents at `places.slots_BT[:, 0]` on."""
        config, rules, dtype = self.config, self.rules, x_BTD.dtype
        q_BTNH, latent_BTC = self._queries(x_BTD, places), self._latents(x_BTD, places)
        sinks_N = None if self.sinks is None else use(self.sinks, ("heads",), jnp.float32, rules)
        if cache is None:
            k_BTNH, v_BTNV = self._read(latent_BTC, "sequence")
            out_BTNV = attend(config, rules, self.layer, q_BTNH, k_BTNH, v_BTNV, sinks_N, places)
        else:
            new_B1TC = reshard(latent_BTC, rules, "batch", None, None)[:, None]
            start_B1 = reshard(places.slots_BT[:, :1], rules, "batch", None)
            cache = LatentCache(write_cache(cache.latent_B1SC, new_B1TC, start_B1))
            if absorbs(config, self.layer, x_BTD.shape[1]):
                out_BTNV = self._absorbed(q_BTNH, cache, sinks_N, places)
            else:
                k_BSNH, v_BSNV = self._read(cache.latent_B1SC[:, 0].astype(dtype), None)
                seen = LayerCache(k_BSNH.transpose(0, 2, 1, 3), v_BSNV.transpose(0, 2, 1, 3))
                out_BTNV = attend_cache(config, rules, self.layer, q_BTNH, seen, sinks_N, places)
        w = use(self.out, ("heads", None, "embed"), dtype, rules)
        out_BTD = matmul(out_BTNV, w, 2, ("batch", "sequence", "embed"), rules)
        if self.out_bias is not None:
            out_BTD = out_BTD + use(self.out_bias, ("embed",), dtype, rules)
        return checkpoint_name(out_BTD, "attention_out"), cache

    def _queries(self, x_BTD: Array, places: Places) -> Array:
        """Of each head H numbers, the last P of them turned."""
        nope = self.config.attention.head_dim - self.latent.rope_dim
        if self.q_down is None:
            w = use(self.q, ("embed", "heads", None), x_BTD.dtype, self.rules)
            q_BTNH = checkpoint_name(matmul(x_BTD, w, 1, ("batch", "sequence", "heads", None), self.rules), "qkv")
        else:
            assert self.q_down_norm is not None
            down_BTQ = checkpoint_name(self._down(x_BTD, self.q_down, self.q_down_bias), "qkv")
            w = self._up(self.q, x_BTD.dtype)
            q_BTNH = matmul(self.q_down_norm(down_BTQ), w, 1, ("batch", "sequence", "heads", None), self.rules)
        turned_BTNP = turn(self.config, self.layer, q_BTNH[..., nope:], places.positions_BT, None)
        return jnp.concatenate((q_BTNH[..., :nope], turned_BTNP), axis=-1)

    def _latents(self, x_BTD: Array, places: Places) -> Array:
        """What the cache holds of a token, [B, T, C]: the latent, normed, and the key that the heads share, turned."""
        R = self.latent.kv_rank
        # Of all that leads to keys and values, what remat may keep: the rest is cheap to read out of it again.
        down_BTC = checkpoint_name(self._down(x_BTD, self.kv_down, self.kv_down_bias), "qkv")
        turned_BT1P = turn(self.config, self.layer, down_BTC[..., None, R:], places.positions_BT, None)
        return jnp.concatenate((self.kv_down_norm(down_BTC[..., :R]), turned_BT1P[..., 0, :]), axis=-1)

    def _read(self, latent_BSC: Array, sequence: str | None) -> tuple[Array, Array]:
        """Keys [B, S, N, H] and values [B, S, N, V] of every head."""
        R, axes = self.latent.kv_rank, ("batch", sequence, "heads", None)
        latent_BSR, shared_BS1P = latent_BSC[..., :R], latent_BSC[..., None, R:]
        k_BSNX = matmul(latent_BSR, self._up(self.k_up, latent_BSC.dtype), 1, axes, self.rules)
        v_BSNV = matmul(latent_BSR, self._up(self.v_up, latent_BSC.dtype), 1, axes, self.rules)
        shape = (*k_BSNX.shape[:-1], self.latent.rope_dim)
        shared_BSNP = jnp.broadcast_to(shared_BS1P, shape, out_sharding=activation_spec(self.rules, *axes))
        return jnp.concatenate((k_BSNX, shared_BSNP), axis=-1), v_BSNV

    def _absorbed(self, q_BTNH: Array, cache: LatentCache, sinks_N: Array | None, places: Places) -> Array:
        """[B, T, N, V] of few queries over latents that are not read out."""
        nope, dtype, rules = self.config.attention.head_dim - self.latent.rope_dim, q_BTNH.dtype, self.rules
        spec = activation_spec(rules, "batch", "sequence", "heads", None)
        k_RNX, v_RNV = self._up(self.k_up, dtype), self._up(self.v_up, dtype)
        q_BTNR = jnp.einsum("btnx,rnx->btnr", q_BTNH[..., :nope], k_RNX, out_sharding=spec)
        q_BTNC = jnp.concatenate((q_BTNR, q_BTNH[..., nope:]), axis=-1)
        seen_BTNR = attend_latents(self.config, rules, self.layer, q_BTNC, cache, sinks_N, places)[
            ..., : self.latent.kv_rank
        ]
        return jnp.einsum("btnr,rnv->btnv", seen_BTNR, v_RNV, out_sharding=spec)

    def _down(self, x_BTD: Array, weight: nnx.Param, bias: nnx.Param | None) -> Array:
        w = use(weight, ("embed", None), x_BTD.dtype, self.rules)
        y = matmul(x_BTD, w, 1, ("batch", "sequence", None), self.rules)
        return y if bias is None else y + use(bias, (None,), x_BTD.dtype, self.rules)

    def _up(self, weight: nnx.Param, dtype: jnp.dtype) -> Array:
        """A weight [rank, N, ...] at use. A rank is spread as 'embed' where it is stored, and whole where it is
        used."""
        return reshard(use(weight, ("embed", "heads", None), dtype, self.rules), self.rules, None, "heads", None)
