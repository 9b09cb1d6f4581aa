"""The mesh of a trained run on other devices than it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

from sharding.config import MeshConfig
from train.config import Experiment


def fit_mesh(
    experiment: Experiment,
    overrides: Sequence[str] = (),
    device_count: int | None = None,
    *,
    log: Callable[[str], None] = print,
) -> Experiment:
    """Return a run's experiment on a mesh of the devices that are here, for evaluation, sampling and export.

    A mesh that fits stays, and so does one that `overrides` choose. Otherwise the first that fits replaces it, and
    `log` says so. Not for training, whose sums depend on the mesh.
    """
    if any(text.startswith(("mesh.", "sharding.")) for text in overrides):
        return experiment
    if device_count is None:
        import jax

        device_count = jax.device_count()
    if _fits(experiment, experiment.mesh, device_count):
        return experiment
    found = next((mesh for mesh in _meshes(device_count) if _fits(experiment, mesh, device_count)), None)
    if found is None:
        return experiment
    log(f"mesh: that of the run ({_named(experiment.mesh)}) does not fit {device_count} devices; using {_named(found)}")
    return replace(experiment, mesh=found)


def _fits(experiment: Experiment, mesh: MeshConfig, device_count: int) -> bool:
    train = replace(experiment.train, microbatches=1)
    try:
        replace(experiment, mesh=mesh, train=train).validate(device_count, training=False)
    except ValueError:
        return False
    return True


def _meshes(devices: int) -> Iterator[MeshConfig]:
    """Yield meshes of `devices` devices, those that spread the batch first."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in divisors:
        for expert in (n for n in divisors if devices % (tensor * n) == 0):
            yield MeshConfig(fsdp=devices // (tensor * expert), expert=expert, tensor=tensor)


def _named(mesh: MeshConfig) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in asdict(mesh).items() if size != 1) or "one device"
