"""A memory estimate from the config alone, to reject a run that cannot fit before anything is built.

The estimate is a lower bound: it counts what every step must hold, and nothing that a compiler may avoid. A config that
passes may still not fit, but one that is rejected cannot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from model.memory import least_parameters
from sharding.config import MESH_AXES
from train.config import Experiment
from train.config_io import ConfigError

# Least bytes of optimizer state per parameter: two float32 moments, one, factored moments, and Muon's one.
OPTIMIZER_BYTES = {"adamw": 8, "lion": 4, "adafactor": 0, "muon": 4}
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Part:
    """One contribution to the memory of a device."""

    name: str
    size: int  # bytes per device, at least
    fields: str  # config fields that determine it


@dataclass(frozen=True)
class Memory:
    """The memory of a device."""

    size: int  # bytes per JAX device
    description: str  # subject and verb for the message, as in "a TPU v5p chip has"


def estimate(experiment: Experiment, device_count: int, *, training: bool = True) -> list[Part]:
    """Return the least memory of each of `device_count` devices, by part, for training or, without it, for weights.

    The experiment must be valid, with its vocabulary filled in.
    """
    mesh = dict(zip(MESH_AXES, experiment.mesh.sizes(device_count), strict=True))

    def devices(side: str, *axes: str) -> int:
        rules = getattr(experiment.sharding, side)
        return math.prod(mesh[name] for name in {name for axis in axes for name in getattr(rules, axis)})

    model, data, train = experiment.model, experiment.data, experiment.train
    spread = devices("weights", *vars(experiment.sharding.weights))
    # Training keeps float32 weights and optimizer state; sampling may keep weights in half precision. Frozen weights
    # have no optimizer state. Their number is not computed, so with frozen layers the bound counts no such state.
    moments = 0 if train.trainable_layers is not None else OPTIMIZER_BYTES.get(experiment.optimizer.name, 0)
    each = 4 + moments if training else 2
    what = "weights and optimizer state" if training else "weights"
    parts = [
        Part(f"{what} of the {name}", number * each // spread, fields)
        for name, (number, fields) in least_parameters(model).items()
    ]
    if not training:
        return parts
    rows = data.batch_size // (devices("activations", "batch") * train.microbatches)
    positions = rows * data.sequence_length // devices("activations", "sequence")
    number = 4 if model.dtype == "float32" else 2
    width = model.embed_dim // devices("activations", "embed")
    where = "data.batch_size, data.sequence_length"
    parts.append(Part("one layer's activations", positions * width * number, f"{where}, model.embed_dim"))
    vocabulary = model.vocab_size // devices("activations", "vocab")
    from train.cross_entropy import CHUNK_IDS, WHOLE_IDS

    chunk = train.loss_chunk or (vocabulary if vocabulary <= WHOLE_IDS else CHUNK_IDS)
    parts.append(Part("logits", positions * min(vocabulary, chunk) * 2, f"{where}, train.loss_chunk"))
    batch = data.batch_size * (data.sequence_length + 1) * 3 * 4  # tokens, positions and segments, int32
    parts.append(Part("the batch", batch // devices("activations", "batch"), where))
    return parts


def refuse_what_cannot_fit(
    experiment: Experiment, device_count: int, memory: Memory | None, *, training: bool = True
) -> None:
    """Raise ConfigError if the lower bound exceeds `memory` (None: unknown, always passes).

    The message names the largest part and the fields to change.
    """
    if memory is None:
        return
    parts = estimate(experiment, device_count, training=training)
    total = sum(part.size for part in parts)
    if total <= memory.size:
        return
    largest = max(parts, key=lambda part: part.size)
    values = ", ".join(f"{name} = {_value(experiment, name)!r}" for name in largest.fields.split(", "))
    more = ", or shard it over more devices (mesh, sharding)" if device_count > 1 else ""
    raise ConfigError(
        f"{values}: needs at least {_bytes(total)} on each device, but {memory.description} {_bytes(memory.size)}. The "
        f"largest part is {largest.name}, {_bytes(largest.size)}. Try smaller values of {largest.fields}{more}"
    )


def _value(experiment: Experiment, dotted: str):
    value = experiment
    for name in dotted.split("."):
        value = getattr(value, name)
    return value


def _bytes(size: int) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if size >= scale:
            return f"{size / scale:,.3g} {unit}"
    return f"{size / 1e6:.3g} MB"


def memory_here() -> Memory | None:
    """Return the memory of this process's devices, or None if the backend does not report it. Starts jax's backend."""
    import jax

    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _divided(host_memory(), jax.local_device_count())
    size = (device.memory_stats() or {}).get("bytes_limit")
    return Memory(size, f"a {device.device_kind} has") if size else None


def _divided(size: int | None, devices: int) -> Memory | None:
    if size is None:
        return None
    shared = f" for each of {devices} devices" if devices > 1 else ""
    return Memory(size // devices, f"this machine has{shared}")


def host_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory and swap that this process may use, or None if the system does not report them."""
    try:
        rows = (line.split() for line in (root / "proc/meminfo").read_text().splitlines())
        known = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1}
        size, swap = known["MemTotal"], known.get("SwapTotal", 0)
    except (OSError, ValueError, KeyError):
        return None
    for path in CGROUP_LIMITS:
        try:
            size = min(size, int((root / path.lstrip("/")).read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return size + swap
