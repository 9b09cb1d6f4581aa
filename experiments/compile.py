"""Ahead-of-time compilation of a train step for TPUs you don't have, with its memory use and traffic per device.

The TPU compiler (`pip install libtpu`) runs on any machine. It compiles the whole step (forward, backward, clipping and
update) for a topology such as v5p:4x4x4, rejects a step that does not fit into memory, and reports the memory use and
the collectives of each device. It cannot report how fast the step runs; that takes a pod.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from rich.console import Console
from rich.table import Table

from data.batch import Batch
from experiments.memory import Memory as DeviceMemory
from model.cost import CONVENTION, count_parameters, train_flops_per_token
from pallas_kernels.ahead_of_time import devices_of, uncached
from sharding.collectives import Traffic, read_collectives
from sharding.mesh import create_mesh, use_mesh
from sharding.peak import peak_flops
from train.config import Experiment
from train.config_io import ConfigError
from train.program import Program, build
from train.progress import count

# Bytes of a JAX device's memory that the compiler lets a program use, read from its error messages (libtpu 0.0.52). A
# v4 or 7x chip has two JAX devices. The data sheets (32, 16, 95, 32 and 192 GB per chip) include memory that the system
# reserves.
AVAILABLE = {
    name: int(gibibytes * 2**30)
    for name, gibibytes in {
        "TPU v4": 15.25,
        "TPU v5 lite": 15.75,
        "TPU v5": 95.73,
        "TPU v6 lite": 31.24,
        "TPU7x": 94.74,
    }.items()
}
LARGEST = 12  # buffers to report


class DoesNotFit(ConfigError):
    """The step needs more memory than a device has, so the compiler rejected it."""


@dataclass(frozen=True)
class Memory:
    """Memory use of a program in bytes per device."""

    arguments: int  # train state and batch
    in_place: int  # results that reuse the memory of an argument
    results: int  # all results, including those in place
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.results - self.in_place + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """A compiled train step. Figures are for one device and one step unless stated otherwise."""

    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]  # axes with more than one device
    parameters: int  # of the whole network
    tokens: int  # of the whole step
    memory: Memory
    available: int | None  # bytes that the compiler lets a program use; None: unknown
    buffers: tuple[str, ...]  # the largest temporaries: size, and the arrays that share it
    traffic: Traffic
    flops: float  # by the convention of model.cost
    peak: float | None  # FLOP/s
    peak_source: str
    seconds_to_compile: float

    def to_json(self) -> dict:
        """Return the figures as JSON values, in bytes and seconds."""
        kinds = {
            kind: {"count": n, "output_bytes": out, "bytes_sent": round(sent)}
            for kind, (n, out, sent) in self.traffic.by_kind().items()
        }
        keys = ("topology", "device_kind", "devices", "mesh", "parameters", "tokens", "available", "flops", "buffers")
        return {
            **{key: getattr(self, key) for key in keys},
            "seconds_to_compile": round(self.seconds_to_compile, 1),
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "collectives": kinds,
            "output_bytes": self.traffic.output_bytes,
            "output_bytes_at_most": self.traffic.most,
            "output_bytes_of_a_round_of_open_loops": self.traffic.a_round,
            "bytes_sent": round(self.traffic.sent),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
        }


def topology_devices(topology: str) -> list[jax.Device]:
    """Return the devices of a topology. Raises ConfigError if it is unknown or no compiler is installed."""
    try:
        return devices_of(topology)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology: {error}") from error


def memory_of(device: jax.Device) -> DeviceMemory | None:
    """Return the memory of a device that the compiler lets a program use, or None for a kind not in `AVAILABLE`."""
    size = AVAILABLE.get(device.device_kind)
    return None if size is None else DeviceMemory(size, f"the compiler gives a program on a {device.device_kind}")


def compile_step(experiment: Experiment, topology: str) -> Compiled:
    """Compile the train step of an experiment, resolved for the devices of the topology.

    The dtype 'auto' becomes bfloat16, as on a TPU. Raises ConfigError if the step cannot be compiled, and DoesNotFit,
    a subclass, if it needs more memory than a device has.
    """
    devices = topology_devices(topology)
    if experiment.model.dtype == "auto":  # would choose by the backend of this machine
        experiment = replace(experiment, model=replace(experiment.model, dtype="bfloat16"))
    mesh = create_mesh(experiment.mesh.sizes(len(devices)), devices)
    device = mesh.devices.flat[0]
    start = time.monotonic()
    program = build(experiment, mesh)
    with tempfile.TemporaryDirectory() as folder:
        try:
            executable = _compile(program, mesh, folder)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise DoesNotFit(_refusal(str(error), topology)) from error
        # Read the dumps, because JAX fails to print a compiled program that uses a TPU's SparseCores.
        text = _dumped(folder, "after_optimizations.txt")
        buffers = _largest(_dumped(folder, "after_optimizations-memory-usage-report.txt"))
    m = executable.memory_analysis()
    assert m is not None, "the TPU compiler reports memory use"
    memory = Memory(
        m.argument_size_in_bytes, m.alias_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes,
        m.generated_code_size_in_bytes,
    )  # fmt: skip
    tokens = experiment.data.batch_size * experiment.data.sequence_length
    return Compiled(
        topology, device.device_kind, mesh.devices.size,
        {axis: size for axis, size in mesh.shape.items() if size > 1},
        count_parameters(experiment.model).total, tokens, memory, AVAILABLE.get(device.device_kind), buffers,
        read_collectives(text),
        train_flops_per_token(experiment.model, experiment.data.sequence_length) * tokens / mesh.devices.size,
        *_peak(device), time.monotonic() - start,
    )  # fmt: skip


def _compile(program: Program, mesh: Mesh, folder: str) -> jax.stages.Compiled:
    data = program.experiment.data
    rows = NamedSharding(mesh, program.batch_spec)
    ids, weights = (
        jax.ShapeDtypeStruct((data.batch_size, data.sequence_length), dtype, sharding=rows)
        for dtype in (jnp.int32, jnp.float32)
    )
    batch = Batch(ids, ids, loss_weights=weights, positions=ids, segment_ids=ids)
    with use_mesh(mesh), uncached():
        traced = jax.jit(program.step, donate_argnums=0).trace(program.abstract_state, batch, program.hyper)
        lowered = traced.lower(lowering_platforms=("tpu",))
        return lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})


def _dumped(folder: str, ending: str) -> str:
    """Return the largest dump with this ending, which is that of the train step; other programs are small."""
    found = sorted(Path(folder).glob(f"*.{ending}"), key=lambda path: path.stat().st_size)
    return found[-1].read_text() if found else ""


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _peak(device: jax.Device) -> tuple[float | None, str]:
    peak, source = peak_flops(device)
    # Topologies of v4 have one device for each of the two cores of a chip.
    half = device.device_kind == "TPU v4" and device.num_cores == 1
    return (peak / 2, f"half of the {source}") if half and peak else (peak, source)


def _largest(report: str) -> tuple[str, ...]:
    """Return the largest buffers in the compiler's report on device memory, which precedes those on core memories."""
    device = report.split("Memory Space:")[1] if "Memory Space:" in report else ""
    rows = re.findall(r"^ *[\d.]+[KMGT]?i?B\( *\d+%\); +([\d.]+[KMGT]?i?B); +\d+; +\d+; (.*)$", device, re.MULTILINE)
    return tuple(f"{size}: {arrays}" for size, arrays in rows[:LARGEST])


def _refusal(message: str, topology: str) -> str:
    found = re.search(r"(Ran out of memory[^\n]*?)(?: HLO module:|\n|$)", message)
    return (
        f"--topology {topology}: the step does not fit into a device's memory. The compiler reports: "
        f"{found[1] if found else message[:300]} Try more devices, fewer rows (data.batch_size), more "
        "train.microbatches, model.remat=full, or a mesh that shards the weights further (mesh.fsdp, mesh.expert)"
    )


def print_compiled(compiled: Compiled, console: Console) -> None:
    """Print the memory use, collectives and FLOPs of a compiled step as tables."""
    c, m = compiled, compiled.memory
    mesh = " x ".join(f"{axis}={size}" for axis, size in c.mesh.items()) or "one device"
    console.print(
        f"{c.topology}: {c.devices} devices ({c.device_kind}), mesh {mesh}; compiled in {c.seconds_to_compile:.0f} s"
        f"\n{c.parameters:,} parameters, {c.tokens:,} tokens per step; the figures below are per device and step\n",
        soft_wrap=True,
    )
    memory = Table("memory", "", box=None, pad_edge=False)
    memory.columns[1].justify = "right"
    rows = {
        "arguments: train state and batch": m.arguments,
        "results outside of arguments": m.results - m.in_place,
        "temporaries": m.temporaries,
        "program": m.code,
        "total": m.total,
    }
    for name, size in rows.items():
        memory.add_row(name, _size(size))
    console.print(memory)
    if c.available is not None:
        console.print(f"fits: the compiler gives a program {_size(c.available)} ({m.total / c.available:.0%} used)")
    largest = Table(
        "\nlargest temporaries (arrays that are not needed at the same time share memory)", box=None, pad_edge=False
    )
    for row in c.buffers[:6]:
        largest.add_row(row if len(row) < 150 else row[:147] + "...")
    console.print(largest)
    table = Table("\ncollective", "\ncount", "\noutput", "\nsent", box=None, pad_edge=False)
    for kind, (n, out, sent) in c.traffic.by_kind().items():
        table.add_row(kind, f"{n:,}", _size(out), _size(sent))
    table.add_row("total", "", _size(c.traffic.output_bytes), _size(c.traffic.sent))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(
        "output: bytes of the results; sent: bytes that leave the device with ring algorithms and direct messages. "
        "Loop bodies count once per iteration",
        soft_wrap=True,
    )
    if c.traffic.most > 1.01 * c.traffic.output_bytes:
        console.print(
            f"where the step branches, these figures take the branch with the smallest output; with the largest, the "
            f"output is {_size(c.traffic.most)}",
            soft_wrap=True,
        )
    if c.traffic.open_loops:
        console.print(
            f"{c.traffic.open_loops} loops whose length depends on data, such as the overflow rounds of an all-to-all "
            f"of tokens, are not counted; one iteration of each outputs {_size(c.traffic.a_round)}",
            soft_wrap=True,
        )
    seconds = (
        f"; {c.flops / c.peak:.3f} s at the {c.peak_source}, without waiting for memory or links" if c.peak else ""
    )
    console.print(f"\n{count(c.flops)}FLOP ({CONVENTION}){seconds}", soft_wrap=True)


def save(compiled: Compiled, experiment: Experiment, overrides: list[str], path: Path) -> None:
    """Write the figures as JSON, with the experiment's name and its overrides."""
    figures = {"experiment": experiment.name, "overrides": overrides, **compiled.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
