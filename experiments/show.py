"""What an experiment is, printed: config, parameters with shapes and shardings, FLOPs."""

from __future__ import annotations

import dataclasses
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


def print_experiment(
    experiment: Experiment, device_count: int | None, console: Console, *, every_field: bool = False
) -> None:
    """Print the resolved config, the parameter table and the costs, for `device_count` devices (None: those here). Of
    the config only what differs from the defaults, unless `every_field`."""
    devices = jax.device_count() if device_count is None else device_count
    fields = flatten(experiment) if every_field else differing(experiment)
    table = Table("field", "value", box=None, pad_edge=False)
    for name, value in fields.items():
        table.add_row(name, repr(value))
    console.print(table)
    if not every_field:
        console.print(f"({len(flatten(experiment)) - len(fields)} more fields have their defaults; --all prints them)")
    _print_network(experiment, devices, console)


def differing(config: Any, default: Any = None, prefix: str = "") -> dict[str, Any]:
    """Return by dotted name each field of a config that differs from `default` (None: its class without arguments). A
    part that the default lacks is compared with its own class's defaults, and named alone where it equals them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        usual = getattr(default, field.name) if default is not None else _default_of(field)
        if dataclasses.is_dataclass(value):
            found |= differing(value, usual, f"{name}.") or ({} if value == usual else {name: value})
        elif value != usual:
            found |= flatten(value, name)
    return found


def _default_of(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _print_network(experiment: Experiment, devices: int, console: Console) -> None:
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
    shape = (
        " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True) if size > 1) or "one device"
    )
    console.print(
        f"\nmesh: {shape}; weights per device: {total:,} bytes"
        f"\nparameters: {counts.total:,} total, {counts.active:,} active per token, {counts.embedding:,} of the total "
        f"in embeddings and head"
        f"\ntraining FLOPs per token: {count(flops)} ({CONVENTION})"
        f"\na step: {tokens:,} tokens, {count(flops * tokens)}FLOP; the run: {count(tokens * experiment.train.steps)} "
        f"tokens",
        soft_wrap=True,
        highlight=False,
    )
