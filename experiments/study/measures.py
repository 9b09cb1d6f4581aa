"""Measures: evaluations of a trial's trained weights beyond bits per byte on the held-out text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.batch import Batch
from data.pipeline import heldout_windows
from data.prepare import Prepared, prepare
from data.tokenizer import SpecialTokens, special_tokens
from model.transformer import Transformer, forward, logits
from sharding.mesh import put_batch, use_mesh
from train.config import Experiment
from train.config_io import replace_fields
from train.evaluate import evaluate
from train.objectives import token_losses
from train.program import Network, build, build_network, initial_state


class Trained(NamedTuple):
    """What a measure looks at."""

    network: Network
    model: Transformer
    prepared: Prepared
    log: Callable[[str], None]


Measure = Callable[[Trained], Mapping[str, float]]  # returns figures by name


@dataclass(frozen=True)
class HeldOutUnder:
    """Bits per byte of the held-out text under changed fields, such as longer windows or a scaled RoPE.

    The weights stay as they are. The figure has the name of `name`.
    """

    name: str
    changes: Mapping[str, object]
    windows: int = 256

    def __call__(self, trained: Trained) -> Mapping[str, float]:
        experiment = replace_fields(trained.network.experiment, self.changes)
        return {self.name: held_out_bits(trained, experiment, self.windows)}


def held_out_bits(trained: Trained, experiment: Experiment, windows: int | None = None) -> float:
    """Return bits per byte of the first held-out set under `experiment`, with the trained weights."""
    network = build_network(experiment, trained.network.mesh)
    prepared = trained.prepared
    if experiment.data.sequence_length != prepared.sequence_length:
        prepared = prepare(experiment.data, trained.log)
    model = replace_config(trained.model, network.abstract_model)
    with use_mesh(network.mesh):
        found = evaluate(
            network.score, model, prepared, prepared.heldout_names[0], batch_size=experiment.data.batch_size,
            stride=experiment.train.eval_stride, max_windows=windows, mesh=network.mesh, spec=network.batch_spec,
        )  # fmt: skip
    return found.bits_per_byte


def replace_config(model: Transformer, like: Transformer) -> Transformer:
    """Return the weights of `model` in the network `like`, which differs in its config alone."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))


@dataclass(frozen=True)
class LogPartition:
    """Root mean square of log Z, the logsumexp of the logits, over held-out tokens: `log_z`."""

    windows: int = 64

    def __call__(self, trained: Trained) -> Mapping[str, float]:
        network, size = trained.network, trained.network.experiment.data.batch_size

        @jax.jit
        def sums(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
            out = forward(model, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
            log_z_BT = token_losses(model, out.hidden_BTD, batch.targets)[1]
            return (jnp.square(log_z_BT) * batch.loss_weights).sum(), batch.loss_weights.sum()

        with use_mesh(network.mesh):
            found = [
                sums(trained.model, put_batch(batch, network.mesh, network.batch_spec))
                for batch in _windows(trained, size, self.windows)
            ]
        total, tokens = np.sum(np.asarray(found, np.float64), axis=0)
        return {"log_z": float(np.sqrt(total / tokens))}


@dataclass(frozen=True)
class Movement:
    """How far training moved the network: root mean squares over held-out tokens.

    `initial_logits`: of the logits before training; `hidden_change`, `logits_change`: of the changes of the final
    hidden states and logits.
    """

    windows: int = 16

    def __call__(self, trained: Trained) -> Mapping[str, float]:
        network, size = trained.network, trained.network.experiment.data.batch_size
        program = build(network.experiment, network.mesh)

        @jax.jit
        def squares(before: Transformer, after: Transformer, batch: Batch) -> list[jax.Array]:
            hidden, predictions = zip(*(_predict(model, batch) for model in (before, after)), strict=True)
            sizes = (predictions[0], hidden[1] - hidden[0], predictions[1] - predictions[0])
            return [jnp.square(x).mean() for x in sizes]

        with use_mesh(network.mesh):
            before = initial_state(program).model
            found = [
                squares(before, trained.model, put_batch(batch, network.mesh, network.batch_spec))
                for batch in _windows(trained, size, self.windows)
            ]
        sizes = np.sqrt(np.mean(np.asarray(found, np.float64), axis=0))
        return dict(zip(("initial_logits", "hidden_change", "logits_change"), map(float, sizes), strict=True))


def _predict(model: Transformer, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the final hidden states and the logits."""
    out = forward(model, batch.tokens, positions_BT=batch.positions, segment_ids_BT=batch.segment_ids)
    return out.hidden_BTD, logits(model, out.hidden_BTD)


@dataclass(frozen=True)
class Infilling:
    """Nats per token of the middles of held-out windows: after the text before, and after the text on both sides.

    `middle_nats` predicts a middle from left to right; `infill_nats` predicts it behind <fim_prefix> prefix
    <fim_suffix> suffix <fim_middle> (Bavarian et al. 2022, sec. 3). Middles are an eighth to a half of a window.
    """

    windows: int = 256

    def __call__(self, trained: Trained) -> Mapping[str, float]:
        network, size = trained.network, trained.network.experiment.data.batch_size
        special = special_tokens(network.experiment.data.tokenizer)
        draw = np.random.default_rng(0)
        totals = {"middle_nats": np.zeros(2), "infill_nats": np.zeros(2)}
        with use_mesh(network.mesh):
            for batch in _windows(trained, size, self.windows):
                whole = batch.segment_ids.min(axis=1) == batch.segment_ids.max(axis=1)
                rows = batch.tokens[whole & (batch.segment_ids[:, 0] > 0)]
                for name, rearranged in zip(totals, infilling_rows(rows, size, special, draw), strict=True):
                    score = network.score(trained.model, put_batch(rearranged, network.mesh, network.batch_spec))
                    totals[name] += [float(score.loss), float(score.tokens)]
        return {name: loss / tokens for name, (loss, tokens) in totals.items()}


def infilling_rows(
    tokens_BT: np.ndarray, rows: int, special: SpecialTokens, draw: np.random.Generator
) -> tuple[Batch, Batch]:
    """Return two batches of `rows` rows that score the same middles: in order, and after prefix and suffix.

    `tokens_BT`: int32, at most `rows` windows of one document each. The last four tokens of a window make room for the
    three special tokens and are not used.
    """
    width = tokens_BT.shape[1]
    plain, moved = np.zeros((2, rows, width + 1), np.int32)
    plain_weights, moved_weights = np.zeros((2, rows, width), np.float32)
    segments = np.zeros((rows, width + 1), np.int32)
    for row, text in enumerate(tokens_BT[:, : width - 4]):
        length = draw.integers(width // 8, width // 2)
        start = draw.integers(1, len(text) - length)
        prefix, middle, suffix = text[:start], text[start : start + length], text[start + length :]
        marked = [prefix[0], special.fim_prefix, *prefix[1:], special.fim_suffix, *suffix, special.fim_middle, *middle]
        plain[row, : len(text)], moved[row, : len(marked)] = text, marked
        segments[row] = 1
        plain_weights[row, start - 1 : start - 1 + length] = 1
        moved_weights[row, len(marked) - length - 1 : len(marked) - 1] = 1
    return (
        Batch.of_windows(plain, segments, plain_weights),
        Batch.of_windows(moved, segments, moved_weights),
    )


def _windows(trained: Trained, batch_size: int, windows: int) -> Iterator[Batch]:
    """Return batches of the first held-out set."""
    prepared = trained.prepared
    return heldout_windows(prepared, prepared.heldout_names[0], batch_size=batch_size, max_windows=windows)
