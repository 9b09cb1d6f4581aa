"""Names, stored forms and checksums of the leaves of a checkpointed tree.

A leaf is a jax array (on any mesh, typed PRNG keys included), a numpy array or a numpy scalar. On disk, it is a plain
array under its path, so that a checkpoint does not depend on the Python classes that held it.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax

TABLE_ROWS = 20


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    found: list[Any] = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), leaf)  # key_impl rejects a ShapeDtypeStruct
    return found[0]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return `{path: leaf}` of a tree, with paths joined by '/'. Raises TypeError for a leaf without shape or dtype."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise TypeError(
                f"{name} is a {type(leaf).__name__}: checkpoint leaves are jax arrays, numpy arrays or "
                f"numpy scalars; wrap it, for example with np.int64"
            )
        if name in named:
            raise ValueError(f"two leaves are both named {name!r}: rename one of the keys that contain '/'")
        named[name] = leaf
    return named


def to_storable(leaf: Any) -> Any:
    """Return the array that Orbax writes for a leaf: key data for a typed key, NumPy for data that one host owns."""
    if isinstance(leaf, jax.Array) and _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not (jax.process_count() > 1 and leaf.is_fully_addressable):
        return leaf
    return np.asarray(leaf)


@jax.jit
def _device_checksum(x: jax.Array) -> jax.Array:
    shape = x.shape
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
        bits = lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index, stride = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        index = index + lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    # For a given index, each step is a bijection of the bits (xor, odd multiples, xor-shifts), so a change of one
    # element always changes the sum. Mixing before the sum keeps two flipped sign bits from cancelling.
    mixed = (bits ^ (index * np.uint32(0x9E3779B1))) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    total = jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
    return total + np.uint32(math.prod(shape) % 2**32)


def checksums(leaves: dict[str, Any]) -> dict[str, int]:
    """Return a 32-bit sum of each leaf's bits and their global positions, equal on any mesh and in any summation order.

    The sums are computed on the leaf's devices (one small program per shape, dtype and sharding). They are fetched one
    by one, because many small collectives in flight can deadlock simulated devices on few cores.
    """
    sums = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, np.ndarray) and leaf.dtype.itemsize == 8:  # jax would narrow 64-bit values
            leaf = np.ascontiguousarray(leaf).reshape(*leaf.shape, 1).view(np.uint32)
        sums[name] = int(_device_checksum(leaf))
    return sums


def signature(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _describe(entry: dict[str, Any] | None) -> str:
    return f"{entry['dtype']}{entry['shape']}" if entry else "(absent)"


def differences(saved: dict[str, Any], requested: dict[str, Any]) -> str:
    """Return a table of the leaves that differ between a checkpoint and a template, or "" if none differ."""
    rows = [
        (name, _describe(saved.get(name)), _describe(requested.get(name))) for name in sorted(saved.keys() | requested)
    ]
    rows = [row for row in rows if row[1] != row[2]]
    if not rows:
        return ""
    shown = [("leaf", "in the checkpoint", "requested"), *rows[:TABLE_ROWS]]
    widths = [max(len(row[column]) for row in shown) for column in range(3)]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    ]
    if len(rows) > TABLE_ROWS:
        lines.append(f"  and {len(rows) - TABLE_ROWS} more")
    return "\n".join(lines)


def _placed(leaf: Any) -> bool:
    """Return whether a template leaf fixes the array's devices. If not, the array is restored uncommitted."""
    if isinstance(leaf, jax.Array):
        return leaf.committed
    return isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None


def stored_struct(leaf: Any) -> jax.ShapeDtypeStruct:
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        struct = jax.eval_shape(jax.random.key_data, struct)
    return struct


def restore_args(leaf: Any) -> ocp.RestoreArgs:
    struct = stored_struct(leaf)
    if not _placed(leaf):
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=struct.dtype)
    return ocp.ArrayRestoreArgs(dtype=struct.dtype, sharding=leaf.sharding, global_shape=struct.shape)


def from_stored(value: Any, leaf: Any) -> Any:
    """Return the restored array in the form of its template leaf."""
    if isinstance(leaf, np.generic):
        return value[()]
    if isinstance(leaf, np.ndarray):
        return value
    if not _placed(leaf):
        value = jnp.asarray(value)
    elif isinstance(value, np.ndarray):  # an empty array
        value = jax.device_put(value, leaf.sharding)
    return jax.random.wrap_key_data(value, impl=_key_impl(leaf)) if _is_key(leaf) else value
