"""The configs of the device mesh and of the layout on it (sharding/rules.py explains the layout).

A method imports jax where it makes a layout, so that a command line that only reads configs starts without jax.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh, PartitionSpec

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence", "stage")
LOGICAL_AXES = ("batch", "sequence", "embed", "heads", "kv_heads", "mlp", "expert", "vocab", "layer")


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


@dataclass(frozen=True)
class AxisRules:
    """Mesh axes of each logical axis. An empty tuple replicates the dimension on every device."""

    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)
    vocab: tuple[str, ...] = ("tensor",)
    layer: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of logical axes: `weights` for stored weights, `activations` for computation, including weights in
    use."""

    weights: AxisRules = AxisRules(embed=("fsdp",))
    activations: AxisRules = AxisRules(batch=("data", "fsdp", "expert"), sequence=("sequence",))

    def validate(self) -> None:
        """Raise ValueError for an unknown mesh axis, or a mesh axis that shards two logical axes of one array."""
        for side in ("weights", "activations"):
            axis_rules = getattr(self, side)
            for field in dataclasses.fields(axis_rules):
                for mesh_axis in getattr(axis_rules, field.name):
                    if mesh_axis not in MESH_AXES:
                        raise ValueError(
                            f"sharding.{side}.{field.name} = {mesh_axis!r}: not a mesh axis; use one of "
                            f"{', '.join(MESH_AXES)}"
                        )
        if self.weights.layer:
            raise ValueError(
                f"sharding.weights.layer = {self.weights.layer}: stacked layers cannot be sharded; set it to ()"
            )
        of_weights = (("embed", "heads"), ("embed", "kv_heads"), ("expert", "embed", "mlp"), ("vocab", "embed"))
        meeting = {
            "weights": of_weights,
            "activations": (
                *of_weights,  # weights in use are sharded as activations
                *(("batch", "sequence", last) for last in ("embed", "heads", "kv_heads", "mlp", "vocab")),
                ("layer", "batch", "kv_heads"),  # a stack of caches
            ),
        }
        for side, groups in meeting.items():
            for names in groups:
                used = [axis for name in names for axis in getattr(getattr(self, side), name)]
                twice = sorted({axis for axis in used if used.count(axis) > 1})
                if twice:
                    raise ValueError(
                        f"sharding.{side}: mesh axis {twice[0]!r} is used twice by {', '.join(names)}, which occur "
                        "in one array; give one of them another axis or ()"
                    )
        heads, kv_heads = self.activations.heads, self.activations.kv_heads
        if heads[: len(kv_heads)] != kv_heads:
            raise ValueError(
                f"sharding.activations.kv_heads = {kv_heads}: must be the first of sharding.activations.heads = "
                f"{heads}, so that a device has the keys of its queries. Use {heads[: len(kv_heads)]}"
            )

    def mesh_axes(self, side: str, axis: str | None) -> tuple[str, ...]:
        """Return the mesh axes that shard the logical `axis` on side 'weights' or 'activations'. 'gate' (the two
        projections of a gated MLP) is never sharded. 'rank' (of a factorised projection) is stored like 'embed' and
        gathered for use. Raises ValueError for an unknown name."""
        if axis in (None, "gate") or (axis == "rank" and side == "activations"):
            return ()
        if axis != "rank" and axis not in LOGICAL_AXES:
            raise ValueError(
                f"logical axis {axis!r} is unknown; use one of {', '.join(LOGICAL_AXES)}, gate, rank or None"
            )
        return getattr(getattr(self, side), "embed" if axis == "rank" else axis)

    def spec(self, side: str, axes: tuple[str | None, ...]) -> PartitionSpec:
        """Return the PartitionSpec of an array with the logical `axes` (None: not sharded) on side 'weights' or
        'activations'. Mesh axes of size one stay in it, at no cost. Raises ValueError for an unknown name."""
        from jax.sharding import PartitionSpec

        parts: list = []
        for axis in axes:
            mesh_axes = self.mesh_axes(side, axis)
            parts.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else tuple(mesh_axes))
        return PartitionSpec(*parts)

    def batch_slices(self, mesh: Mesh | None = None) -> int:
        """Return the number of shards into which `mesh` (default: the current mesh) divides a batch; 1 without a
        mesh."""
        import jax

        sizes = (mesh or jax.sharding.get_abstract_mesh()).shape
        return math.prod(sizes.get(axis, 1) for axis in self.activations.batch)

    def gathered(self, axes: tuple[str | None, ...]) -> tuple[PartitionSpec, tuple[tuple[str, ...], ...]]:
        """Return (PartitionSpec with which a weight of logical `axes` enters shard_map, mesh axes to gather per
        dimension).

        The spec is the layout for use, with each dimension sharded further over the axes that only its storage uses.
        These further axes are the ones to gather. The dimension 'embed' is unsharded for use.
        """
        from jax.sharding import PartitionSpec

        used = [() if axis == "embed" else self.mesh_axes("activations", axis) for axis in axes]
        taken = {mesh_axis for part in used for mesh_axis in part}
        stored = [self.mesh_axes("weights", axis) for axis in axes]
        further = tuple(tuple(mesh_axis for mesh_axis in part if mesh_axis not in taken) for part in stored)
        return PartitionSpec(*(part + more or None for part, more in zip(used, further, strict=True))), further
