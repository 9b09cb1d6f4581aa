"""The mesh of a trained run adapts to other devices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.meshes import fit_mesh
from experiments.quickstart import EXPERIMENTS
from experiments.resolve import fill_vocabulary
from sharding.mesh import MeshConfig

SMOKE = fill_vocabulary(EXPERIMENTS["smoke"]())


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        (MeshConfig(fsdp=8), 8, None),
        (MeshConfig(), 4, None),
        (MeshConfig(fsdp=8), 1, MeshConfig(fsdp=1)),
        (MeshConfig(data=2, fsdp=2, expert=2), 1, MeshConfig(fsdp=1)),
        (MeshConfig(data=2, fsdp=4), 2, MeshConfig(fsdp=2)),
    ],
)
def test_a_mesh_that_does_not_fit_is_replaced_with_a_message(mesh, devices, expected):
    lines: list[str] = []
    found = fit_mesh(replace(SMOKE, mesh=mesh), (), devices, log=lines.append)
    assert found.mesh == (expected or mesh) and len(lines) == (expected is not None)
    found.validate(devices)


def test_a_mesh_chosen_by_the_user_stays():
    chosen = replace(SMOKE, mesh=MeshConfig(fsdp=8))
    assert fit_mesh(chosen, ["mesh.fsdp=8"], 1) is chosen
