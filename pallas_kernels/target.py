"""The device that is compiled for."""

from __future__ import annotations

import jax


def target() -> tuple[str, str]:
    """(platform, device kind), such as ('tpu', 'TPU v5 lite'): of the mesh that is set, which may be one of a topology
    that is not here, else of the default backend."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.platform, described.device_kind
    device = jax.devices()[0]
    return device.platform, device.device_kind
