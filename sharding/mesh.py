"""The device mesh: six named axes, all explicit, so an array's sharding is part of its type."""

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
    """Number of devices along each axis. At most one axis may be -1, which takes all remaining devices."""

    data: int = 1  # replicas with complete weights (slowest links)
    fsdp: int = -1  # replicas that store a slice of each weight and gather it for use
    expert: int = 1  # shards of the experts
    tensor: int = 1  # shards of heads, MLP columns and vocabulary (fastest links)
    sequence: int = 1  # shards of a sequence's positions
    stage: int = 1  # pipeline stages; no rule shards layers over it by default

    def sizes(self, device_count: int) -> tuple[int, ...]:
        """Return the axis sizes for `device_count` devices, in MESH_AXES order. Raises ValueError if they do not
        fit."""
        if device_count < 1:
            raise ValueError(f"{device_count} devices: a mesh needs at least one")
        sizes = dataclasses.asdict(self)
        wild = [name for name, size in sizes.items() if size == -1]
        bad = [name for name, size in sizes.items() if size < 1 and size != -1]
        if bad:
            raise ValueError(f"mesh.{bad[0]} = {sizes[bad[0]]}: must be 1 or more, or -1 for the remaining devices")
        if len(wild) > 1:
            raise ValueError(
                f"mesh.{wild[0]} and mesh.{wild[1]} are both -1: at most one axis can take the remaining devices. Set "
                "one to a number"
            )
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if wild and device_count % fixed == 0:
            sizes[wild[0]] = device_count // fixed
        total = math.prod(sizes.values())
        if total != device_count or -1 in sizes.values():
            shape = " x ".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items() if size != 1) or "1"
            raise ValueError(
                f"mesh = ({shape}): needs {'a multiple of ' if wild else ''}{fixed} devices, but there are "
                f"{device_count}; set mesh.* so that their product is {device_count}"
            )
        return tuple(sizes[name] for name in MESH_AXES)


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh | None:
    """Return a mesh of all `devices` (default: every device of every process) with explicit axes; None for one
    device."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return None if len(devices) == 1 else lay_out(sizes, devices)


def lay_out(sizes: tuple[int, ...], devices: list) -> Mesh:
    """Return a mesh with explicit axes of these sizes, in MESH_AXES order.

    On a TPU torus, neighbours in the mesh are linked if possible. A mesh axis may use part of a torus axis (8 x 8 on a
    torus of 4 x 4 x 4), which jax.make_mesh refuses.
    """
    if devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(sizes)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def use_mesh(mesh: Mesh | None):
    """Return a context in which `mesh` is the current mesh; with None, it does nothing. For a topology without its
    devices, the context sets only the shape and the kind of device, and nothing can run in it."""
    if mesh is None:
        return nullcontext()
    return jax.set_mesh(mesh) if _is_attached(mesh) else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def off_mesh() -> AbstractContextManager:
    """Return a context without a mesh, for computing with arrays of one device while a mesh is set."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def _is_attached(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == jax.default_backend() and mesh.devices.flat[0] in jax.devices()


def concrete_shardings(tree, mesh: Mesh | None):
    """Return a pytree of ShapeDtypeStructs from `jax.eval_shape` with its abstract shardings bound to the devices of
    `mesh`."""
    device = jax.local_devices()[0]

    def bind(x):
        if mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(device))
        spec = x.sharding.spec if isinstance(x.sharding, NamedSharding) else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(bind, tree)


def put_batch(batch, mesh: Mesh | None, spec: PartitionSpec | None):
    """Return a pytree of global arrays, sharded on the first dimension, from this process's rows of a batch (NumPy
    [B_local, ...])."""
    if mesh is None:
        return jax.device_put(batch)
    assert spec is not None, "a mesh requires a spec of the rows"
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


def put_replicated(tree, mesh: Mesh | None):
    """Return a pytree of NumPy values, equal on every process, as arrays replicated on every device."""
    if mesh is None:
        return jax.device_put(tree)
    sharding = NamedSharding(mesh, PartitionSpec())

    def replicate(value):
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(replicate, tree)
