"""Routers: pure functions from router logits to the experts of each token and their weights.

Each router is one function, named after its paper, and returns (indices_BTC, weights_BTC). `route` runs the router of
the config and adds the steps that all share: scale, padding, and the marking of non-finite logits.

    router         choice                                    weight                          reads later tokens
    top_k          best k by biased scores, in few groups    `config.weights`                no
    switch         best                                      its probability                 no
    gshard         best, and the second at random            the two, renormalized           no
    noisy_top_k    best k of noisy logits                    softmax over the chosen         no
    sinkhorn       best k of a balanced plan (training)      `config.weights`                in training, for the choice
    hash           by the token's id                         1 / k                           no
    random         at random                                 1 / k                           no
    dense          all                                       their probabilities             no
    expert_choice  each expert takes its best tokens         their probabilities             yes: not for decoders
    soft           each expert mixes all tokens              model/soft.py                   yes: not for decoders

Shapes: B batch, T time, E experts, C choices of a token (`top_k`; E for expert_choice and dense).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from model.moe_config import SIGMOID, MoEConfig
from sharding.rules import no_mesh

Choice = tuple[Array, Array]  # indices_BTC, weights_BTC
SINKHORN_ITERATIONS = 16


class Routing(NamedTuple):
    """The choices of a router. A choice with index E uses no expert."""

    indices_BTC: Int[Array, "B T C"]  # distinct experts of a token, in [0, E]
    weights_BTC: Float[Array, "B T C"]  # float32; factors of the experts' outputs
    probs_BTE: Float[Array, "B T E"]  # float32; distribution for losses and statistics, sums to one
    log_total_BT: Float[Array, "B T"]  # float32; logsumexp of the logits


class Scores(NamedTuple):
    """A router's scores of the experts, in float32; rounded to bfloat16 values if `router_dtype` is 'bfloat16'."""

    logits_BTE: Float[Array, "B T E"]
    values_BTE: Float[Array, "B T E"]  # probabilities, or the sigmoid of each logit
    probs_BTE: Float[Array, "B T E"]  # probabilities; the sigmoids over their sum
    log_total_BT: Float[Array, "B T"]  # logsumexp of the logits


def route(
    logits_BTE: Float[Array, "B T E"] | None,
    valid_BT: Bool[Array, "B T"],
    config: MoEConfig,
    *,
    bias_E: Float[Array, "E"] | None = None,
    noise_BTE: Float[Array, "B T E"] | None = None,
    ids_BT: Int[Array, "B T"] | None = None,
    positions_BT: Int[Array, "B T"] | None = None,
    key: PRNGKeyArray | None = None,
) -> Routing:
    """Return the routing of `config.router`. `key`: source of random draws, given in training only.

    `bias_E` is added for the choice, not to the weights. `noise_BTE`: scale of noisy_top_k's noise, before softplus.
    Invalid tokens (padding) get no expert. A token with non-finite logits gets non-finite weights, so that the loss
    shows it; other tokens are affected only by expert_choice (see there).

    hash (needs `ids_BT`) and random (needs `ids_BT`, and without a key also `positions_BT`) take no logits. Their
    `probs_BTE` is 1 / k at the chosen experts (hash) or 1 / E everywhere (random), and `log_total_BT` is 0. The
    load-balance loss then measures imbalance but has no gradient, and the z-loss is 0. Raises ValueError for soft,
    which makes no choice (model/soft.py).
    """
    E, router = config.num_experts, config.router
    if router in ("hash", "random"):
        return _without_logits(valid_BT, config, ids_BT, positions_BT, key)
    assert logits_BTE is not None, f"router {router} needs logits"
    s = scores(logits_BTE, config)
    finite_BT = jnp.isfinite(logits_BTE).all(-1)
    if router == "switch":
        indices_BTC, weights_BTC = switch(s)
    elif router == "gshard":
        indices_BTC, weights_BTC = gshard(s, key)
    elif router == "noisy_top_k":
        indices_BTC, weights_BTC = noisy_top_k(s, noise_BTE, config.top_k, key)
        if noise_BTE is not None:
            finite_BT &= jnp.isfinite(noise_BTE).all(-1)
    elif router == "expert_choice":
        indices_BTC, weights_BTC = expert_choice(s, valid_BT, config.capacity(valid_BT.shape[1]))
    elif router == "sinkhorn":
        indices_BTC, weights_BTC = sinkhorn(s, valid_BT & finite_BT, config, balanced=key is not None)
    elif router == "dense":
        indices_BTC, weights_BTC = dense(s)
    elif router == "top_k":
        indices_BTC, weights_BTC = top_k(s, config, bias_E)
    else:
        raise ValueError(f"model.moe.router = {router!r}: chooses no experts. Use soft_moe in model/soft.py")
    # top_k may rank NaN below every number and so hide it. Mark tokens with non-finite logits explicitly.
    weights_BTC = jnp.where(finite_BT[..., None], config.scale * weights_BTC, jnp.nan)
    return Routing(jnp.where(valid_BT[..., None], indices_BTC, E), weights_BTC, s.probs_BTE, s.log_total_BT)


def scores(logits_BTE: Float[Array, "B T E"], config: MoEConfig) -> Scores:
    """Return the softmax scores; for sigmoid weights, the sigmoids, with probabilities normalized by their sum
    (DeepSeek-V3, eq. 19).

    With router_dtype 'bfloat16' every step is rounded to bfloat16, which Fedus et al. 2021 (table 2) found to diverge.
    Only sums stay in float32, as on accelerators. Rounding is explicit, because XLA may leave out casts.
    """
    coarse = config.router_dtype == "bfloat16"

    def rounded(x: Array) -> Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7) if coarse else x

    logits_BTE = rounded(logits_BTE.astype(jnp.float32))
    if coarse:
        top_BT1 = jax.lax.stop_gradient(logits_BTE.max(-1, keepdims=True))
        e_BTE = rounded(jnp.exp(rounded(logits_BTE - top_BT1)))
        total_BT1 = rounded(e_BTE.sum(-1, keepdims=True))
        log_total_BT = rounded(rounded(jnp.log(total_BT1)) + top_BT1)[..., 0]
        probs_BTE = rounded(e_BTE / total_BT1)
    else:
        log_total_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
        probs_BTE = jnp.exp(logits_BTE - log_total_BT[..., None])
    if config.weights not in SIGMOID:
        return Scores(logits_BTE, probs_BTE, probs_BTE, log_total_BT)
    values_BTE = rounded(jax.nn.sigmoid(logits_BTE))
    return Scores(logits_BTE, values_BTE, values_BTE / (values_BTE.sum(-1, keepdims=True) + 1e-20), log_total_BT)


def top_k(s: Scores, config: MoEConfig, bias_E: Float[Array, "E"] | None = None) -> Choice:
    """Choose the k experts with the best scores (Shazeer et al. 2017, sec. 2.1, without its noise).

    `bias_E` is added to the scores for the choice only and has no gradient (Wang et al. 2024, sec. 3.1). With
    `config.groups` = (n, used) and n > 1, the choice is limited to the `used` best groups. With sigmoid weights, the
    score of a group is the sum of its two best biased scores (DeepSeek-V3, sec. 2.1.2 and its code); otherwise it is
    the best one (DeepSeek-V2, sec. 2.1.2), because a softmax tends to put nearly everything on one expert and the
    second carries little information.
    """
    ranked_BTE = s.logits_BTE if config.weights == "softmax_top_k" else s.values_BTE
    if bias_E is not None:
        ranked_BTE = ranked_BTE + bias_E
    ranked_BTE = jax.lax.stop_gradient(ranked_BTE)
    if config.groups[0] > 1:
        ranked_BTE = _within_groups(ranked_BTE, config.groups, best=2 if config.weights in SIGMOID else 1)
    indices_BTC = jax.lax.top_k(ranked_BTE, config.top_k)[1]
    return indices_BTC, _weights(s, indices_BTC, config)


def switch(s: Scores) -> Choice:
    """Choose the best expert, weighted by its probability to give the router a gradient (Fedus et al. 2021, eq. 2)."""
    indices_BTC = jax.lax.top_k(jax.lax.stop_gradient(s.values_BTE), 1)[1]
    return indices_BTC, at(s.values_BTE, indices_BTC)


def gshard(s: Scores, key: PRNGKeyArray | None) -> Choice:
    """Choose the two best experts with weights g1 and g2 that sum to one (Lepikhin et al. 2020, algorithm 1). In
    training (with a key) a token uses the second only with probability min(1, 2 g2), and g1 stays the same."""
    E = s.values_BTE.shape[-1]
    indices_BTC = jax.lax.top_k(jax.lax.stop_gradient(s.values_BTE), 2)[1]
    weights_BTC = at(s.values_BTE, indices_BTC)
    weights_BTC = weights_BTC / weights_BTC.sum(-1, keepdims=True)
    if key is None:
        return indices_BTC, weights_BTC
    chance_BT = draw(jax.random.uniform, key, s.log_total_BT)
    goes_BTC = jnp.stack([jnp.ones_like(chance_BT, bool), 2 * weights_BTC[..., 1] > chance_BT], -1)
    return jnp.where(goes_BTC, indices_BTC, E), jnp.where(goes_BTC, weights_BTC, 0.0)


def noisy_top_k(s: Scores, noise_BTE: Float[Array, "B T E"] | None, k: int, key: PRNGKeyArray | None) -> Choice:
    """Choose the k best of logits + N(0, 1) * softplus(noise), weighted by a softmax over them (Shazeer et al. 2017,
    eq. 3-5). Without a key there is no noise. Losses and statistics read the distribution without noise."""
    noisy_BTE = s.logits_BTE
    if key is not None:
        assert noise_BTE is not None, "noisy_top_k needs noise_BTE in training"
        noisy_BTE = noisy_BTE + draw(jax.random.normal, key, noisy_BTE) * jax.nn.softplus(noise_BTE.astype(jnp.float32))
    indices_BTC = jax.lax.top_k(jax.lax.stop_gradient(noisy_BTE), k)[1]
    return indices_BTC, jax.nn.softmax(at(noisy_BTE, indices_BTC), axis=-1)


def expert_choice(s: Scores, valid_BT: Bool[Array, "B T"], capacity: int) -> Choice:
    """Let each expert take its `capacity` best tokens of each sequence, weighted by their probability (Zhou et al.
    2022, sec. 3.2, where tokens are pooled over the batch). C = E, and choice e of a token is expert e, or E if expert
    e did not take the token.

    A row is one sequence, so packed documents compete for its capacity. Every expert has the same load (if enough
    tokens are valid), and a token has any number of experts. Whether a token is taken depends on all tokens of its
    sequence, including later ones. Every expert takes tokens with non-finite logits first, so that they show in the
    loss.
    """
    E = s.values_BTE.shape[-1]
    ranked_BTE = jnp.where(jnp.isfinite(s.logits_BTE).all(-1, keepdims=True), s.values_BTE, jnp.inf)
    ranked_BTE = jax.lax.stop_gradient(jnp.where(valid_BT[..., None], ranked_BTE, -1.0))

    def best(ranked_BTE: Array) -> Array:
        """Return whether a token is among an expert's best; the earlier token wins ties. Two argsorts would cost 2.5
        times as much."""
        worst_BE1 = jax.lax.top_k(jnp.swapaxes(ranked_BTE, 1, 2), capacity)[0][..., -1:]
        worst_B1E = jnp.swapaxes(worst_BE1, 1, 2)
        better_BTE, equal_BTE = ranked_BTE > worst_B1E, ranked_BTE == worst_B1E
        left_B1E = capacity - better_BTE.sum(1, keepdims=True)
        return better_BTE | (equal_BTE & (jnp.cumsum(equal_BTE, axis=1) <= left_B1E))

    chosen_BTE = whole_sequences(best, ranked_BTE) & valid_BT[..., None]
    return jnp.where(chosen_BTE, jnp.arange(E), E), jnp.where(chosen_BTE, s.values_BTE, 0.0)


def sinkhorn(s: Scores, valid_BT: Bool[Array, "B T"], config: MoEConfig, balanced: bool) -> Choice:
    """Choose the k best experts of a balanced plan in training (`balanced`), or of the logits otherwise. Weights come
    from the raw logits in the form of `config.weights` (BASE: sigmoid).

    In the plan every expert has the same share of the batch (BASE layers, Lewis et al. 2021, sec. 2). Sinkhorn
    iterations replace the auction (Clark et al. 2022, sec. 3.2, S-BASE). A token's choice in training depends on the
    whole batch, including later tokens and other rows; scoring is causal.

    The plan is exp(logits_te + f_t + g_e) with equal row sums and equal column sums. f_t does not change a token's
    order of experts, so the plan amounts to a bias g_e. Invalid tokens are left out of it.
    """
    ranked_BTE = jax.lax.stop_gradient(s.logits_BTE)
    if balanced:
        logits_BTE = jnp.where(valid_BT[..., None], ranked_BTE, 0.0)
        row_BT1 = jnp.where(valid_BT, 0.0, -jnp.inf)[..., None]  # log of a row's sum
        E = config.num_experts
        share = jnp.log(jnp.maximum(valid_BT.sum(), 1) / E)
        g_E = jnp.zeros(E)
        for _ in range(SINKHORN_ITERATIONS):
            f_BT1 = row_BT1 - jax.nn.logsumexp(logits_BTE + g_E, axis=-1, keepdims=True)
            g_E = share - jax.nn.logsumexp(logits_BTE + f_BT1, axis=(0, 1))
        ranked_BTE = ranked_BTE + jnp.where(jnp.isfinite(g_E), g_E, 0.0)  # not finite where no token is valid
    indices_BTC = jax.lax.top_k(ranked_BTE, config.top_k)[1]
    return indices_BTC, _weights(s, indices_BTC, config)


def dense(s: Scores) -> Choice:
    """Choose every expert, weighted by its probability (Jacobs et al. 1991): an oracle at the cost of all experts."""
    return jnp.broadcast_to(jnp.arange(s.values_BTE.shape[-1]), s.values_BTE.shape), s.values_BTE


def hash_scores(ids_BT: Integer[Array, "B T"], num_experts: int) -> Float[Array, "B T E"]:
    """Return a number in [0, 1) for each token id and expert, the same in every layer and run. The k experts with the
    largest numbers are a fixed draw without replacement for each id (random hashing, Roller et al. 2021, sec. 3.1)."""
    experts_E = _mix(jnp.arange(1, num_experts + 1, dtype=jnp.uint32))
    mixed_BTE = _mix(_mix(ids_BT.astype(jnp.uint32))[..., None] ^ experts_E)
    return (mixed_BTE >> 8).astype(jnp.float32) * 2.0**-24


def noisy_input(x_BTD: Float[Array, "B T D"], config: MoEConfig, key: PRNGKeyArray | None) -> Float[Array, "B T D"]:
    """Return the router's input in training: multiplied by uniform(1 - jitter, 1 + jitter) (Fedus et al. 2021, sec.
    2.4, 'input jitter'), then with dropout (Zoph et al. 2022, table 3). Without a key it is unchanged. `x_BTD` must
    have router_dtype, and the result has it too."""
    if key is None:
        return x_BTD
    jitter_key, dropout_key = jax.random.split(key)
    if config.jitter > 0:
        u_BTD = draw(jax.random.uniform, jitter_key, x_BTD)
        x_BTD = x_BTD * (1 + config.jitter * (2 * u_BTD - 1)).astype(x_BTD.dtype)
    if config.router_dropout > 0:
        keep_BTD = draw(jax.random.uniform, dropout_key, x_BTD) >= config.router_dropout
        x_BTD = jnp.where(keep_BTD, x_BTD / (1 - config.router_dropout), 0).astype(x_BTD.dtype)
    return x_BTD


def stochastic(config: MoEConfig | None) -> bool:
    """Return whether the router behaves differently in training, where it then needs a key."""
    if config is None:
        return False
    different = config.router in ("gshard", "noisy_top_k", "random", "sinkhorn")
    return different or config.jitter > 0 or config.router_dropout > 0


def at(x_BTE: Float[Array, "B T E"], indices_BTC: Int[Array, "B T C"]) -> Float[Array, "B T C"]:
    """Return x_BTE[b, t, indices[b, t, c]]. It compares with every expert, which XLA fuses with the sum; a gather, and
    a scatter in the backward pass, would be slow on accelerators."""
    E = x_BTE.shape[-1]
    return jnp.where(indices_BTC[..., None] == jnp.arange(E), x_BTE[..., None, :], 0).sum(-1)


def draw(sampler: Callable[..., Array], key: PRNGKeyArray, like: Array) -> Array:
    """Return float32 random numbers with the shape and sharding of `like`. Their values do not depend on the mesh."""
    return sampler(key, like.shape, jnp.float32, out_sharding=None if no_mesh() else jax.typeof(like).sharding)


def whole_sequences(f: Callable[[Array], Array], x_BTX: Array) -> Array:
    """Return f(x) for an `f` that operates along the sequence and keeps the layout. Sharded rows are gathered first."""
    if no_mesh():
        return f(x_BTX)
    spec = jax.typeof(x_BTX).sharding.spec
    gathered = jax.sharding.PartitionSpec(spec[0], *(None,) * (x_BTX.ndim - 1))
    return jax.sharding.reshard(f(jax.sharding.reshard(x_BTX, gathered)), spec)


def _weights(s: Scores, indices_BTC: Array, config: MoEConfig) -> Array:
    """Return the weights of the chosen experts in the form of `config.weights`, before the scale."""
    if config.weights == "softmax_top_k":
        return jax.nn.softmax(at(s.logits_BTE, indices_BTC), axis=-1)
    weights_BTC = at(s.values_BTE, indices_BTC)
    if config.weights == "renormalized":  # the bias may choose experts of probability 0 in float32
        return weights_BTC / jnp.maximum(weights_BTC.sum(-1, keepdims=True), 1e-20)
    if config.weights == "sigmoid_renormalized":
        return weights_BTC / (weights_BTC.sum(-1, keepdims=True) + 1e-20)
    return weights_BTC


def _within_groups(ranked_BTE: Array, groups: tuple[int, ...], best: int) -> Array:
    """Set experts outside the best groups to -inf. A group's score is the sum of its `best` best experts."""
    count, used = groups
    *lead, E = ranked_BTE.shape
    size = E // count
    score_BTN = jax.lax.top_k(ranked_BTE.reshape(*lead, count, size), min(best, size))[0].sum(-1)
    chosen_BTU = jax.lax.top_k(score_BTN, used)[1]
    allowed_BTN = (chosen_BTU[..., None] == jnp.arange(count)).any(-2)
    return jnp.where(jnp.repeat(allowed_BTN, size, axis=-1), ranked_BTE, -jnp.inf)


def _without_logits(valid_BT: Array, config: MoEConfig, ids_BT, positions_BT, key) -> Routing:
    """Choose k distinct experts without logits. hash: by the token's id. random: a new draw for each token in training
    (with a key), else a hash of the token's id and position, so that scoring is repeatable and agrees with cached
    decoding."""
    E, k = config.num_experts, config.top_k
    assert ids_BT is not None, f"router {config.router} needs ids_BT"
    seeds_BT = ids_BT
    if config.router == "random" and key is None:
        assert positions_BT is not None, "router random needs positions_BT"
        seeds_BT = _mix(ids_BT.astype(jnp.uint32)) ^ positions_BT.astype(jnp.uint32)
    ranked_BTE = hash_scores(seeds_BT, E)
    if config.router == "random" and key is not None:
        ranked_BTE = draw(jax.random.uniform, key, ranked_BTE)
    indices_BTC = jax.lax.top_k(ranked_BTE, k)[1]
    probs_BTE = jnp.full_like(ranked_BTE, 1 / E)
    if config.router == "hash":
        probs_BTE = (indices_BTC[..., None] == jnp.arange(E)).sum(-2) / jnp.float32(k)
    weights_BTC = jnp.full_like(indices_BTC, config.scale / k, jnp.float32)
    return Routing(
        jnp.where(valid_BT[..., None], indices_BTC, E), weights_BTC, probs_BTE, jnp.zeros_like(probs_BTE[..., 0])
    )


def _mix(x: Array) -> Array:
    """Return a bijection of uint32 in which every input bit affects every output bit (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
