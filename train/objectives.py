"""Training objectives: frozen dataclasses, called as `objective(trainable, frozen, batch, key) -> Loss`.

A loss holds a sum over tokens and their count, so that the losses of microbatches add up exactly to that of the whole
batch. `batch.loss_weights` (data/batch.py) defines which targets count; an objective may only lower these weights.

Shapes: B batch, T time, W = T + 1, D width, V vocabulary, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray

from data.batch import Batch
from data.config import SPECIAL_PIECES
from data.tokenizer import SpecialTokens
from model.transformer import Output, Transformer, forward, head_weight, logits
from sharding.rules import no_mesh
from train.config import TrainConfig
from train.cross_entropy import cross_entropy
from train.frozen import Frozen, network
from train.hyper import COEFFICIENTS, Hyper

OWN = SpecialTokens()  # of the tokenizers that we train

ROUTER_METRICS = {  # metric -> field of RouterStats, whose mean over the MoE layers it is
    "load_balance_loss": "load_balance", "router_z_loss": "z", "router_entropy": "entropy",
    "router_confidence": "confidence", "dropped_fraction": "dropped",
}  # fmt: skip


class Loss(NamedTuple):
    total: Float[Array, ""]  # sum over tokens with auxiliary losses; the gradient is of this
    count: Float[Array, ""]  # type: ignore[assignment]  # sum of the tokens' weights; hides tuple.count
    metrics: dict[str, Array]  # means over the batch, for logging only
    expert_load: Float[Array, "L E"] | None = None  # share of each expert in its layer's choices; updates router biases


class Objective(Protocol):
    """A frozen dataclass that computes a loss.

    The gradient is with respect to `trainable`. `frozen` holds the rest of the network and, for some objectives, a
    second network.
    """

    def __call__(
        self,
        trainable: Transformer,
        frozen: Frozen | None,
        batch: Batch,
        key: Any,  # PRNGKeyArray; None: no dropout
    ) -> Loss: ...

    def with_hyper(self, hyper: Hyper) -> Objective:
        """Return the objective with traced coefficients."""
        ...


def token_losses(
    model: Transformer, hidden_BTD: Array, targets_BT: Array | np.ndarray, chunk: int | None = None
) -> tuple[Array, Array]:
    """Return the negative log-likelihood of each target and the log of each softmax's denominator.

    Both are float32 [B, T], in nats. `chunk`: as TrainConfig.loss_chunk.
    """
    head_DV, cap = head_weight(model), model.config.final_softcap
    if model.head is None:  # transposed back to the embedding's layout, which a loop over chunks would otherwise copy
        return cross_entropy(hidden_BTD, head_DV.T, targets_BT, vocab_axis=0, softcap=cap, chunk=chunk)
    return cross_entropy(hidden_BTD, head_DV, targets_BT, softcap=cap, chunk=chunk)


@dataclass(frozen=True, kw_only=True)
class TokenObjective:
    """Base class of the objectives over tokens, with the coefficients of the auxiliary losses (floats or traced)."""

    z_loss: float | Array = 0.0  # of the mean of logsumexp(logits)^2
    load_balance: float | Array | None = None  # None: that of model.moe
    router_z_loss: float | Array | None = None  # None: that of model.moe
    loss_chunk: int | None = None  # as TrainConfig.loss_chunk
    dropout: bool = True  # False for scoring

    def with_hyper(self, hyper: Hyper) -> Self:
        """Return the objective with the coefficients that `hyper` holds."""
        given = {name: getattr(hyper, name) for name in COEFFICIENTS if hasattr(self, name)}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def run(self, model: Transformer, batch: Batch, key: PRNGKeyArray | None, prefix_BT: Array | None = None) -> Output:
        """Return the network's output on the batch's inputs."""
        return forward(
            model,
            batch.tokens,
            positions_BT=batch.positions,
            segment_ids_BT=batch.segment_ids,
            prefix_BT=prefix_BT,
            dropout_key=key if self.dropout else None,
        )

    def loss(
        self,
        model: Transformer,
        out: Output,
        batch: Batch,
        share: float = 1.0,
        soft_BT: Array | None = None,
        mix: float | Array = 0.0,
    ) -> Loss:
        """Return the loss of predicting `batch.targets`, weighted by `batch.loss_weights`.

        `share`: the average fraction of the tokens that `loss_weights` keeps. The router's mean losses are multiplied
        by `share` times the number of routed tokens rather than by the number of targets, so that the losses of slices
        with unequal numbers of targets add up to that of the whole batch. `soft_BT`: a further loss per token, with
        weight `mix`; the targets have weight 1 - `mix`.
        """
        nll_BT, log_total_BT = token_losses(model, out.hidden_BTD, batch.targets, self.loss_chunk)
        count = batch.loss_weights.sum()
        nll = (nll_BT * batch.loss_weights).sum()
        metrics = {"loss": nll / jnp.maximum(count, 1.0)}
        total = nll
        if soft_BT is not None:
            soft = (soft_BT * batch.loss_weights).sum()
            metrics["distillation_loss"] = soft / jnp.maximum(count, 1.0)
            total = (1.0 - mix) * nll + mix * soft
        if not (isinstance(self.z_loss, int | float) and self.z_loss == 0):
            total = total + self.z_loss * (jnp.square(log_total_BT) * batch.loss_weights).sum()
        return self.with_router(Loss(total, count, metrics), model, out, share * jnp.sum(batch.segment_ids > 0))

    def with_router(self, loss: Loss, model: Transformer, out: Output, routed: Array) -> Loss:
        """Return `loss` with the router's losses and metrics added. `routed`: the factor of its mean losses."""
        if out.router is None:
            return loss
        moe = model.config.moe
        assert moe is not None
        balance = moe.load_balance if self.load_balance is None else self.load_balance
        z = moe.z_loss if self.router_z_loss is None else self.router_z_loss
        total = loss.total + routed * (balance * out.router.load_balance.sum() + z * out.router.z.sum())
        metrics = loss.metrics | {name: getattr(out.router, field).mean() for name, field in ROUTER_METRICS.items()}
        layers = jnp.stack([getattr(out.router, field) for field in ROUTER_METRICS.values()], 1)
        metrics |= {"expert_load": out.router.load_E, "expert_dropped": out.router.dropped, "router_layers": layers}
        return Loss(total, loss.count, metrics, out.router.load_E)


@dataclass(frozen=True, kw_only=True)
class NextToken(TokenObjective):
    """Predict each token from the preceding tokens of its document."""

    def __call__(self, trainable: Transformer, frozen: Frozen | None, batch: Batch, key: PRNGKeyArray | None) -> Loss:
        model = network(trainable, frozen)
        return self.loss(model, self.run(model, batch, key), batch)


@dataclass(frozen=True, kw_only=True)
class Masked(TokenObjective):
    """Predict masked tokens from both sides (Devlin et al. 2019, sec. 3.1).

    80 % of the chosen tokens become <mask>, 10 % become a random token, and 10 % stay.
    """

    rate: float  # share of the tokens that are chosen
    special: SpecialTokens
    ids: int  # size of the tokenizer's vocabulary, from which random tokens are drawn

    def __call__(self, trainable: Transformer, frozen: Frozen | None, batch: Batch, key: PRNGKeyArray) -> Loss:
        model, tokens_BT, segments_BT = network(trainable, frozen), batch.tokens, batch.segment_ids
        pick_key, kind_key, random_key, dropout_key = jax.random.split(key, 4)
        shape = tokens_BT.shape
        chosen_BT = (_as_rows(jax.random.uniform(pick_key, shape), tokens_BT) < self.rate) & (segments_BT > 0)
        kind_BT = _as_rows(jax.random.uniform(kind_key, shape), tokens_BT)
        random_BT = _as_rows(jax.random.randint(random_key, shape, first_text_id(self.special), self.ids), tokens_BT)
        noised_BT = jnp.where(kind_BT < 0.8, self.special.mask, jnp.where(kind_BT < 0.9, random_BT, tokens_BT))
        noised = replace(batch, tokens=jnp.where(chosen_BT, noised_BT, tokens_BT))
        out = self.run(model, noised, dropout_key)
        targets = replace(batch, targets=tokens_BT, loss_weights=chosen_BT.astype(jnp.float32))
        return self.loss(model, out, targets, self.rate)


@dataclass(frozen=True, kw_only=True)
class FillInMiddle(TokenObjective):
    """Predict the next tokens of rows, some rearranged so that the middle comes last (Bavarian et al. 2022)."""

    rate: float  # share of the rows that are rearranged
    spm_rate: float  # share of these in suffix-prefix-middle order
    special: SpecialTokens

    def __call__(self, trainable: Transformer, frozen: Frozen | None, batch: Batch, key: PRNGKeyArray) -> Loss:
        model = network(trainable, frozen)
        move_key, dropout_key = jax.random.split(key)
        moved_BW = rearrange_middle(*batch.window(), move_key, self.rate, self.spm_rate, self.special)
        batch = batch.with_window(moved_BW)
        return self.loss(model, self.run(model, batch, dropout_key), batch)


@dataclass(frozen=True, kw_only=True)
class PrefixLM(TokenObjective):
    """Predict the tokens after a prefix of uniformly drawn length, which attends in both directions (Raffel et al.
    2020, sec. 3.2.1).

    In a packed row, the prefix ends within one of the documents, and all documents before that are prefix.
    """

    def __call__(self, trainable: Transformer, frozen: Frozen | None, batch: Batch, key: PRNGKeyArray) -> Loss:
        model = network(trainable, frozen)
        cut_key, dropout_key = jax.random.split(key)
        B, T = batch.tokens.shape
        cut_B = _as_rows(jax.random.randint(cut_key, (B,), 0, T), batch.tokens)
        prefix_BT = jnp.arange(T) < cut_B[:, None]
        # The last token of the prefix predicts the first one after it.
        kept_BT = (jnp.arange(1, T + 1) >= cut_B[:, None]).astype(jnp.float32)
        batch = replace(batch, loss_weights=batch.loss_weights * kept_BT)
        return self.loss(model, self.run(model, batch, dropout_key, prefix_BT), batch, 0.5)


@dataclass(frozen=True, kw_only=True)
class Distillation(TokenObjective):
    """Match the predictions of a teacher, `frozen.teacher` (Hinton et al. 2015, sec. 2).

    The loss is (1 - mix) times the next-token loss, plus mix times temperature^2 times KL(teacher || student) of both
    softmaxes at `temperature`.
    """

    temperature: float | Array
    mix: float | Array

    def __call__(self, trainable: Transformer, frozen: Frozen | None, batch: Batch, key: PRNGKeyArray | None) -> Loss:
        assert frozen is not None and frozen.teacher is not None, "distillation needs a teacher"
        model = network(trainable, frozen)
        out = self.run(model, batch, key)
        taught = replace(self, dropout=False).run(frozen.teacher, batch, None)
        soft_BT = divergence(
            jax.lax.stop_gradient(logits(frozen.teacher, taught.hidden_BTD)),
            logits(model, out.hidden_BTD),
            self.temperature,
        )
        return self.loss(model, out, batch, soft_BT=soft_BT, mix=self.mix)


def divergence(
    teacher_BTV: Float[Array, "B T V"], student_BTV: Float[Array, "B T V"], temperature: float | Array
) -> Float[Array, "B T"]:
    """Return temperature^2 * KL(teacher || student) of the softmaxes of logits / temperature, in nats.

    The factor makes the size of the gradient independent of the temperature.
    """
    teacher, student = (jax.nn.log_softmax(x / temperature, axis=-1) for x in (teacher_BTV, student_BTV))
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum(-1)


def rearrange_middle(
    tokens_BW: Int[Array | np.ndarray, "B W"],
    segments_BW: Int[Array | np.ndarray, "B W"],
    key: PRNGKeyArray,
    rate: float | Array,
    spm_rate: float | Array,
    special: SpecialTokens,
) -> Int[Array | np.ndarray, "B W"]:
    """Return the rows, some of them rearranged so that the middle comes last (Bavarian et al. 2022, sec. 3).

    In a row chosen with probability `rate`, the longest segment is cut at two uniformly drawn places and becomes

        PSM: <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle <end>, or, with probability `spm_rate`,
        SPM: <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle <end> (the variant that shares prefixes)

    Its first token (<end>, which opens a document) stays first. Its last four tokens make room for the special tokens
    and for the <end> after the middle. Segments shorter than 8 tokens stay as they are.
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


def _rearrange(tokens_BW, segments_BW, row_B, kind_B, cut_B2, *, rate, spm_rate, special: SpecialTokens):
    """Return `rearrange_middle` for given draws, uniform in [0, 1)."""
    W = tokens_BW.shape[1]
    sizes_BW = (segments_BW[:, :, None] == jnp.arange(1, W + 1)).sum(1)
    segment_B, size_B = sizes_BW.argmax(1) + 1, sizes_BW.max(1)
    start_B = (segments_BW == segment_B[:, None]).argmax(1)
    length_B = size_B - 1 - 4  # tokens to move: without the first one and the last four
    cuts_B2 = jnp.sort((cut_B2 * (length_B[:, None] + 1)).astype(jnp.int32), axis=1)
    prefix_B, middle_B = cuts_B2[:, 0], cuts_B2[:, 1] - cuts_B2[:, 0]
    suffix_B = length_B - cuts_B2[:, 1]
    spm_B = kind_B < spm_rate

    # The start of each part, counted from the segment's second token. Its special tokens precede it.
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
    """Return the smallest id that text may have.

    It is above the special tokens of our tokenizers, and 0 for a published tokenizer, whose special tokens may have
    any ids.
    """
    return len(SPECIAL_PIECES) if special == OWN else 0


def make_objective(config: TrainConfig, ids: int, special: SpecialTokens = OWN) -> Objective:
    """Return the configured objective for a tokenizer with `ids` ids and these special tokens."""
    common: dict[str, Any] = {"z_loss": config.z_loss, "loss_chunk": config.loss_chunk}
    if config.objective == "masked":
        return Masked(rate=config.mask_rate, special=special, ids=ids, **common)
    if config.objective == "fill_in_middle":
        return FillInMiddle(rate=config.fim_rate, spm_rate=config.fim_spm_rate, special=special, **common)
    if config.objective == "distillation":
        return Distillation(temperature=config.distillation_temperature, mix=config.distillation_mix, **common)
    return PrefixLM(**common) if config.objective == "prefix" else NextToken(**common)


def scoring_objective(config: TrainConfig, ids: int, special: SpecialTokens = OWN) -> Objective:
    """Return the objective that scores held-out text, without dropout: the masked one, or next-token prediction."""
    if config.objective == "masked":
        return Masked(rate=config.mask_rate, special=special, ids=ids, dropout=False, loss_chunk=config.loss_chunk)
    return NextToken(dropout=False, loss_chunk=config.loss_chunk)


def _as_rows(x: Array, rows: Array | np.ndarray) -> Array:
    """Return `x` [B, ...] sharded over the devices like the `rows` of the batch."""
    if no_mesh():
        return x
    return jax.sharding.reshard(x, P(jax.typeof(rows).sharding.spec[0], *(None,) * (x.ndim - 1)))
