"""Prints an experiment: its config, its parameters with shapes and shardings, and its FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType
from rich.console import Console
from rich.text import Text

from experiments.differences import differing, written
from experiments.terminal import Column, Line, print_table
from model.cost import CONVENTION, abstract_model, count_parameters, train_flops_per_token
from model.weights import named_weights
from sharding.config import MESH_AXES
from train.config import Experiment
from train.config_io import ABSENT, flatten
from train.progress import count

PARAMETER_COLUMNS = (
    Column("parameter", style="cyan"),
    Column("shape"),
    Column("dtype", drop=1),
    Column("sharding", fold=True, drop=2),
    Column("parameters", number=True),
    Column("bytes/device", number=True),
)


class Parameter(NamedTuple):
    name: str  # module/.../weight
    shape: tuple[int, ...]
    dtype: str
    sharding: str
    size: int
    bytes_per_device: int

    @property
    def module(self) -> str:
        """Return the name without its last part; a weight outside of modules counts as a module."""
        return self.name.rpartition("/")[0] or self.name


def print_experiment(
    experiment: Experiment, device_count: int | None, console: Console, *, every_field: bool = False
) -> None:
    """Print the config, the parameters by module with totals, and the costs, for `device_count` devices (None: those
    here). The config's fields are those that differ from the defaults, or with `every_field` all."""
    devices = jax.device_count() if device_count is None else device_count
    _print_config(experiment, console, every_field)
    sizes = experiment.mesh.sizes(devices)
    parameters = list(_parameters(experiment, sizes))
    _text(console, "")
    print_table(console, PARAMETER_COLUMNS, _by_module(parameters))
    _print_costs(experiment, sizes, sum(each.bytes_per_device for each in parameters), console)


def _print_config(experiment: Experiment, console: Console, every_field: bool) -> None:
    different, fields = differing(experiment), flatten(experiment)
    if every_field:
        lines = [
            Line((name, written(value)), style="bold" if name in different else "") for name, value in fields.items()
        ]
        print_table(console, (Column("field", style="cyan"), Column("value", fold=True)), lines)
        return
    columns = (Column("field", style="cyan"), Column("value", fold=True), Column("default", fold=True, style="dim"))
    lines = [
        Line((name, written(each.value), "" if each.default is ABSENT else written(each.default)))
        for name, each in different.items()
    ]
    print_table(console, columns, lines)
    same = sum(not any(name == each or name.startswith(f"{each}.") for each in different) for name in fields)
    _text(console, f"({same} more fields have their defaults; --all prints every field)")


def _parameters(experiment: Experiment, sizes: tuple[int, ...]) -> Iterator[Parameter]:
    """Yield every parameter of the network as it lies on a mesh of these sizes."""
    mesh = AbstractMesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        model = abstract_model(experiment.model, experiment.sharding)
    for name, weight in named_weights(model):
        leaf: Any = weight.value  # a shape with its sharding
        spec = ", ".join(
            "-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in leaf.sharding.spec
        )
        per_device = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        yield Parameter(
            name.replace(".", "/"), leaf.shape, str(leaf.dtype), f"({spec})", math.prod(leaf.shape), per_device
        )


def _by_module(parameters: list[Parameter]) -> list[Line]:
    """Return a line for each parameter, after a line with its module's totals, and a last line with all totals."""
    modules: dict[str, list[Parameter]] = {}
    for each in parameters:
        modules.setdefault(each.module, []).append(each)

    def total(name: str, members: list[Parameter]) -> Line:
        size, held = sum(each.size for each in members), sum(each.bytes_per_device for each in members)
        return Line((name, "", "", "", f"{size:,}", f"{held:,}"), style="bold")

    lines = []
    for module, members in modules.items():
        alone = members[0].name == module
        if not alone:
            lines.append(total(module, members))
        for each in members:
            cells = (
                each.name, str(each.shape), each.dtype, each.sharding, f"{each.size:,}", f"{each.bytes_per_device:,}",
            )  # fmt: skip
            lines.append(Line(cells, short="" if alone else f"  {each.name.rpartition('/')[2]}"))
    return [*lines, total("total", parameters)]


def _print_costs(experiment: Experiment, sizes: tuple[int, ...], weights: int, console: Console) -> None:
    counts = count_parameters(experiment.model)
    flops = train_flops_per_token(experiment.model, experiment.data.sequence_length)
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    shape = (
        " x ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True) if size > 1) or "one device"
    )
    _text(
        console,
        f"\nmesh: {shape}; weights per device: {weights:,} bytes"
        f"\nparameters: {counts.total:,} total, {counts.active:,} active per token, {counts.embedding:,} of the total "
        f"in embeddings and head"
        f"\ntraining FLOPs per token: {count(flops)} ({CONVENTION})"
        f"\na step: {tokens:,} tokens, {count(flops * tokens)}FLOP; the run: {count(tokens * experiment.train.steps)} "
        f"tokens",
    )


def _text(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=not console.is_terminal)
