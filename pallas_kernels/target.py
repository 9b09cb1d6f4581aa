"""The device that code is compiled for."""

from __future__ import annotations

import jax

# Device names of GPUs that our Triton kernels do not support: NVIDIA's before Ampere, and other vendors'.
UNSUPPORTED_GPUS = ("V100", "T4", "P100", "P40", "P4", "GTX", "TITAN", "RTX 20", "AMD", "Radeon", "Instinct")


def target() -> tuple[str, str]:
    """Return (platform, device kind), such as ('tpu', 'TPU v5 lite'), of the current mesh, which may describe absent
    devices, or else of the default backend."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform, described.device_kind
    device = jax.devices()[0]
    return device.platform, device.device_kind


def runs_triton(platform: str, device_kind: str) -> bool:
    """Return whether our Triton kernels support this device: an NVIDIA GPU, Ampere or later."""
    return platform in ("gpu", "cuda") and not any(name in device_kind for name in UNSUPPORTED_GPUS)
