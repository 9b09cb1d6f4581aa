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


@dataclass(frozen=True)
class AxisRules:
    """Mesh axes of each logical axis; an empty tuple keeps the dimension whole on every device."""

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
    """How logical axes lie on the mesh: `weights` as stored, `activations` as computed (weights at use included)."""

    weights: AxisRules = AxisRules(embed=("fsdp",))
    activations: AxisRules = AxisRules(batch=("data", "fsdp", "expert"), sequence=("sequence",))

    def validate(self) -> None:
        """Refuses unknown mesh axes and a mesh axis used twice by axes that meet in one array. Raises ValueError."""
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
                f"sharding.weights.layer = {self.weights.layer}: stacked layers are not spread over devices; set it to "
                f"()"
            )
        of_weights = (("embed", "heads"), ("embed", "kv_heads"), ("expert", "embed", "mlp"), ("vocab", "embed"))
        meeting = {
            "weights": of_weights,
            "activations": (
                *of_weights,  # weights at use are laid out as activations
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
                        f"sharding.{side}: mesh axis {twice[0]!r} is used twice by {', '.join(names)}, which meet in "
                        "one array; give one of them another axis or ()"
                    )
        heads, kv_heads = self.activations.heads, self.activations.kv_heads
        if heads[: len(kv_heads)] != kv_heads:
            raise ValueError(
                f"sharding.activations.kv_heads = {kv_heads}: must be the first of sharding.activations.heads = "
                f"{heads}, so that a device's queries find their keys; use {heads[: len(kv_heads)]}"
            )

    def mesh_axes(self, side: str, axis: str | None) -> tuple[str, ...]:
        """Mesh axes that the logical `axis` lies over on side 'weights' or 'activations'. Raises ValueError on an
        unknown name. 'gate' (the two projections of a gated MLP) lies over none; 'rank' (of a factorised projection) is
        stored like 'embed' and whole at use."""
        if axis in (None, "gate") or (axis == "rank" and side == "activations"):
            return ()
        if axis != "rank" and axis not in LOGICAL_AXES:
            raise ValueError(
                f"logical axis {axis!r} is unknown; use one of {', '.join(LOGICAL_AXES)}, gate, rank or None"
            )
        return getattr(getattr(self, side), "embed" if axis == "rank" else axis)

    def spec(self, side: str, axes: tuple[str | None, ...]) -> PartitionSpec:
        """PartitionSpec of an array whose dimensions are the logical `axes` (None: not sharded), on side 'weights' or
        'activations', with the mesh axes of size one kept (they cost nothing). Raises ValueError on an unknown name."""
        from jax.sharding import PartitionSpec

        parts: list = []
        for axis in axes:
            mesh_axes = self.mesh_axes(side, axis)
            parts.append(None if not mesh_axes else mesh_axes[0] if len(mesh_axes) == 1 else tuple(mesh_axes))
        return PartitionSpec(*parts)

    def batch_slices(self, mesh: Mesh | None = None) -> int:
        """Return how many slices of rows `mesh` (default: the mesh that is set) makes of a batch; 1 without a mesh."""
        import jax

        sizes = (mesh or jax.sharding.get_abstract_mesh()).shape
        return math.prod(sizes.get(axis, 1) for axis in self.activations.batch)

    def gathered(self, axes: tuple[str | None, ...]) -> tuple[PartitionSpec, tuple[tuple[str, ...], ...]]:
        """For a weight of logical `axes` that shard_map gathers: the layout it enters with, which is that of use with
        each dimension spread further over the axes it is only stored on, and those further axes of each dimension. The
        dimension 'embed' is whole at use."""
        from jax.sharding import PartitionSpec

        used = [() if axis == "embed" else self.mesh_axes("activations", axis) for axis in axes]
        taken = {mesh_axis for part in used for mesh_axis in part}
        stored = [self.mesh_axes("weights", axis) for axis in axes]
        further = tuple(tuple(mesh_axis for mesh_axis in part if mesh_axis not in taken) for part in stored)
        return PartitionSpec(*(part + more or None for part, more in zip(used, further, strict=True))), further
