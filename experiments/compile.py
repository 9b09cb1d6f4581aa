"""The train step of an experiment, compiled for TPUs that are not here: what it takes of each device, and what it
sends.

The TPU compiler (`pip install libtpu`) runs on any machine. It lays out the whole step, forward, backward, clipping and
update, on a topology such as v5p:4x4x4, refuses what does not fit into memory, and says what each device holds and
which collectives it runs. Nothing is timed: how fast the step is, only the pod can say.
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
from sharding.mesh import lay_out, use_mesh
from sharding.peak import peak_flops
from train.config import Experiment
from train.config_io import ConfigError
from train.program import Program, build
from train.progress import count

# What the compiler lets a program use of a JAX device's memory, bytes: read from its refusals (libtpu 0.0.52). A chip
# of v4 or 7x has two JAX devices. The data sheets (32, 16, 95, 32 and 192 GB a chip) count what the system keeps for
# itself, too.
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
LARGEST = 12  # buffers that are named


class DoesNotFit(ConfigError):
    """The compiler refused the step: it needs more memory than a device has."""


@dataclass(frozen=True)
class Memory:
    """Bytes a device."""

    arguments: int  # the train state and the batch
    in_place: int  # of the results, what takes the place of an argument
    results: int  # all of them
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.results - self.in_place + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """A train step, compiled. Every figure is of one device and one step unless it says otherwise."""

    topology: str
    device_kind: str
    devices: int
    mesh: dict[str, int]  # axes of more than one device
    parameters: int
    tokens: int  # of the whole step
    memory: Memory
    available: int | None
    buffers: tuple[str, ...]  # the largest temporaries: size and the arrays that share it
    traffic: Traffic
    flops: float  # by the convention of model.cost
    peak: float | None  # FLOP/s
    peak_source: str
    seconds_to_compile: float

    def to_json(self) -> dict:
        """Figures alone, in bytes and seconds."""
        kinds = {
            kind: {"count": n, "bytes_put_out": out, "bytes_sent": round(sent)}
            for kind, (n, out, sent) in self.traffic.by_kind().items()
        }
        keys = ("topology", "device_kind", "devices", "mesh", "parameters", "tokens", "available", "flops", "buffers")
        return {
            **{key: getattr(self, key) for key in keys},
            "seconds_to_compile": round(self.seconds_to_compile, 1),
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "collectives": kinds,
            "bytes_put_out": self.traffic.put_out,
            "bytes_put_out_at_most": self.traffic.most,
            "bytes_put_out_by_a_round_of_open_loops": self.traffic.a_round,
            "bytes_sent": round(self.traffic.sent),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
        }


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology. Raises ConfigError for an unknown one, or where there is no compiler."""
    try:
        return devices_of(topology)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"--topology: {error}") from error


def memory_of(device: jax.Device) -> DeviceMemory | None:
    """Return what the compiler lets a program use of a device; None for a kind that is not in the table."""
    size = AVAILABLE.get(device.device_kind)
    return None if size is None else DeviceMemory(size, f"the compiler gives a program on a {device.device_kind}")


def compile_step(experiment: Experiment, topology: str) -> Compiled:
    """Compiles the train step of an experiment, resolved for the topology's devices. Raises ConfigError if that cannot
    be: DoesNotFit where the memory of a device does not suffice. The dtype 'auto' is bfloat16, as it is on a TPU."""
    devices = topology_devices(topology)
    if experiment.model.dtype == "auto":  # which looks at the backend that is here
        experiment = replace(experiment, model=replace(experiment.model, dtype="bfloat16"))
    mesh = lay_out(experiment.mesh.sizes(len(devices)), devices)
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
        # The text of the compiled object itself cannot be had: JAX fails to read back what runs on a TPU's SparseCores.
        text = _dumped(folder, "after_optimizations.txt")
        buffers = _largest(_dumped(folder, "after_optimizations-memory-usage-report.txt"))
    m = executable.memory_analysis()
    assert m is not None, "the TPU compiler tells its memory"
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
    """The dump of the train step with this ending; other programs are small."""
    found = sorted(Path(folder).glob(f"*.{ending}"), key=lambda path: path.stat().st_size)
    return found[-1].read_text() if found else ""


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB"


def _peak(device: jax.Device) -> tuple[float | None, str]:
    peak, source = peak_flops(device)
    half = (
        device.device_kind == "TPU v4" and device.num_cores == 1
    )  # topologies of v4 have a device for each of a chip's two cores
    return (peak / 2, f"half of the {source}") if half and peak else (peak, source)


def _largest(report: str) -> tuple[str, ...]:
    """Of the compiler's report on the memory of the device, which stands before those on the memories of its cores."""
    device = report.split("Memory Space:")[1] if "Memory Space:" in report else ""
    rows = re.findall(r"^ *[\d.]+[KMGT]?i?B\( *\d+%\); +([\d.]+[KMGT]?i?B); +\d+; +\d+; (.*)$", device, re.MULTILINE)
    return tuple(f"{size}: {arrays}" for size, arrays in rows[:LARGEST])


def _refusal(message: str, topology: str) -> str:
    told = re.search(r"(Ran out of memory[^\n]*?)(?: HLO module:|\n|$)", message)
    return (
        f"--topology {topology}: the step does not fit into a device's memory. The compiler: "
        f"{told[1] if told else message[:300]} Take more devices, fewer rows (data.batch_size), more "
        "train.microbatches, model.remat=full, or a mesh that holds less (mesh.fsdp, mesh.expert)"
    )


def print_compiled(compiled: Compiled, console: Console) -> None:
    """What a user asks of a pod, as tables."""
    c, m = compiled, compiled.memory
    mesh = " x ".join(f"{axis}={size}" for axis, size in c.mesh.items()) or "one device"
    console.print(
        f"{c.topology}: {c.devices} devices ({c.device_kind}), mesh {mesh}; compiled in {c.seconds_to_compile:.0f} s"
        f"\n{c.parameters:,} parameters, {c.tokens:,} tokens a step; all that follows is of one device and one step\n",
        soft_wrap=True,
    )
    memory = Table("memory", "", box=None, pad_edge=False)
    memory.columns[1].justify = "right"
    rows = {
        "arguments: train state and batch": m.arguments,
        "results not in the place of arguments": m.results - m.in_place,
        "temporaries": m.temporaries,
        "program": m.code,
        "all": m.total,
    }
    for name, size in rows.items():
        memory.add_row(name, _size(size))
    console.print(memory)
    if c.available is not None:
        console.print(f"fits: the compiler gives a program {_size(c.available)} ({m.total / c.available:.0%} are used)")
    largest = Table("\nlargest temporaries (those that are not needed at once share memory)", box=None, pad_edge=False)
    for row in c.buffers[:6]:
        largest.add_row(row if len(row) < 150 else row[:147] + "...")
    console.print(largest)
    table = Table("\ncollective", "\ncount", "\nput out", "\nsent", box=None, pad_edge=False)
    for kind, (n, out, sent) in c.traffic.by_kind().items():
        table.add_row(kind, f"{n:,}", _size(out), _size(sent))
    table.add_row("all", "", _size(c.traffic.put_out), _size(c.traffic.sent))
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(
        "put out: bytes of the results; sent: bytes that leave the device if rings and direct messages do it. Loops "
        "count as often as they go round",
        soft_wrap=True,
    )
    if c.traffic.most > 1.01 * c.traffic.put_out:
        console.print(
            f"where the step branches, these are the branches that put out least; the others: {_size(c.traffic.most)}",
            soft_wrap=True,
        )
    if c.traffic.open_loops:
        console.print(
            f"{c.traffic.open_loops} loops whose length depends on data, such as further rounds of an exchange of "
            f"tokens, are not counted; a round of each puts out {_size(c.traffic.a_round)}",
            soft_wrap=True,
        )
    seconds = (
        f"; {c.flops / c.peak:.3f} s at the {c.peak_source}, without waiting for memory or links" if c.peak else ""
    )
    console.print(f"\n{count(c.flops)}FLOP ({CONVENTION}){seconds}", soft_wrap=True)


def save(compiled: Compiled, experiment: Experiment, overrides: list[str], path: Path) -> None:
    """Writes the figures as JSON, with what was asked for."""
    told = {"experiment": experiment.name, "overrides": overrides, **compiled.to_json()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told, indent=1) + "\n")
