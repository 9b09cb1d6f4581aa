"""The device mesh: six named axes, all explicit, so that an array's sharding is part of its type."""

from __future__ import annotations

import dataclasses
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.rules import MESH_AXES


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis. At most one axis is -1: all devices the others leave."""

    data: int = 1  # replicas that hold whole weights (slowest links)
    fsdp: int = -1  # replicas that hold a slice of each weight and gather it at use
    expert: int = 1  # experts spread over devices
    tensor: int = 1  # heads, MLP columns and vocabulary spread over devices (fastest links)
    sequence: int = 1  # positions of a sequence spread over devices
    stage: int = 1  # pipeline stages; no rule spreads layers over it by default

    def sizes(self, device_count: int) -> tuple[int, ...]:
        """Axis sizes for `device_count` devices, in MESH_AXES order. Raises ValueError if they do not match."""
        if device_count < 1:
            raise ValueError(f"{device_count} devices: a mesh needs at least one")
        sizes = dataclasses.asdict(self)
        wild = [name for name, size in sizes.items() if size == -1]
        bad = [name for name, size in sizes.items() if size < 1 and size != -1]
        if bad:
            raise ValueError(f"mesh.{bad[0]} = {sizes[bad[0]]}: an axis has 1 or more devices, or -1 for what is left")
        if len(wild) > 1:
            raise ValueError(f"mesh.{wild[0]} and mesh.{wild[1]} are both -1: at most one axis can take what is left")
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if wild and device_count % fixed == 0:
            sizes[wild[0]] = device_count // fixed
        total = math.prod(sizes.values())
        if total != device_count or -1 in sizes.values():
            shape = " x ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items() if size != 1) or "1"
            raise ValueError(
                f"mesh = ({shape}): needs {'a multiple of ' if wild else ''}{fixed} devices, but there are "
                f"{device_count}; set mesh.* so that the product is {device_count}"
            )
        return tuple(sizes[name] for name in MESH_AXES)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh | None:
    """A mesh of all `devices` (default: every device of every process) with explicit axes; None for a single device."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return None if len(devices) == 1 else lay_out(sizes, devices)


def lay_out(sizes: tuple[int, ...], devices: list) -> Mesh:
    """A mesh with explicit axes of these sizes, in MESH_AXES order. On a TPU's torus neighbours in the mesh are linked
    where that can be; a mesh axis may take part of a torus axis (8 x 8 on a torus of 4 x 4 x 4), which jax.make_mesh
    refuses.
    """
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(sizes)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def use_mesh(mesh: Mesh | None):
    """Context in which `mesh` is the current one; with None, nothing is set. Of a topology that is not here only the
    shape and the kind of device are set: nothing can run on it."""
    if mesh is None:
        return nullcontext()
    return jax.set_mesh(mesh) if _here(mesh) else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def off_mesh() -> AbstractContextManager:
    """Context in which an array of one device can be computed with, whichever mesh is the current one."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def _here(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == jax.default_backend() and mesh.devices.flat[0] in jax.devices()


def concrete_shardings(tree, mesh: Mesh | None):
    """The pytree of ShapeDtypeStructs with the abstract shardings of `jax.eval_shape` bound to the devices of
    `mesh`."""
    device = jax.local_devices()[0]

    def bind(x):
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device))
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(bind, tree)


def put_batch(batch, mesh: Mesh | None, spec: PartitionSpec | None):
    """Return a pytree of host-local rows of a global batch (NumPy [B_local, ...]) as global arrays that are sharded on
    the first dimension."""
    if mesh is None:
        return jax.device_put(batch)
    assert spec is not None, "on a mesh the rows need a spec"
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def put_replicated(tree, mesh: Mesh | None):
    """Return a pytree of NumPy values, the same on every process, as arrays that every device holds whole."""
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(value):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(put, tree)
