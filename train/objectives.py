"""What is learned: functions (model, batch, key) -> Loss, a sum over tokens and their count.

Sums over counts, so that microbatches add up to the large batch exactly. A batch holds int32 [B, T+1] `tokens`,
`segment_ids` (0 is padding) and `positions`, and may hold float32 [B, T] `weights` of its targets.

Shapes: B batch, T time, D width, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data.config import SPECIAL_PIECES
from data.tokenizer import SpecialTokens
from model.transformer import Output, Transformer, forward, head_weight
from sharding.rules import no_mesh
from train.config import TrainConfig
from train.cross_entropy import cross_entropy

Batch = dict[str, Array]
OWN = SpecialTokens()  # of the tokenizers that we train

ROUTER_METRICS = {  # metric, field of RouterStats: the mean over the MoE layers is told
    "load_balance_loss": "load_balance", "router_z_loss": "z", "router_entropy": "entropy",
    "router_confidence": "confidence", "dropped_fraction": "dropped",
}  # fmt: skip


class Loss(NamedTuple):
    total: Float[Array, ""]  # what is differentiated: the sum over tokens, auxiliary losses included
    count: Float[Array, ""]  # type: ignore[assignment]  # tokens (by weight) the sum is over; hides tuple.count
    metrics: dict[str, Array]  # means over the batch


Objective = Callable[[Transformer, Batch, PRNGKeyArray], Loss]


def token_losses(
    model: Transformer, hidden_BTD: Array, targets_BT: Array, chunk: int | None = None
) -> tuple[Array, Array]:
    """Negative log-likelihood of each target and the log of each softmax's denominator, float32 [B, T], nats.
    `chunk`: as TrainConfig.loss_chunk."""
    head_DV, cap = head_weight(model), model.config.final_softcap
    if model.head is None:  # turned back into the embedding's own layout: a loop over chunks would else copy it
        return cross_entropy(hidden_BTD, head_DV.T, targets_BT, vocab_axis=0, softcap=cap, chunk=chunk)
    return cross_entropy(hidden_BTD, head_DV, targets_BT, softcap=cap, chunk=chunk)


def next_token(
    model: Transformer, batch: Batch, key: PRNGKeyArray | None, *, z_loss: float = 0.0, share: float = 1.0,
    chunk: int | None = None,
) -> Loss:  # fmt: skip
    """Predict each token from those before it in its segment. `share`: the part of the tokens that `weights` leaves on
    average."""
    segments = batch["segment_ids"]
    weights_BT = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(jnp.float32)
    if "weights" in batch:
        weights_BT = weights_BT * batch["weights"]
    out = forward(
        model,
        batch["tokens"][:, :-1],
        positions_BT=batch["positions"][:, :-1],
        segment_ids_BT=segments[:, :-1],
        prefix_BT=batch.get("prefix"),
        dropout_key=key,
    )
    routed = share * (segments[:, :-1] > 0).sum()
    return _loss(model, out, batch["tokens"][:, 1:], weights_BT, z_loss, routed, chunk)


def masked(
    model: Transformer, batch: Batch, key: PRNGKeyArray, *, rate: float, special: SpecialTokens, ids: int,
    z_loss: float = 0.0, dropout: bool = True, chunk: int | None = None,
) -> Loss:  # fmt: skip
    """Predict masked tokens from both sides (Devlin et al. 2019, sec. 3.1): of the chosen, 80 % become <mask>, 10 % a
    random one of the tokenizer's `ids`, 10 % stay."""
    tokens_BT, segments_BT = batch["tokens"][:, :-1], batch["segment_ids"][:, :-1]
    pick_key, kind_key, random_key, dropout_key = jax.random.split(key, 4)
    shape = tokens_BT.shape
    chosen_BT = (_as_rows(jax.random.uniform(pick_key, shape), tokens_BT) < rate) & (segments_BT > 0)
    kind_BT = _as_rows(jax.random.uniform(kind_key, shape), tokens_BT)
    random_BT = _as_rows(jax.random.randint(random_key, shape, first_text_id(special), ids), tokens_BT)
    noised_BT = jnp.where(kind_BT < 0.8, special.mask, jnp.where(kind_BT < 0.9, random_BT, tokens_BT))
    out = forward(
        model,
        jnp.where(chosen_BT, noised_BT, tokens_BT),
        positions_BT=batch["positions"][:, :-1],
        segment_ids_BT=segments_BT,
        dropout_key=dropout_key if dropout else None,
    )
    routed = rate * (segments_BT > 0).sum()
    return _loss(model, out, tokens_BT, chosen_BT.astype(jnp.float32), z_loss, routed, chunk)


def fill_in_middle(
    model: Transformer, batch: Batch, key: PRNGKeyArray, *, rate: float, spm_rate: float, special: SpecialTokens,
    z_loss: float = 0.0, chunk: int | None = None,
) -> Loss:  # fmt: skip
    """Next-token loss on rows of which a part is rearranged so that the middle comes last (Bavarian et al. 2022)."""
    move_key, dropout_key = jax.random.split(key)
    tokens = rearrange_middle(batch["tokens"], batch["segment_ids"], move_key, rate, spm_rate, special)
    return next_token(model, {**batch, "tokens": tokens}, dropout_key, z_loss=z_loss, chunk=chunk)


def prefix_lm(
    model: Transformer, batch: Batch, key: PRNGKeyArray, *, z_loss: float = 0.0, chunk: int | None = None
) -> Loss:
    """Next-token loss on what follows a prefix of uniformly drawn length, which is seen from both sides (Raffel et al.
    2020, sec. 3.2.1). In a packed row the prefix ends somewhere in one of the segments; those before it are all prefix.
    """
    cut_key, dropout_key = jax.random.split(key)
    B, W = batch["tokens"].shape
    cut_B = _as_rows(jax.random.randint(cut_key, (B,), 0, W - 1), batch["tokens"])
    prefix_BT = jnp.arange(W - 1) < cut_B[:, None]
    # The last token of the prefix predicts the first one after it.
    weights_BT = (jnp.arange(1, W) >= cut_B[:, None]).astype(jnp.float32) * batch.get("weights", 1.0)
    batch = {**batch, "prefix": prefix_BT, "weights": weights_BT}
    return next_token(model, batch, dropout_key, z_loss=z_loss, share=0.5, chunk=chunk)


def rearrange_middle(
    tokens_BW: Int[Array, "B W"],
    segments_BW: Int[Array, "B W"],
    key: PRNGKeyArray,
    rate: float,
    spm_rate: float,
    special: SpecialTokens,
) -> Int[Array, "B W"]:
    """In a row chosen with probability `rate`, the longest segment is cut at two uniform places and rearranged:
    PSM: <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle <end>, or, with probability `spm_rate`,
    SPM: <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle <end> (sec. 3 there, the variant that shares
    prefixes).

    Its first token (<end>, which opens a document) stays first, and its last four tokens make room for the marks and
    for the <end> that says where the middle ends. Segments shorter than 8 tokens are left alone.
    """
    B = tokens_BW.shape[0]
    row_key, kind_key, cut_key = jax.random.split(key, 3)
    draws = jax.random.uniform(row_key, (B,)), jax.random.uniform(kind_key, (B,)), jax.random.uniform(cut_key, (B, 2))
    rearrange = partial(_rearrange, rate=rate, spm_rate=spm_rate, special=special)
    if no_mesh():
        return rearrange(tokens_BW, segments_BW, *draws)
    spec = jax.typeof(tokens_BW).sharding.spec  # rows are independent: each device rearranges its own
    rows = P(spec[0])
    return jax.shard_map(rearrange, in_specs=(spec, spec, rows, rows, rows), out_specs=spec)(
        tokens_BW, segments_BW, *(_as_rows(draw, tokens_BW) for draw in draws)
    )


def _rearrange(tokens_BW, segments_BW, row_B, kind_B, cut_B2, *, rate: float, spm_rate: float, special: SpecialTokens):
    """`rearrange_middle` with its draws, uniform in [0, 1)."""
    W = tokens_BW.shape[1]
    sizes_BW = (segments_BW[:, :, None] == jnp.arange(1, W + 1)).sum(1)
    segment_B, size_B = sizes_BW.argmax(1) + 1, sizes_BW.max(1)
    start_B = (segments_BW == segment_B[:, None]).argmax(1)
    length_B = size_B - 1 - 4  # tokens that are moved: without the first one and the room for the marks and the end
    cuts_B2 = jnp.sort((cut_B2 * (length_B[:, None] + 1)).astype(jnp.int32), axis=1)
    prefix_B, middle_B = cuts_B2[:, 0], cuts_B2[:, 1] - cuts_B2[:, 0]
    suffix_B = length_B - cuts_B2[:, 1]
    spm_B = kind_B < spm_rate

    # Where each part starts, counted from the token after the first; a part's marks come before it.
    at = jnp.arange(W) - (start_B[:, None] + 1)
    pre, mid, suf, spm = (y[:, None] for y in (prefix_B, middle_B, suffix_B, spm_B))
    suffix_at = jnp.where(spm, 2, pre + 2)
    prefix_at = jnp.where(spm, suf + 3, 1)
    middle_at = pre + suf + 3
    source = jnp.where(
        at >= middle_at,
        at - middle_at + pre,
        jnp.where((at >= prefix_at) & (at < prefix_at + pre), at - prefix_at, at - suffix_at + pre + mid),
    )
    moved = jnp.take_along_axis(tokens_BW, jnp.clip(source + start_B[:, None] + 1, 0, W - 1), axis=1)
    moved = jnp.where(at == 0, special.fim_prefix, moved)
    moved = jnp.where(at == suffix_at - 1, special.fim_suffix, moved)
    moved = jnp.where(at == jnp.where(spm, suf + 2, pre + suf + 2), special.fim_middle, moved)
    moved = jnp.where(at == length_B[:, None] + 3, special.end, moved)
    inside = (at >= 0) & (at < length_B[:, None] + 4)
    chosen_B = (row_B < rate) & (size_B >= 8)
    return jnp.where(inside & chosen_B[:, None], moved, tokens_BW)


def first_text_id(special: SpecialTokens) -> int:
    """The least id that may come from text: above our own specials; a published tokenizer's may be anywhere."""
    return len(SPECIAL_PIECES) if special == OWN else 0


def make_objective(config: TrainConfig, ids: int, special: SpecialTokens = OWN) -> Objective:
    """The configured objective for a tokenizer of so many ids and these specials."""
    z_loss, chunk = config.z_loss, config.loss_chunk
    if config.objective == "masked":
        return partial(masked, rate=config.mask_rate, special=special, ids=ids, z_loss=z_loss, chunk=chunk)
    if config.objective == "fill_in_middle":
        rates = config.fim_rate, config.fim_spm_rate
        return partial(fill_in_middle, rate=rates[0], spm_rate=rates[1], special=special, z_loss=z_loss, chunk=chunk)
    return partial(prefix_lm if config.objective == "prefix" else next_token, z_loss=z_loss, chunk=chunk)


def scoring_objective(config: TrainConfig, ids: int, special: SpecialTokens = OWN) -> Objective:
    """What held-out text is scored by, without dropout: the masked objective, or the next tokens in their order."""
    chunk = config.loss_chunk
    if config.objective == "masked":
        return partial(masked, rate=config.mask_rate, special=special, ids=ids, dropout=False, chunk=chunk)
    return lambda model, batch, key: next_token(model, batch, None, chunk=chunk)


def _loss(
    model: Transformer,
    out: Output,
    targets_BT: Array,
    weights_BT: Array,
    z_loss: float,
    routed: Array,
    chunk: int | None,
) -> Loss:
    """`routed`: what the router's mean losses are multiplied by. It grows with the tokens that were routed, not with
    the
    targets, so that the losses of slices with unequal shares of targets add up to those of the whole batch."""
    nll_BT, log_total_BT = token_losses(model, out.hidden_BTD, targets_BT, chunk)
    count = weights_BT.sum()
    nll = (nll_BT * weights_BT).sum()
    total = nll + z_loss * (jnp.square(log_total_BT) * weights_BT).sum() if z_loss else nll
    metrics = {"loss": nll / jnp.maximum(count, 1.0)}
    if out.router is not None:
        moe = model.config.moe
        assert moe is not None
        total = total + routed * (moe.load_balance * out.router.load_balance.sum() + moe.z_loss * out.router.z.sum())
        metrics |= {name: getattr(out.router, field).mean() for name, field in ROUTER_METRICS.items()}
        layers = jnp.stack([getattr(out.router, field) for field in ROUTER_METRICS.values()], 1)
        metrics |= {"expert_load": out.router.load_E, "expert_dropped": out.router.dropped, "router_layers": layers}
    return Loss(total, count, metrics)


def _as_rows(x: Array, rows: Array) -> Array:
    """`x` [B, ...] spread over the devices as the `rows` of the batch are."""
    if no_mesh():
        return x
    return jax.sharding.reshard(x, P(jax.typeof(rows).sharding.spec[0], *(None,) * (x.ndim - 1)))
