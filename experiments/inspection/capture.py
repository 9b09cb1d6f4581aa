"""What a network computes for one text: predictions after each layer, attention weights and router choices.

`capture` calls the model's `forward` with its own `run_layers` (model/layers.py), which calls the layers one by one and
keeps what passes between them. Nothing in model/ knows about it.

- Predictions: the logit lens (nostalgebraist 2020) applies the final norm and the head to the residual stream after
  each layer. After the last layer these are the predictions of the model.
- Attention: a layer hands keys and values to its cache, which then attends (model/cache.py). `_Tap` takes the place of
  the cache and also attends over the identity matrix as values. Attention is linear in the values, so the result is the
  weights, with every mask, cap, bias, sink and latent of the layer, by the kernel's reference formula in float32.
- Router: `_choices` runs the layer up to its experts and asks its router. Tests compare with the model's statistics.

Shapes: B batch, T time, S keys, D width, N query heads, K best tokens, E experts, C choices of a token, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from model.attend import AttendSpec, attend_rows
from model.cache import WholeRows
from model.capacity import positions_in_experts
from model.config import ModelConfig, layer_specs
from model.context import ForwardContext
from model.layers import Block
from model.moe import MoE
from model.norms import Norm
from model.routers import route
from model.transformer import Transformer, forward, logits
from model.weights import repeats

BEST = 5  # most likely tokens that are kept of each prediction


class Prediction(NamedTuple):
    """Predictions of the next token at every position, as NumPy arrays. Logarithms are natural."""

    best_TK: Int[Any, "T K"]  # ids of the most likely tokens, in order
    best_logprob_TK: Float[Any, "T K"]
    next_logprob_T: Float[Any, "T"]  # of the token that follows in the text; NaN for the last position
    next_rank_T: Int[Any, "T"]  # 1 where it is the most likely token; 0 for the last position
    entropy_T: Float[Any, "T"]  # nats


class Choices(NamedTuple):
    """What the router of one layer chose, as NumPy arrays."""

    indices_TC: Int[Any, "T C"]  # experts of a token; E: no expert
    weights_TC: Float[Any, "T C"]  # factors of the experts' outputs
    kept_TC: Bool[Any, "T C"]  # False where the choice exceeded an expert's capacity, or is none


class Layer(NamedTuple):
    """One layer. `attention_NTS` is None for a user's attention variant that does not attend through its cache."""

    kind: str
    attention_NTS: Float[Any, "N T S"] | None  # weight of each key, float32
    choices: Choices | None  # None for a dense layer


class Capture(NamedTuple):
    tokens_T: Int[Any, "T"]
    predictions: tuple[Prediction, ...]  # from the embeddings, then after each layer: L + 1
    layers: tuple[Layer, ...]


def refuse(config: ModelConfig) -> None:
    """Raise ValueError for a network that does not predict the next token."""
    if config.attention.mask == "bidirectional":
        raise ValueError(
            "model.attention.mask = 'bidirectional': the network fills in masked tokens and does not predict the next "
            "one, which is what this page shows. Use a run with mask 'causal' or 'prefix'"
        )


def capture(model: Transformer, tokens: Sequence[int]) -> Capture:
    """Run the network on one row of tokens, on one device. A 'prefix' mask has an empty prefix, so it is causal.

    Raises ValueError for a bidirectional network.
    """
    refuse(model.config)
    tokens_T = np.asarray(tokens, np.int32)
    following_T = np.append(tokens_T[1:], np.int32(0))
    kinds = iter(layer_specs(model.config))
    predictions, layers = [], []

    def run_layers(config, stacks, x_BTD, ctx, caches, keys):
        predictions.append(_host(_predict(model, x_BTD, following_T)))
        for pattern in stacks:
            for i in range(repeats(pattern)):
                for block in pattern:
                    one = jax.tree.map(lambda weight, i=i: weight[i], block)
                    x_BTD, attention, choices = _run_layer(one, x_BTD, ctx)
                    predictions.append(_host(_predict(model, x_BTD, following_T)))
                    layers.append(Layer(next(kinds).attention, _host(attention), _host(choices)))
        return x_BTD, None, None

    forward(model, tokens_T[None], run_layers=run_layers)
    return Capture(tokens_T, tuple(map(_without_last, predictions)), tuple(layers))


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _without_last(prediction: Prediction) -> Prediction:
    """Return the prediction without figures for the token after the last, which is not known."""
    logprob_T, rank_T = prediction.next_logprob_T.copy(), prediction.next_rank_T.copy()
    logprob_T[-1], rank_T[-1] = np.nan, 0
    return prediction._replace(next_logprob_T=logprob_T, next_rank_T=rank_T)


@jax.jit
def _predict(model: Transformer, x_BTD: Float[Array, "1 T D"], following_T: Int[Array, "T"]) -> Prediction:
    """Return what the final norm and the head make of the residual stream."""
    logprob_TV = jax.nn.log_softmax(logits(model, model.final_norm(x_BTD))[0], axis=-1)
    best_logprob_TK, best_TK = jax.lax.top_k(logprob_TV, min(BEST, logprob_TV.shape[-1]))
    next_T1 = jnp.take_along_axis(logprob_TV, following_T[:, None], axis=-1)
    # XLA may compute a value twice with different rounding, so a token is never compared with itself.
    others_TV = following_T[:, None] != jnp.arange(logprob_TV.shape[-1])
    rank_T = 1 + ((logprob_TV > next_T1) & others_TV).sum(-1)
    entropy_T = -(jnp.exp(logprob_TV) * logprob_TV).sum(-1)
    return Prediction(best_TK, best_logprob_TK, next_T1[:, 0], rank_T, entropy_T)


@jax.jit
def _run_layer(
    block: Block, x_BTD: Float[Array, "1 T D"], ctx: ForwardContext
) -> tuple[Float[Array, "1 T D"], Float[Array, "N T S"] | None, Choices | None]:
    """Return (the layer's output, its attention weights, the choices of its router)."""
    weights: list[Array] = []
    out_BTD, _, _ = block(x_BTD, ctx, _Tap(weights), None)
    attention_NTS = jnp.concatenate(weights, axis=1)[0] if weights else None
    return out_BTD, attention_NTS, _choices(block, x_BTD, ctx)


@dataclass(frozen=True, eq=False)
class _Tap:
    """A layer's cache that keeps no keys for later calls. It lists the attention weights [1, N, T, S] of each call of
    `attend` while the layer is traced."""

    weights: list[Array]

    def append(self, k: Array, v: Array | None, ctx: ForwardContext) -> tuple[_TappedKeys, _Tap]:
        return _TappedKeys(WholeRows(k, v), self.weights), self


@dataclass(frozen=True, eq=False)
class _TappedKeys:
    rows: WholeRows
    weights: list[Array]

    def attend(self, q_BTNH: Array, ctx: ForwardContext, spec: AttendSpec) -> Array:
        self.weights.append(attention_weights(self.rows, q_BTNH, ctx, spec))
        return self.rows.attend(q_BTNH, ctx, spec)


def attention_weights(
    rows: WholeRows, q_BTNH: Float[Array, "B T N H"], ctx: ForwardContext, spec: AttendSpec
) -> Float[Array, "B N T S"]:
    """Return the weight of each key for each query, float32. They sum to one, or to less with sinks."""
    if rows.v_BTKV is None:
        assert spec.latent is not None
        k_BSKH = spec.latent.expand(rows.k)[0]
    else:
        k_BSKH = rows.k if spec.rope_after_cache is None else spec.rope_after_cache(rows.k, ctx.positions_BT)
    batch, S, K, _ = k_BSKH.shape
    identity_BSKS = jnp.broadcast_to(jnp.eye(S)[None, :, None], (batch, S, K, S))
    exact = replace(spec.config, attention=replace(spec.config.attention, implementation="reference"))
    q_BTNH, k_BSKH = q_BTNH.astype(jnp.float32), k_BSKH.astype(jnp.float32)
    return attend_rows(replace(spec, config=exact), q_BTNH, k_BSKH, identity_BSKS, ctx).transpose(0, 2, 1, 3)


def _choices(block: Block, x_BTD: Array, ctx: ForwardContext) -> Choices | None:
    """Return what the layer's router chooses: run the layer up to its experts, as `Block` does."""
    moe = block.mlp
    if not isinstance(moe, MoE):
        return None
    config = moe.config.moe
    assert config is not None
    y_BTD, _ = block.attention(_normed(block.attention_norm, x_BTD), ctx, None)
    h_BTD = _normed(block.mlp_norm, x_BTD + _normed(block.attention_post_norm, y_BTD))
    routing = route(
        moe._logits(h_BTD, None)[0], ctx.valid_BT, config, ids_BT=ctx.token_ids_BT, positions_BT=ctx.positions_BT,
        bias_E=None if moe.router_bias is None else moe.router_bias.gathered(jnp.float32),
    )  # fmt: skip
    kept_BTC = routing.indices_BTC
    if config.bounded:
        kept_BTC, _ = positions_in_experts(kept_BTC, config.num_experts, config.capacity(x_BTD.shape[1]))
    return Choices(routing.indices_BTC[0], routing.weights_BTC[0], kept_BTC[0] < config.num_experts)


def _normed(norm: Norm | None, x_BTD: Array) -> Array:
    return x_BTD if norm is None else norm(x_BTD)
