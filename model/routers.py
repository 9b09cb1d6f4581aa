"""Which experts a token goes to: pure functions from router logits to choices and weights.

One function a router, named for its paper; each returns (indices_BTC, weights_BTC). `route` runs the one of the config
and adds what all share: scale, padding, and the mark of logits that are not finite.

    router         choice                                    weight                          sees later tokens
    top_k          best k, by biased scores, in few groups   `config.weights`                no
    switch         best                                      its probability                 no
    gshard         best, and at random the second            of the two, renormalized        no
    noisy_top_k    best k of noisy logits                    softmax over the chosen         no
    sinkhorn       best k of a balanced plan (training)      `config.weights`                in training, for the choice
    hash           by the token's id                         1 / k                           no
    random         by chance                                 1 / k                           no
    dense          all                                       its probability                 no
    expert_choice  each expert its best tokens               its probability                 yes: no decoder can have it
    soft           every expert mixtures of all tokens       model/soft.py                   yes: no decoder can have it

Shapes: B batch, T time, E experts, C choices of a token (`top_k`; E of expert_choice and dense).
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
    """The choice of a router. A pair (token, choice) with index E goes nowhere."""

    indices_BTC: Int[Array, "B T C"]  # distinct experts of a token, in [0, E]
    weights_BTC: Float[Array, "B T C"]  # float32; multiply the experts' outputs
    probs_BTE: Float[Array, "B T E"]  # float32, sums to one: the distribution that losses and statistics read
    log_total_BT: Float[Array, "B T"]  # float32: logsumexp of the logits


class Scores(NamedTuple):
    """What a router says of each expert, float32 (holding bfloat16 values where `router_dtype` says so)."""

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
    """The choice of `config.router`. `key`: given in training alone; what is random is drawn from it.

    `bias_E` is added for the choice, not to the weights. `noise_BTE`: what noisy_top_k's noise is scaled by, before
    softplus. Tokens that are not valid (padding) go nowhere. A token whose logits are not finite gets weights that are
    not finite, so that the loss shows it; of the other tokens only expert_choice harms some (see there).

    hash (needs `ids_BT`) and random (without a key: `ids_BT` and `positions_BT`) take no logits: `probs_BTE` is then 1
    / k at the chosen experts, for random 1 / E at all, and `log_total_BT` is 0, so that a load-balance loss tells the
    imbalance but has no gradient, and a z-loss is 0. Raises ValueError for soft, which chooses nothing (model/soft.py).
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
        raise ValueError(f"router {router!r} chooses no experts; see model/soft.py")
    # top_k may rank NaN below every number and so drop it: a token with a bad logit is marked by hand.
    weights_BTC = jnp.where(finite_BT[..., None], config.scale * weights_BTC, jnp.nan)
    return Routing(jnp.where(valid_BT[..., None], indices_BTC, E), weights_BTC, s.probs_BTE, s.log_total_BT)


def scores(logits_BTE: Float[Array, "B T E"], config: MoEConfig) -> Scores:
    """Softmax, or for sigmoid weights the sigmoids, and as probabilities these over their sum (DeepSeek-V3, eq. 19).

    With router_dtype 'bfloat16' every step is rounded to it (sums excepted, which accelerators too keep in float32):
    what Fedus et al. 2021 (table 2) found to diverge. Rounding is explicit, as XLA may else leave it out.
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
    """The k experts of the best scores (Shazeer et al. 2017, sec. 2.1, without its noise).

    `bias_E` is added to the scores for the choice alone and has no gradient (Wang et al. 2024, sec. 3.1). With
    `config.groups` = (n, used), n > 1, only experts of the `used` best groups are chosen: with sigmoid weights a group
    is worth the sum of its two best biased scores (DeepSeek-V3, sec. 2.1.2 and its code), with the others its best one
    (DeepSeek-V2, sec. 2.1.2: a softmax tends to put all on one expert, so that a second says little).
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
    """The best expert, weighted by its probability, so that the router has a gradient (Fedus et al. 2021, eq. 2)."""
    indices_BTC = jax.lax.top_k(jax.lax.stop_gradient(s.values_BTE), 1)[1]
    return indices_BTC, at(s.values_BTE, indices_BTC)


def gshard(s: Scores, key: PRNGKeyArray | None) -> Choice:
    """The two best experts with weights g1, g2 that sum to one; in training (a key is given) a token goes to the second
    with probability min(1, 2 g2) alone, and g1 is then still g1 (Lepikhin et al. 2020, algorithm 1)."""
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
    """Softmax over the k best of logits + N(0, 1) * softplus(noise); without a key, of the logits (Shazeer et al. 2017,
    eq. 3-5). Losses and statistics read the distribution without noise."""
    noisy_BTE = s.logits_BTE
    if key is not None:
        assert noise_BTE is not None, "noisy_top_k needs noise_BTE in training"
        noisy_BTE = noisy_BTE + draw(jax.random.normal, key, noisy_BTE) * jax.nn.softplus(noise_BTE.astype(jnp.float32))
    indices_BTC = jax.lax.top_k(jax.lax.stop_gradient(noisy_BTE), k)[1]
    return indices_BTC, jax.nn.softmax(at(noisy_BTE, indices_BTC), axis=-1)


def expert_choice(s: Scores, valid_BT: Bool[Array, "B T"], capacity: int) -> Choice:
    """Each expert takes its `capacity` best tokens of each sequence, weighted by their probability; C = E, and choice e
    of a token is expert e or, if that did not take it, E (Zhou et al. 2022, sec. 3.2, whose pool of tokens is the
    batch).

    A row is one sequence, whatever documents are packed into it: they compete for its places.
    Every expert has the same load (where enough tokens are valid), a token any number of experts. A token is taken or
    not according to the others of its sequence, later ones too. A token with logits that are not finite comes first
    with every expert, so that it shows; it takes one place of each.
    """
    E = s.values_BTE.shape[-1]
    eager_BTE = jnp.where(jnp.isfinite(s.logits_BTE).all(-1, keepdims=True), s.values_BTE, jnp.inf)
    eager_BTE = jax.lax.stop_gradient(jnp.where(valid_BT[..., None], eager_BTE, -1.0))

    def first(eager_BTE: Array) -> Array:
        """Whether a token is among an expert's best; of equals the earlier. (Two argsorts would cost 2.5 times as
        much.)"""
        worst_BE1 = jax.lax.top_k(jnp.swapaxes(eager_BTE, 1, 2), capacity)[0][..., -1:]
        worst_B1E = jnp.swapaxes(worst_BE1, 1, 2)
        better_BTE, equal_BTE = eager_BTE > worst_B1E, eager_BTE == worst_B1E
        left_B1E = capacity - better_BTE.sum(1, keepdims=True)
        return better_BTE | (equal_BTE & (jnp.cumsum(equal_BTE, axis=1) <= left_B1E))

    chosen_BTE = whole_sequences(first, eager_BTE) & valid_BT[..., None]
    return jnp.where(chosen_BTE, jnp.arange(E), E), jnp.where(chosen_BTE, s.values_BTE, 0.0)


def sinkhorn(s: Scores, valid_BT: Bool[Array, "B T"], config: MoEConfig, balanced: bool) -> Choice:
    """In training (`balanced`) the k best of a plan in which every expert has the same share of the batch (BASE layers,
    Lewis et al. 2021, sec. 2, by Sinkhorn iterations in place of an auction: Clark et al. 2022, sec. 3.2, S-BASE), else
    of the logits; weighted by the raw logits as `config.weights` says (BASE: sigmoid).

    The choice of a token in training depends on the whole batch, later tokens and other rows too; scoring is causal.
    The plan is exp(logits_te + f_t + g_e) with rows of equal and columns of equal sums; f_t does not change a token's
    order of experts, and so the plan is but a bias g_e. Tokens that are not valid have no part in it.
    """
    ranked_BTE = jax.lax.stop_gradient(s.logits_BTE)
    if balanced:
        logits_BTE = jnp.where(valid_BT[..., None], ranked_BTE, 0.0)
        row_BT1 = jnp.where(valid_BT, 0.0, -jnp.inf)[..., None]  # the log of a row's sum
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
    """Every expert, weighted by its probability (Jacobs et al. 1991): the oracle, at the cost of all experts."""
    return jnp.broadcast_to(jnp.arange(s.values_BTE.shape[-1]), s.values_BTE.shape), s.values_BTE


def hash_scores(ids_BT: Integer[Array, "B T"], num_experts: int) -> Float[Array, "B T E"]:
    """A number in [0, 1) for each token id and expert, the same in every layer and run. The k experts of the greatest
    are a draw without replacement that each id keeps (random hashing of Roller et al. 2021, sec. 3.1)."""
    experts_E = _mix(jnp.arange(1, num_experts + 1, dtype=jnp.uint32))
    mixed_BTE = _mix(_mix(ids_BT.astype(jnp.uint32))[..., None] ^ experts_E)
    return (mixed_BTE >> 8).astype(jnp.float32) * 2.0**-24


def noisy_input(x_BTD: Float[Array, "B T D"], config: MoEConfig, key: PRNGKeyArray | None) -> Float[Array, "B T D"]:
    """The router's input in training: times uniform(1 - jitter, 1 + jitter) (Fedus et al. 2021, sec. 2.4, 'input
    jitter'), then with dropout (Zoph et al. 2022, table 3). Unchanged without a key. In the dtype of `x_BTD`, which is
    to be router_dtype."""
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
    """Whether a router acts otherwise in training: it needs a key there."""
    if config is None:
        return False
    different = config.router in ("gshard", "noisy_top_k", "random", "sinkhorn")
    return different or config.jitter > 0 or config.router_dropout > 0


def at(x_BTE: Float[Array, "B T E"], indices_BTC: Int[Array, "B T C"]) -> Float[Array, "B T C"]:
    """x_BTE[b, t, indices[b, t, c]]. A comparison with every expert, which XLA fuses with its sum: neither the gather
    nor, in the backward pass, the scatter that accelerators are slow at."""
    E = x_BTE.shape[-1]
    return jnp.where(indices_BTC[..., None] == jnp.arange(E), x_BTE[..., None, :], 0).sum(-1)


def draw(sampler: Callable[..., Array], key: PRNGKeyArray, like: Array) -> Array:
    """Float32 random numbers in the shape and layout of `like`; their values do not depend on the mesh."""
    return sampler(key, like.shape, jnp.float32, out_sharding=None if no_mesh() else jax.typeof(like).sharding)


def whole_sequences(f: Callable[[Array], Array], x_BTX: Array) -> Array:
    """f(x) of an f that looks along the sequence and keeps the layout: rows that are spread over devices are gathered
    first."""
    if no_mesh():
        return f(x_BTX)
    spec = jax.typeof(x_BTX).sharding.spec
    whole = jax.sharding.PartitionSpec(spec[0], *(None,) * (x_BTX.ndim - 1))
    return jax.sharding.reshard(f(jax.sharding.reshard(x_BTX, whole)), spec)


def _weights(s: Scores, indices_BTC: Array, config: MoEConfig) -> Array:
    """The weights of the chosen experts in the form of `config.weights`, before the scale."""
    if config.weights == "softmax_top_k":
        return jax.nn.softmax(at(s.logits_BTE, indices_BTC), axis=-1)
    weights_BTC = at(s.values_BTE, indices_BTC)
    if config.weights == "renormalized":  # a bias may choose experts whose probabilities are all zero in float32
        return weights_BTC / jnp.maximum(weights_BTC.sum(-1, keepdims=True), 1e-20)
    if config.weights == "sigmoid_renormalized":
        return weights_BTC / (weights_BTC.sum(-1, keepdims=True) + 1e-20)
    return weights_BTC


def _within_groups(ranked_BTE: Array, groups: tuple[int, ...], best: int) -> Array:
    """-inf for experts outside the groups that are worth most, by the sum of their `best` best."""
    count, used = groups
    *lead, E = ranked_BTE.shape
    size = E // count
    worth_BTN = jax.lax.top_k(ranked_BTE.reshape(*lead, count, size), min(best, size))[0].sum(-1)
    chosen_BTU = jax.lax.top_k(worth_BTN, used)[1]
    allowed_BTN = (chosen_BTU[..., None] == jnp.arange(count)).any(-2)
    return jnp.where(jnp.repeat(allowed_BTN, size, axis=-1), ranked_BTE, -jnp.inf)


def _without_logits(valid_BT: Array, config: MoEConfig, ids_BT, positions_BT, key) -> Routing:
    """hash: k distinct experts by the token's id. random: k distinct experts, drawn anew for each token in training (a
    key is given), else by a hash of its id and its position, so that scoring repeats and decoding with a cache agrees
    with it.
    """
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
    """A bijection of uint32 in which every input bit moves every output bit (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
