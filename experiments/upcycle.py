"""Upcycling of a dense run to a new run with experts, whose checkpoint at step 0 holds the dense run's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp

from data.batch import Batch
from data.pipeline import heldout_windows, train_batches
from data.prepare import Prepared
from experiments.memory import memory_here
from experiments.resolve import resolve_from
from experiments.run import open_trained, prepare_data
from interop.save import staged
from model.config import MoEConfig
from model.cost import CONVENTION, count_parameters, train_flops_per_token
from model.transformer import Transformer, forward, logits
from model.upcycle import check, upcycle
from sharding.mesh import put_batch, use_mesh
from train.checkpoint import Checkpointer, CheckpointError
from train.config import Experiment
from train.config_io import ConfigError
from train.frozen import keep_frozen
from train.program import Weights, build
from train.records import (
    MetricsWriter,
    RunFolder,
    RunFolderError,
    describe_environment,
    open_run,
    write_environment,
)
from train.step import TrainState

TOLERANCE = 1e-5  # relative to the largest logit; float32 rounding gives 1e-6


def with_experts(dense: Experiment, overrides: Sequence[str]) -> Experiment:
    """Return the dense run's experiment with experts as wide as its MLP, and then `overrides`.

    Raises ValueError that names the field.
    """
    if dense.model.moe is not None:
        raise ConfigError(f"run of {dense.name!r}: its model already has experts; upcycling starts from a dense run")
    if dense.train.teacher:
        raise ConfigError(
            f"run of {dense.name!r}: its objective has a teacher, which an upcycled run cannot use; upcycle a "
            "run with another objective"
        )
    base = replace(
        dense,
        question=f"What does {dense.name} gain when its MLPs become experts?",
        source="Komatsuzaki et al. 2022; He et al. 2024",
        cost="",
        model=replace(dense.model, moe=MoEConfig(hidden_dim=dense.model.mlp.hidden_dim)),
    )
    experiment = resolve_from(base, overrides, memory=memory_here)
    check(dense.model, experiment.model)
    return experiment


def upcycle_run(
    run: RunFolder,
    dense: Experiment,
    experiment: Experiment,
    path: Path,
    *,
    overrides: Sequence[str],
    step: int | None = None,
    log: Callable[[str], None] = print,
) -> float:
    """Write the run folder `path` of `experiment` (from `with_experts`) with the weights of `run`.

    `dense` is the experiment of `run`. Its weights at `step` (default: the newest; their average if it keeps one)
    become experts, with a new optimizer and the data from the start. The new run is read back, and the largest
    difference of its logits from those of the dense run is logged and returned.

    The folder appears atomically. Raises RunFolderError if `path` exists, and CheckpointError if `run` cannot be read
    or the logits differ.
    """
    if path.exists():
        raise RunFolderError(f"run folder {path} exists already; choose another name with --run, or delete it")
    prepared = prepare_data(experiment, log)
    # Load the dense run on the new run's mesh, to compare both there.
    dense = replace(dense, mesh=experiment.mesh, sharding=experiment.sharding)
    _, trained = open_trained(run, dense, prepared.tokenizer, step)
    origin = {"run": str(run.path), "step": trained.step, "name": dense.name}

    with staged(path) as partial, open_run(partial, experiment, overrides=overrides) as new:
        write_environment(new, describe_environment())
        prepared.tokenizer.save(new.tokenizer)
        _write(experiment, trained, prepared, new, origin, log)
        difference = _compare(experiment, dense, run, trained.step, new, prepared, log)
    log(f"{path} is ready: python -m experiments train {experiment.name} --resume {path}")
    return difference


def _write(
    experiment: Experiment,
    trained: Weights,
    prepared: Prepared,
    new: RunFolder,
    origin: dict,
    log: Callable[[str], None],
) -> None:
    """Write the checkpoint at step 0, and the event that the report reads."""
    moe, mlp, counts = experiment.model.moe, experiment.model.mlp, count_parameters(experiment.model)
    assert moe is not None
    shards = mlp.hidden_dim // moe.hidden_dim
    summary = (
        f"{counts.total:,} parameters ({counts.active:,} active per token) from {origin['run']} at step "
        f"{origin['step']}: {moe.num_experts} experts, each {'a copy' if shards == 1 else f'1/{shards}'} of its "
        "layer's MLP"
    )
    log(summary)
    with Checkpointer(str(new.checkpoints), log=log) as checkpoints, MetricsWriter(new) as metrics:
        with train_batches(prepared, experiment.data) as batches:
            position = batches.get_state()
        metadata = {
            "data": {**position, "step": 0},
            "tokenizer": prepared.tokenizer.identity,
            "seconds": 0.0,
            "upcycled_from": origin,
        }
        state = _state(experiment, trained.model)
        if state.frozen is not None:
            metadata["frozen"] = keep_frozen(new.frozen, state.frozen, log)
        if not checkpoints.save(0, state._replace(frozen=None), metadata=metadata, wait=True):
            raise CheckpointError(
                f"{new.path}: the checkpoint was not written (the warning above says why); free the disk"
            )
        metrics.write({
            "kind": "event", "step": 0, "event": "started", "message": f"upcycled: {summary}", "upcycled_from": origin,
            "parameters_total": counts.total, "parameters_active": counts.active,
            "flops_per_token": train_flops_per_token(experiment.model, experiment.data.sequence_length),
            "mfu_convention": f"FLOPs {CONVENTION}",
        })  # fmt: skip


def _state(experiment: Experiment, dense: Transformer) -> TrainState:
    """Return the state before the first step, on the experiment's mesh, with the weights of the dense network."""
    program = build(experiment)

    def make(dense: Transformer) -> TrainState:
        router_key, _ = jax.random.split(jax.random.key(experiment.train.seed))
        return program.begin(upcycle(dense, experiment.model, router_key, experiment.sharding))

    with use_mesh(program.mesh):
        return jax.jit(make)(dense)


def _compare(
    experiment: Experiment, dense: Experiment, old: RunFolder, step: int, new: RunFolder, prepared: Prepared,
    log: Callable[[str], None],
) -> float:  # fmt: skip
    """Return the largest difference of the logits of both runs' checkpoints, in float32, on held-out windows."""

    def load(run: RunFolder, experiment: Experiment, step: int):
        exact = replace(experiment, model=replace(experiment.model, dtype="float32"))
        return open_trained(run, exact, prepared.tokenizer, step)

    program, sparse = load(new, experiment, 0)
    _, before = load(old, dense, step)

    @jax.jit
    def differences(models: tuple[Transformer, Transformer], batch: Batch) -> tuple[jax.Array, jax.Array]:
        given = {"positions_BT": batch.positions, "segment_ids_BT": batch.segment_ids}
        first, second = (logits(model, forward(model, batch.tokens, **given).hidden_BTD) for model in models)
        valid = batch.segment_ids[..., None] > 0
        return jnp.where(valid, abs(first - second), 0.0).max(), jnp.where(valid, abs(first), 0.0).max()

    mesh = program.mesh
    rows = max(experiment.sharding.batch_slices(mesh), 2)
    batch, what = _windows(experiment, prepared, rows)
    with use_mesh(mesh), jax.default_matmul_precision("highest"):
        difference, largest = map(
            float, differences((before.model, sparse.model), put_batch(batch, mesh, program.batch_spec))
        )
    log(
        f"largest difference of the logits from the dense run's, {rows} {what} windows: {difference:.1e} (logits up to "
        f"{largest:.3g})"
    )
    if not difference <= TOLERANCE * max(1.0, largest):
        raise CheckpointError(
            f"upcycled logits differ from those of {old.path} by {difference:.3g}, but rounding explains only "
            f"{TOLERANCE * max(1.0, largest):.1g}: nothing was kept; please report this with the two configs"
        )
    return difference


def _windows(experiment: Experiment, prepared: Prepared, rows: int) -> tuple[Batch, str]:
    """Return (the windows to compare on, their description): held-out ones or, without any, the first of training."""
    if prepared.heldout_names:
        windows = heldout_windows(prepared, prepared.heldout_names[0], batch_size=rows, max_windows=rows)
        return next(iter(windows)), "held-out"
    with train_batches(prepared, replace(experiment.data, batch_size=rows)) as batches:
        return batches.batch_at(0), "training"
