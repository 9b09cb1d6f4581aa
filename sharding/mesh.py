"""The device mesh: six named axes, all explicit, so an array's sharding is part of its type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.config import MESH_AXES, MeshConfig


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh | None:
    """Return a mesh of all `devices` (default: every device of every process) with explicit axes; None for one
    device."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return None if len(devices) == 1 else create_mesh(sizes, devices)


def create_mesh(sizes: tuple[int, ...], devices: list) -> Mesh:
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
