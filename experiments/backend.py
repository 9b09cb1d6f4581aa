"""The first line of a run: what it computes on, and what it leaves unused."""

from __future__ import annotations

import collections
import glob
import os
from collections.abc import Sequence
from pathlib import Path

from experiments import ACCELERATORS

# The extra to install for the accelerator behind a device file.
EXTRAS = {"/dev/accel": "tpu", "/dev/vfio": "tpu", "/dev/nvidia": "gpu", "/dev/dxg": "gpu"}


def describe_backend(
    backend: str, kinds: Sequence[str], version: str, *, processor: str, files: Sequence[str], platforms: str | None
) -> list[str]:
    """Return the line that names the backend and its devices, and a warning where `files`, the device files of
    accelerators, exist but JAX runs on the CPU. `platforms`: JAX_PLATFORMS, where the user chose."""
    named = [processor if kind == "cpu" and processor else kind for kind in kinds]
    counts = collections.Counter(named)
    devices = f"{len(kinds)} device{'s' if len(kinds) != 1 else ''}"
    held = ", ".join(kind if len(counts) == 1 else f"{number} x {kind}" for kind, number in counts.items())
    lines = [f"backend: {backend}, {devices} ({held}), jax {version}"]
    if backend == "cpu" and files:
        if platforms:
            fix = f"JAX_PLATFORMS = {platforms} chose this; unset it to use the accelerator"
        else:
            extra = next((name for prefix, name in EXTRAS.items() if files[0].startswith(prefix)), None)
            fix = (
                f"install JAX for it: make install EXTRAS=dev,{extra}"
                if extra
                else "install the JAX that its maker gives"
            ) + ", and check that no other process holds it"
        lines.append(f"warning: {files[0]} is an accelerator, but JAX cannot see it and runs on the CPU; {fix}")
    return lines


def backend_lines() -> list[str]:
    """Return `describe_backend` of this machine. Starts jax's backend."""
    import jax

    return describe_backend(
        jax.default_backend(),
        [device.device_kind for device in jax.devices()],
        jax.__version__,
        processor=_processor(),
        files=sorted(path for pattern in ACCELERATORS for path in glob.glob(pattern)),
        platforms=os.environ.get("JAX_PLATFORMS"),
    )


def device_name() -> str:
    """Return the kind of the devices and the number of cores of a CPU, such as "AMD EPYC, 2 cores"."""
    import jax

    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return f"{jax.device_count()} x {kind}"
    return f"{_processor() or 'CPU'}, {os.cpu_count()} cores"


def _processor() -> str:
    """Return the name of the CPU; '' where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
