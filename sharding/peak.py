"""Peak arithmetic rate of a device: what MFU is a fraction of."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets.
PEAKS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12 / 2, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip
CPU_MATMUL = 1536


def peak_flops(device: jax.Device) -> tuple[float | None, str]:
    """FLOP/s of one device and how it is known: the data sheet's bfloat16 figure, or measured, for a CPU, as the best
    of eight float32 matmuls of 1536^3 on all its cores. None for a device that is not in the table."""
    if device.platform == "cpu":
        with jax.default_device(device):
            x = jnp.ones((CPU_MATMUL, CPU_MATMUL), jnp.float32)
            times = []
            for _ in range(9):
                start = time.perf_counter()
                (x @ x).block_until_ready()
                times.append(time.perf_counter() - start)
        rate = 2 * CPU_MATMUL**3 / min(times[1:])
        return rate / max(jax.local_device_count(), 1), f"measured float32 matmul peak {rate / 1e9:.0f} GFLOP/s"
    matches = [name for name in PEAKS if device.device_kind.startswith(name)]
    if not matches:
        return None, f"peak of {device.device_kind} unknown"
    peak = PEAKS[max(matches, key=len)]
    return peak, f"{device.device_kind} bfloat16 peak {peak / 1e12:.0f} TFLOP/s"
