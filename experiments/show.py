"""What an experiment is, printed: config, parameters with shapes and shardings, FLOPs."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.table import Table

from model.cost import CONVENTION, abstract_model, count_parameters, train_flops_per_token
from model.weights import named_weights
from sharding.rules import MESH_AXES
from train.config import Experiment
from train.config_io import flatten
from train.progress import count


def print_experiment(experiment: Experiment, device_count: int | None, console: Console) -> None:
    """Prints the resolved config, the parameter table and the costs, for `device_count` devices (None: those here)."""
    devices = jax.device_count() if device_count is None else device_count
    config = Table("field", "value", box=None, pad_edge=False)
    for name, value in flatten(experiment).items():
        config.add_row(name, repr(value))
    console.print(config)

    sizes = experiment.mesh.sizes(devices)
    table = Table("parameter", "shape", "dtype", "sharding", "bytes per device", box=None, pad_edge=False)
    total = 0
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        model = abstract_model(experiment.model, experiment.sharding)
    for name, weight in named_weights(model):
        leaf: Any = weight.value  # a shape with its sharding
        per_device = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total += per_device
        spec = ", ".join(
            "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in leaf.sharding.spec
        )
        table.add_row(name.replace(".", "/"), str(leaf.shape), str(leaf.dtype), f"({spec})", f"{per_device:,}")
    console.print()
    console.print(table)

    counts = count_parameters(experiment.model)
    flops = train_flops_per_token(experiment.model, experiment.data.sequence_length)
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    mesh_told = (
        " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True) if size > 1) or "one device"
    )
    console.print(
        f"\nmesh: {mesh_told}; weights per device: {total:,} bytes"
        f"\nparameters: {counts.total:,} total, {counts.active:,} active per token, {counts.embedding:,} of the total "
        f"in embeddings and head"
        f"\ntraining FLOPs per token: {count(flops)} ({CONVENTION})"
        f"\na step: {tokens:,} tokens, {count(flops * tokens)}FLOP; the run: {count(tokens * experiment.train.steps)} "
        f"tokens",
        soft_wrap=True,
        highlight=False,
    )
