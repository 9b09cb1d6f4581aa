"""Choose the next token with pure functions of a row's logits. Every parameter is an array, so changes don't recompile.

The order is penalties, temperature, top-k, top-p, min-p, draw. Thresholds are found by bisection over the floats' bits,
without sorting the vocabulary. Steps that no row of a batch uses are skipped.

Shapes: B rows, V vocabulary, S positions of a row (prompt, then generated tokens, then unused).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from sharding.rules import ShardingRules, no_mesh, reshard

NEVER = -jnp.inf


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request. The defaults sample from the model's distribution."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest tokens (and ties with the k-th); 0: all
    top_p: float = 1.0  # keep the likeliest tokens with this total probability (Holtzman et al. 2020), in (0, 1]
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024), 0 to 1
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of earlier tokens (CTRL)
    frequency_penalty: float = 0.0  # subtracted from the logit for each time the token was generated
    presence_penalty: float = 0.0  # subtracted from the logit once if the token was generated
    max_new_tokens: int = 128  # maximum number of generated tokens
    stop_token_ids: tuple[int, ...] = ()  # ids that end the generation; the stop id is the last returned token
    seed: int = 0  # the same seed, prompt and parameters give the same text in any batch

    def validate(self) -> None:
        """Raise ValueError, with field, value and fix, for the first invalid field."""
        for name in ("temperature", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"sampling.{name} = {getattr(self, name)}: must be a finite number")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature = {self.temperature}: must be 0 (greedy) or above")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k = {self.top_k}: must be at least 1, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p = {self.top_p}: must be a probability in (0, 1]; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling.min_p = {self.min_p}: must be a fraction in [0, 1]; 0 keeps every token")
        if self.repetition_penalty <= 0:
            raise ValueError(f"sampling.repetition_penalty = {self.repetition_penalty}: must be above 0; 1 disables it")
        if self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens = {self.max_new_tokens}: must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"sampling.seed = {self.seed}: must be an integer in [0, 2**32)")


HostOrDevice = Array | np.ndarray  # requests are made on the host and then moved to the device


class SamplerArrays(NamedTuple):
    """The numbers of `SamplingParams`, one entry per row."""

    temperature_B: Float[HostOrDevice, "B"]
    top_k_B: Int[HostOrDevice, "B"]
    top_p_B: Float[HostOrDevice, "B"]
    min_p_B: Float[HostOrDevice, "B"]
    repetition_B: Float[HostOrDevice, "B"]
    frequency_B: Float[HostOrDevice, "B"]
    presence_B: Float[HostOrDevice, "B"]
    seed_B: UInt32[HostOrDevice, "B"]


def sampler_arrays(params: Sequence[SamplingParams]) -> SamplerArrays:
    """Return NumPy arrays with one entry per request."""
    column = lambda name, dtype: np.asarray([getattr(p, name) for p in params], dtype)
    return SamplerArrays(
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        column("repetition_penalty", np.float32),
        column("frequency_penalty", np.float32),
        column("presence_penalty", np.float32),
        column("seed", np.uint32),
    )


def choose(
    logits_BV: Float[Array, "B V"],
    sampler: SamplerArrays,
    tokens_BS: Int[Array, "B S"],
    prompt_B: Int[Array, "B"],
    length_B: Int[Array, "B"],
    rules: ShardingRules,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Return each row's next token and its log-probability under the model.

    The natural log is taken before penalties, temperature and filters. Rows hold `length_B` tokens, the first
    `prompt_B` of which are the prompt. On a mesh, each device chooses for its rows.
    """
    if no_mesh():
        return _choose(logits_BV, sampler, tokens_BS, prompt_B, length_B)
    rows = rules.spec("activations", ("batch",))
    local = jax.shard_map(_choose, in_specs=rows, out_specs=rows)
    return local(reshard(logits_BV, rules, "batch", None), sampler, tokens_BS, prompt_B, length_B)


def _choose(logits_BV, sampler, tokens_BS, prompt_B, length_B):
    def shaped(x_BV):
        x_BV = x_BV / jnp.where(sampler.temperature_B > 0, sampler.temperature_B, 1.0)[:, None]
        x_BV = _apply_if(((sampler.top_k_B > 0) & drawn_B).any(), lambda x: top_k_filter(x, sampler.top_k_B), x_BV)
        x_BV = _apply_if(((sampler.top_p_B < 1) & drawn_B).any(), lambda x: top_p_filter(x, sampler.top_p_B), x_BV)
        x_BV = _apply_if(((sampler.min_p_B > 0) & drawn_B).any(), lambda x: min_p_filter(x, sampler.min_p_B), x_BV)
        return x_BV + gumbel_noise(sampler.seed_B, length_B - prompt_B, x_BV.shape[1])

    drawn_B = sampler.temperature_B > 0
    penalized = (sampler.repetition_B != 1) | (sampler.frequency_B != 0) | (sampler.presence_B != 0)
    x_BV = _apply_if(penalized.any(), lambda x: penalize(x, sampler, tokens_BS, prompt_B, length_B), logits_BV)
    x_BV = _apply_if(drawn_B.any(), lambda x: jnp.where(drawn_B[:, None], shaped(x), x), x_BV)
    token_B = jnp.argmax(x_BV, axis=-1).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def penalize(
    logits_BV: Float[Array, "B V"],
    sampler: SamplerArrays,
    tokens_BS: Int[Array, "B S"],
    prompt_B: Int[Array, "B"],
    length_B: Int[Array, "B"],
) -> Float[Array, "B V"]:
    """Return the logits with penalties applied.

    The repetition penalty (Keskar et al. 2019, as in transformers) applies to prompt and generated tokens, then the
    frequency and presence penalties (as in the OpenAI API) to generated tokens.
    """

    def counts(first, last, tokens_S):
        positions_S = jnp.arange(tokens_S.shape[0])
        wanted_S = jnp.where((positions_S >= first) & (positions_S < last), tokens_S, logits_BV.shape[1])
        return jnp.zeros(logits_BV.shape[1], jnp.int32).at[wanted_S].add(1, mode="drop")

    generated_BV = jax.vmap(counts)(prompt_B, length_B, tokens_BS)
    occurred_BV = (generated_BV > 0) | (jax.vmap(counts)(jnp.zeros_like(prompt_B), prompt_B, tokens_BS) > 0)
    factor_B1 = sampler.repetition_B[:, None]
    x_BV = jnp.where(occurred_BV, jnp.where(logits_BV > 0, logits_BV / factor_B1, logits_BV * factor_B1), logits_BV)
    return x_BV - sampler.frequency_B[:, None] * generated_BV - sampler.presence_B[:, None] * (generated_BV > 0)


def top_k_filter(x_BV: Float[Array, "B V"], k_B: Int[Array, "B"]) -> Float[Array, "B V"]:
    """Set logits below the k-th largest of their row to -inf; ties with it stay. k = 0 or k >= V keeps all."""
    k_B = jnp.where((k_B > 0) & (k_B < x_BV.shape[1]), k_B, x_BV.shape[1])
    return _keep_top(x_BV, lambda kept_BV: kept_BV.sum(-1, dtype=jnp.int32) >= k_B)


def top_p_filter(x_BV: Float[Array, "B V"], p_B: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Set logits outside the smallest set of likeliest tokens with probability at least p to -inf.

    Ties with the last token of the set stay. p = 1 keeps all.
    """
    weights_BV = jnp.exp(x_BV - x_BV.max(-1, keepdims=True))
    wanted_B = p_B * weights_BV.sum(-1)
    y_BV = _keep_top(x_BV, lambda kept_BV: jnp.where(kept_BV, weights_BV, 0.0).sum(-1) >= wanted_B)
    return jnp.where((p_B < 1)[:, None], y_BV, x_BV)


def min_p_filter(x_BV: Float[Array, "B V"], min_p_B: Float[Array, "B"]) -> Float[Array, "B V"]:
    """Set logits of tokens less than min_p times as likely as the likeliest to -inf. 0 keeps all."""
    floor_B = x_BV.max(-1) + jnp.log(min_p_B)
    return jnp.where(x_BV >= floor_B[:, None], x_BV, NEVER)


def gumbel_noise(seed_B: UInt32[Array, "B"], index_B: Int[Array, "B"], size: int) -> Float[Array, "B V"]:
    """Return standard Gumbel variates [B, size] that depend only on a row's seed and the index of its token.

    Adding them to logits and taking the largest samples from the softmax of the logits.
    """

    def row(seed, index):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), index)
        return jax.random.gumbel(key, (size,), jnp.float32)

    return jax.vmap(row)(seed_B, index_B)


def _keep_top(x_BV: Array, enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B"]]) -> Array:
    """Return `x` where it is at or above the highest threshold of its row that keeps enough, else -inf.

    `enough` must be monotone in the kept set. The threshold is built bit by bit from the top, in integers with the same
    order as the floats, and is exact after 32 passes over the row.
    """
    order_BV = _ordered(x_BV)

    def bit(i, found_B):
        trial_B = found_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(order_BV >= trial_B[:, None]), trial_B, found_B)

    found_B = jax.lax.fori_loop(0, 32, bit, jnp.zeros_like(order_BV[:, 0]))
    return jnp.where(order_BV >= found_B[:, None], x_BV, NEVER)


def _ordered(x: Float[Array, "*B"]) -> UInt32[Array, "*B"]:
    """Return unsigned integers in the order of the floats: the bits of negative floats are inverted, and positive ones
    get the top bit."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 equals 0.0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _apply_if(wanted: Bool[Array, ""], function: Callable[[Array], Array], x: Array) -> Array:
    return jax.lax.cond(wanted, function, lambda x: x, x)
