"""Peak FLOP/s of a device, the denominator of MFU."""

from __future__ import annotations

import time
from functools import cache

import jax
import jax.numpy as jnp

from sharding.mesh import off_mesh

# Dense bfloat16 FLOP/s of one JAX device, from the manufacturers' data sheets.
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12 / 2, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip
CPU_MATMUL = 1536  # rows and columns


def peak_flops(device: jax.Device) -> tuple[float | None, str]:
    """Return (FLOP/s of one device, a description of the source): the bfloat16 figure of the data sheet, or a
    measurement for a CPU. The rate is None for a device that is not in the table."""
    if device.platform == "cpu":
        rate = _cpu_peak()
        return rate / jax.local_device_count(), f"measured float32 matmul peak {rate / 1e9:.0f} GFLOP/s of this machine"
    matches = [name for name in PEAKS if device.device_kind.startswith(name)]
    if not matches:
        return None, f"peak of {device.device_kind} unknown"
    peak = PEAKS[max(matches, key=len)]
    return peak, f"{device.device_kind} bfloat16 peak {peak / 1e12:.0f} TFLOP/s"


@cache
def _cpu_peak() -> float:
    """Return the FLOP/s of this machine's cores: the best of eight rounds of float32 matmuls.

    Each round runs one matmul on every device of this process at once, because simulated devices share the cores:
    1536^3 on a single device, 768^3 on several.
    """
    devices = jax.local_devices()
    size = CPU_MATMUL if len(devices) == 1 else CPU_MATMUL // 2
    times = []
    with off_mesh():
        arrays = [jax.device_put(jnp.ones((size, size), jnp.float32), device) for device in devices]
        for _ in range(9):
            start = time.perf_counter()
            jax.block_until_ready([x @ x for x in arrays])
            times.append(time.perf_counter() - start)
    return len(devices) * 2 * size**3 / min(times[1:])
