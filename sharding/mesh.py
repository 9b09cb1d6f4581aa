"""The device mesh: six named axes, all explicit, so that an array's sharding is part of its type."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sharding.config import MESH_AXES, MeshConfig


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
