"""A check of every device of a run: all compute the same small step, and the processes compare the results.

A device that computes wrong damages the weights of all, and the loss may show it only hours later. One that is slow
delays all. The step is a chain of float32 matmuls and a hash of the bits of its result, without collectives. It runs
on one device after the other, so that a result and a time belong to one device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import socket
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EXIT_WRONG_DEVICE = 76  # not repeated by a launcher: the same hosts would fail again, or damage the weights
TRIES = 3  # of which the fastest counts
SLOW = 2.0  # times the median of the devices of the same kind
UNSTABLE = "differs"  # instead of a checksum, where the tries of one device differ
# (size of the matrices, matmuls) by platform, for milliseconds of work. For a TPU, 512 compiles in 0.3 s of CPU time
# and 2048 in 2.5 s; a GPU needs 2048 to use all of its cores.
CHAINS = {"cpu": (256, 8), "tpu": (512, 512), "gpu": (2048, 64)}
# Of several algorithms with different rounding, GPUs compile the same one everywhere.
GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_autotune_level": "0", "xla_gpu_deterministic_ops": True}


class DeviceError(RuntimeError):
    """A device computes wrong; the message names it, its process and its host."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """The result of the step on one device."""

    process: int
    host: str
    device: int  # number of the device in its process
    kind: str
    setup: str  # hash of compiler flags and, for a CPU, of its model: legitimate reasons for other bits
    checksum: str  # of the result's bits, or UNSTABLE
    seconds: float  # of the fastest try


def measure(devices: Sequence[jax.Device] | None = None) -> list[Reading]:
    """Run the step on each device (default: of this process), and return the readings.

    Simulated devices of a CPU are one piece of hardware, so only the first is read by default.
    """
    if devices is None:
        devices = jax.local_devices()
        devices = devices[:1] if devices[0].platform == "cpu" else devices
    with ThreadPoolExecutor(max_workers=8) as pool:
        steps = list(pool.map(_compiled, devices))
    return [_read(number, device, step) for number, (device, step) in enumerate(zip(devices, steps, strict=True))]


def _read(number: int, device: jax.Device, step: Callable[..., jax.Array]) -> Reading:
    size, _ = CHAINS.get(device.platform, CHAINS["gpu"])
    draw = np.random.default_rng(0)
    matrices = [draw.normal(scale=scale, size=(size, size)).astype(np.float32) for scale in (1.0, size**-0.5)]
    arguments = [jax.device_put(matrix, device) for matrix in matrices]
    checksums, times = set(), []
    for _ in range(TRIES):
        began = time.perf_counter()
        checksums.add(f"{int(step(*arguments)):08x}")
        times.append(time.perf_counter() - began)
    checksum = checksums.pop() if len(checksums) == 1 else UNSTABLE
    host, setup = socket.gethostname(), _setup(device.platform)
    return Reading(jax.process_index(), host, number, device.device_kind, setup, checksum, min(times))


@functools.cache
def _compiled(device: jax.Device) -> Callable[..., jax.Array]:
    """Return the step for one device: ([N, N], [N, N]) float32 -> checksum, uint32."""
    size, matmuls = CHAINS.get(device.platform, CHAINS["gpu"])

    def step(x: jax.Array, w: jax.Array) -> jax.Array:
        def multiply(_: jax.Array, y: jax.Array) -> jax.Array:
            y = y @ w
            return y * lax.rsqrt(jnp.mean(y * y)) + 0.5 * x  # neither grows nor forgets an element

        bits = lax.bitcast_convert_type(lax.fori_loop(0, matmuls, multiply, x), jnp.uint32).ravel()
        mixed = bits ^ (jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761))  # Knuth's multiplier
        for factor in (2246822507, 3266489909):  # the finalizer of MurmurHash3
            mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(factor)
        return jnp.sum(mixed, dtype=jnp.uint32)

    shape = jax.ShapeDtypeStruct((size, size), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    return jax.jit(step).lower(shape, shape).compile(compiler_options=GPU_OPTIONS if device.platform == "gpu" else None)


def _setup(platform: str) -> str:
    parts = [os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    if platform == "cpu":  # its vector width and number of threads decide the order of sums
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        except OSError:
            lines = []
        parts += [next((line for line in lines if line.startswith("model name")), ""), f"{cores} cores"]
    return hashlib.sha256("; ".join(parts).encode()).hexdigest()[:12]


def to_text(readings: Iterable[Reading]) -> str:
    """Return readings as one line of JSON."""
    return json.dumps([dataclasses.asdict(reading) for reading in readings])


def from_text(text: str) -> list[Reading]:
    """Return the readings of a line from `to_text`."""
    return [Reading(**fields) for fields in json.loads(text)]


# ---- comparison ----


def wrong(readings: Sequence[Reading]) -> str | None:
    """Return a sentence that names the devices that compute wrong, or None.

    Among devices of one kind and setup, those are wrong that differ from more than half of them, or between their
    tries. Without such a majority, all of them are named.
    """
    found = []
    for group in _groups(readings, lambda reading: (reading.kind, reading.setup)):
        counts = Counter(reading.checksum for reading in group if reading.checksum != UNSTABLE)
        [(usual, most)] = counts.most_common(1) or [("", 0)]
        stable = sum(counts.values())
        for reading in group:
            if reading.checksum == UNSTABLE:
                found.append(f"{_name(reading)}: computes the same step differently each time")
            elif 2 * most <= stable and stable > 1:
                found.append(f"{_name(reading)}: computes {reading.checksum}, and no majority of {stable} agrees")
            elif reading.checksum != usual:
                found.append(f"{_name(reading)}: computes differently from {most} of {stable} {reading.kind}")
    if not found:
        return None
    return (
        f"{'; '.join(found)}. Take the host out of the job, or replace it (a slice of TPUs: delete it and get "
        "another). train.check_devices = False trains without this check"
    )


def slow(readings: Sequence[Reading]) -> str | None:
    """Return a sentence that names the devices slower than SLOW times the median of their kind, or None.

    Processes on one host share its CPU, so these readings are not compared.
    """
    found = []
    processes = Counter(host for host, _ in {(reading.host, reading.process) for reading in readings})
    alone = [reading for reading in readings if reading.kind != "cpu" or processes[reading.host] == 1]
    for group in _groups(alone, lambda reading: reading.kind):
        median = statistics.median(reading.seconds for reading in group)
        found += [
            f"{_name(reading)}: takes {1e3 * reading.seconds:.1f} ms for a step that takes {1e3 * median:.1f} ms on "
            f"the median {reading.kind}"
            for reading in group
            if reading.seconds > SLOW * median
        ]
    return "; ".join(found) or None


def _name(reading: Reading) -> str:
    return f"process {reading.process} (host {reading.host}), device {reading.device}"


def _groups(readings: Iterable[Reading], key: Callable[[Reading], object]) -> list[list[Reading]]:
    found: dict[object, list[Reading]] = defaultdict(list)
    for reading in readings:
        found[key(reading)].append(reading)
    return list(found.values())
