"""Frozen layers stay bit-identical, need no moments and no backward pass, and are saved and restored with the run."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from data.config import DataConfig
from data.prepare import prepare
from model.config import MoEConfig
from model.transformer import forward
from model.weights import named_weights
from tests.data.conftest import byte_config, write_corpus
from tests.models import random_model, tiny_config
from tests.train.batches import packed_batch
from tests.train.small_runs import StopAt, bits, experiment, run, train_rows
from train.checkpoint import Checkpointer, CheckpointError
from train.config import Experiment, OptimizerConfig, SampleConfig, TrainConfig
from train.frozen import keep_frozen, network, read_frozen, rejoin, train_last
from train.program import Program, build, build_network, load_weights
from train.step import TrainState

VOCAB, ROWS, WIDTH, LAYERS = 64, 8, 17, 8
DENSE = tiny_config(num_layers=LAYERS, scan_unroll=0)  # unrolled: the compiler counts a loop's body once
EXPERTS = replace(
    DENSE,
    num_layers=4,
    moe=MoEConfig(num_experts=4, top_k=2, hidden_dim=16, layers=("dense", "moe"), weights="sigmoid", bias_rate=0.01),
)


def program_of(model, layers: int | None) -> Program:
    config = Experiment(
        name="frozen",
        model=model,
        data=DataConfig(sequence_length=WIDTH - 1, batch_size=ROWS),
        optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=0, decay="all"),
        train=TrainConfig(steps=20, ema_decay=0.9, trainable_layers=layers),
        samples=SampleConfig(count=0),
    )
    config.validate(1)
    return build(config, devices=jax.devices()[:1])


def start(program: Program) -> TrainState:
    return jax.jit(program.begin)(random_model(program.experiment.model))


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("model", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_twenty_steps_leave_the_frozen_weights_bit_identical(model):
    program = program_of(model, model.num_layers // 4)
    state, step = start(program), jax.jit(program.step, donate_argnums=0)
    before, frozen = bits(state.model), bits(state.frozen)
    losses = []
    for i in range(20):
        state, metrics = step(state, packed_batch(i % 2, ROWS, WIDTH, VOCAB), program.hyper)
        losses.append(float(metrics["loss"]))
    assert bits(state.frozen) == frozen
    assert all(a != b for a, b in zip(bits(state.model), before, strict=True)), "every trained weight changes"
    assert losses[-1] < losses[0]


def test_only_the_trained_part_has_moments_and_an_average():
    whole, part = (start(program_of(DENSE, layers)) for layers in (None, LAYERS // 4))
    trained = {name for name, w in named_weights(part.model) if w.value is not None}
    assert {name.split(".")[0] for name in trained} == {"stacks", "final_norm", "head"}
    assert size(part.model) + size(part.frozen) == size(whole.model)
    counts = 8  # bytes of the two int32 counters of updates
    for state in (whole, part):
        assert size(state.optimizer) == 2 * size(state.model) + counts and size(state.ema) == size(state.model)
    print(f"optimizer state: {size(part.optimizer):,} bytes of {size(whole.optimizer):,}")
    assert size(part.optimizer) < 0.3 * size(whole.optimizer)


def test_the_backward_pass_stops_below_the_trained_layers():
    """Training 2 of 8 layers: with 1 unit per forward and 2 per backward pass of a layer, 24 units become 12."""
    flops = []
    for layers in (None, LAYERS // 4):
        program = program_of(DENSE, layers)
        shapes = program.abstract_state, packed_batch(0, ROWS, WIDTH, VOCAB), program.hyper
        cost = jax.jit(program.step).lower(*shapes).compile().cost_analysis()
        flops.append(cost["flops"])
    print(f"FLOPs of a step: {flops[1]:,.0f} of {flops[0]:,.0f}")
    assert flops[1] < 0.6 * flops[0]


@pytest.mark.parametrize("layers", range(1, 5))
def test_a_split_network_computes_the_same_and_can_be_rejoined(layers):
    model = random_model(EXPERTS)
    trainable, frozen = train_last(model, layers)
    assert frozen is not None
    tokens = packed_batch(0, 2, WIDTH, VOCAB).tokens
    cut = network(trainable, frozen)
    hidden = jax.jit(lambda model: forward(model, tokens).hidden_BTD)
    np.testing.assert_allclose(hidden(cut), hidden(model), rtol=1e-5, atol=1e-5)
    joined = rejoin(cut)
    assert jax.tree.structure(joined) == jax.tree.structure(model) and bits(joined) == bits(model)


def test_a_tied_embedding_stays_frozen():
    trainable, frozen = train_last(random_model(replace(DENSE, tied_embeddings=True)), 1)
    assert trainable.embedding.value is None and frozen.model.embedding.value is not None


# ---------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("frozen")
    data = byte_config(root, write_corpus(root / "large", 12))
    return data, prepare(data)


@pytest.fixture(scope="module")
def program(prepared):
    return build(experiment(prepared[0], trainable_layers=1, eval_every=0), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def undisturbed(program, prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, run(program, prepared[1], folder)


def test_frozen_weights_are_saved_once_and_a_resumed_run_is_the_same(program, prepared, undisturbed, tmp_path):
    folder, trained = undisturbed
    assert [path.name for path in (folder / "frozen").iterdir()] == ["0"]
    saved = size(trained.state._replace(frozen=None, key=None))
    for step in (folder / "checkpoints").iterdir():
        leaves = json.loads((step / "commit.json").read_text())["body"]["leaves"]
        stored = [leaf for name, leaf in leaves.items() if name != "key"]
        bytes_ = sum(math.prod(leaf["shape"]) * np.dtype(leaf["dtype"]).itemsize for leaf in stored)
        assert bytes_ == saved, "a step holds only the trained part"
    with StopAt(4) as stop:
        run(program, prepared[1], tmp_path, stop=stop)
    resumed = run(program, prepared[1], tmp_path)
    assert bits(resumed.state) == bits(trained.state) and train_rows(tmp_path) == train_rows(folder)


def test_weights_are_read_back_whole_without_an_optimizer(program, prepared, undisturbed):
    folder, trained = undisturbed
    lone = build_network(program.experiment, devices=jax.devices()[:1])
    with Checkpointer(str(folder / "checkpoints"), read_only=True) as checkpoints:
        weights = load_weights(lone, checkpoints, prepared[1].tokenizer, frozen=folder / "frozen")
    assert weights.finished and jax.tree.structure(weights.model) == jax.tree.structure(lone.abstract_model)
    assert bits(weights.model) == bits(rejoin(trained.model))


def test_changed_frozen_weights_are_refused(program, prepared, undisturbed, tmp_path):
    with StopAt(2) as stop:
        run(program, prepared[1], tmp_path, stop=stop)
    state = jax.jit(program.make_state)()
    other = jax.tree.map(lambda w: w + 1e-3, state.frozen)
    (tmp_path / "frozen").rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match="is missing"):
        run(program, prepared[1], tmp_path)
    keep_frozen(tmp_path / "frozen", other, print)
    with pytest.raises(CheckpointError, match="the frozen weights changed"):
        run(program, prepared[1], tmp_path)


def test_frozen_weights_of_a_start_that_died_before_its_first_checkpoint_are_set_aside(program, tmp_path):
    """The folder then holds the weights of the new start, which may have another seed."""
    state = jax.jit(program.make_state)()
    other = jax.tree.map(lambda w: w + 1e-3, state.frozen)
    messages: list[str] = []
    first, again = (keep_frozen(tmp_path / "frozen", other, messages.append) for _ in range(2))
    assert first == again and messages == []
    name = keep_frozen(tmp_path / "frozen", state.frozen, messages.append)
    assert name != first and "earlier start" in messages[0]
    found = read_frozen(tmp_path / "frozen", program.abstract_state.frozen, name, print)
    assert bits(found) == bits(state.frozen)
    (aside,) = tmp_path.glob("frozen.*")
    assert read_frozen(aside, program.abstract_state.frozen, first, print) is not None


def test_an_impossible_number_of_layers_is_refused():
    with pytest.raises(ValueError, match=r"train.trainable_layers = 9: must be between 1 and model.num_layers = 8"):
        program_of(DENSE, 9)
