"""The device that is compiled for."""

from __future__ import annotations

import jax

BEFORE_AMPERE = (
    "V100",
    "T4",
    "P100",
    "P40",
    "P4",
    "GTX",
    "TITAN",
    "RTX 20",
    "AMD",
    "Radeon",
    "Instinct",
)  # not Triton's, or not NVIDIA's


def target() -> tuple[str, str]:
    """(platform, device kind), such as ('tpu', 'TPU v5 lite'): of the mesh that is set, which may be one of a topology
    that is not here, else of the default backend."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform, described.device_kind
    device = jax.devices()[0]
    return device.platform, device.device_kind


def runs_triton(platform: str, device_kind: str) -> bool:
    """Whether our Triton kernels are for this device: an NVIDIA GPU from Ampere on."""
    return platform in ("gpu", "cuda") and not any(old in device_kind for old in BEFORE_AMPERE)
