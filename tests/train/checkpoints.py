"""States with every kind of leaf, and folders of checkpoints that tests damage."""

import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.checkpoint import Checkpointer
from train.leaves import named_leaves

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint32, jnp.bool_, jnp.float8_e4m3fn)
cheap = settings(
    deadline=None, max_examples=20, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    return jax.make_mesh(
        shape,
        ("data", "tensor")[: len(shape)],
        axis_types=(AxisType.Explicit,) * len(shape),
        devices=jax.devices()[: math.prod(shape)],
    )


def random_state(seed: int, mesh: jax.sharding.Mesh | None = None) -> dict:
    """Return a tree with every kind of leaf: sharded, replicated, scalar, low precision, key, numpy, empty."""
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def place(x, *spec):
        return x if mesh is None else jax.device_put(x, NamedSharding(mesh, P(*spec)))

    return {
        "params": {
            "w": place(jax.random.normal(next(keys), (8, 16, 32)), "data", "tensor"),
            "bias": place(jax.random.normal(next(keys), (16,), jnp.bfloat16), "tensor"),
            "mask": place(jax.random.bernoulli(next(keys), 0.5, (8, 4)), "data"),
            "empty": place(jnp.zeros((0, 4))),
        },
        "opt": (place(jax.random.bits(next(keys), (8, 8)), None, "data"), place(jnp.int32(seed))),
        "rng": place(next(keys)),
        "streams": jax.random.split(next(keys), 3),
        "host": np.int64(2**40 + seed),
        "table": np.arange(seed, seed + 5, dtype=np.float64),
    }


def as_template(state, mesh):
    """Return the state's shapes on another mesh, without the axes that this mesh lacks."""

    def leaf(x):
        if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding):
            return x
        spec = P(*[axis for axis in x.sharding.spec if axis in mesh.axis_names])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, state)


def raw(leaf) -> np.ndarray:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)


def same_bits(a, b) -> bool:
    left, right = named_leaves(a), named_leaves(b)
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and raw(left[n]).tobytes() == raw(right[n]).tobytes()
        for n in left
    )


def restore_copy(good_folder: Path, tmp_path: Path, damage) -> tuple:
    """Return `(restored, warnings)` after `damage(directory of step 2)` on a new copy."""
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    shutil.copytree(good_folder, tmp_path / "copy")
    damage(tmp_path / "copy" / "2")
    warnings: list[str] = []
    with Checkpointer(tmp_path / "copy", log=warnings.append, retry_waits=()) as checkpointer:
        return checkpointer.restore(random_state(0)), warnings


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def make_unreadable(file: Path) -> None:
    """Make the kernel fail to open a file (ELOOP), even for root. Its content is kept next to it."""
    file.rename(file.with_name(f"{file.name}.kept"))
    file.symlink_to(file)


def make_readable(file: Path) -> None:
    file.unlink()
    file.with_name(f"{file.name}.kept").rename(file)
