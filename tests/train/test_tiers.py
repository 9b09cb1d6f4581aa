"""Checkpoints in two tiers: the newest step that every process can read is restored."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gcs_server import free_port
from tests.train.checkpoints import mesh_of, random_state, same_bits
from train.config import TrainConfig
from train.tiers import TieredCheckpointer

ROOT = Path(__file__).parents[2]


def restored(tmp_path, warnings=None):
    log = (lambda text: None) if warnings is None else warnings.append
    with TieredCheckpointer(tmp_path / "shared", tmp_path / "local", every=4, log=log) as checkpoints:
        found = checkpoints.restore(random_state(0, mesh_of(4, 2)))
    assert found is None or same_bits(found.state, random_state(found.step, mesh_of(4, 2)))
    return None if found is None else found.step


def save(tmp_path, *steps: int) -> None:
    with TieredCheckpointer(tmp_path / "shared", tmp_path / "local", every=4) as checkpoints:
        checkpoints.restore(random_state(0, mesh_of(4, 2)))
        for step in steps:
            assert checkpoints.save(step, random_state(step, mesh_of(4, 2)), metadata={})


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_the_newest_step_of_both_tiers_is_restored(tmp_path):
    assert restored(tmp_path) is None
    save(tmp_path, 1, 2, 3, 4, 5, 6)
    local = tmp_path / "local" / "process_0_of_1"
    assert names(tmp_path / "shared") == ["4"] and names(local) == ["6"]
    assert restored(tmp_path) == 6
    save(tmp_path, 8)
    assert restored(tmp_path) == 8  # the shared one is newer
    shutil.rmtree(tmp_path / "local")
    assert restored(tmp_path) == 8


def test_a_damaged_local_step_is_skipped(tmp_path):
    save(tmp_path, 4, 6)
    local = tmp_path / "local" / "process_0_of_1"
    (local / "6" / "manifest.ocdbt").write_bytes(b"damaged")
    warnings: list[str] = []
    assert restored(tmp_path, warnings) == 4
    assert len(warnings) == 1 and "local checkpoint of step 6 cannot be used" in warnings[0]
    save(tmp_path, 5)  # step 6 is not the newest of this run any more
    assert restored(tmp_path) == 5 and "6" not in names(local)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"local_checkpoint_every": 5}, "local checkpoints need both"),
        ({"local_checkpoint_dir": "/tmp/x"}, "local checkpoints need both"),
        ({"local_checkpoint_every": 5, "local_checkpoint_dir": "gs://b/x"}, "disk of each host"),
    ],
)
def test_local_checkpoints_need_a_number_and_a_local_folder(fields, expected):
    with pytest.raises(ValueError, match=f"train.local_checkpoint_.*{expected}"):
        TrainConfig(**fields).validate()


PEER = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from train.tiers import TieredCheckpointer

root, rank = sys.argv[1], int(sys.argv[3])
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=rank)
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Explicit,))

def state(step):
    rows = np.arange(8 * 64, dtype=np.float32).reshape(8, 64) * step
    place = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda index: x[index])
    return {"w": place(rows, P("fsdp")), "b": place(rows[0], P())}

def shards(tree):
    return [np.asarray(shard.data).tobytes() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]

with TieredCheckpointer(f"{root}/shared", f"{root}/disk{rank}", every=4, log=print) as checkpoints:
    found = checkpoints.restore(state(1))
    step = 0 if found is None else found.step
    assert found is None or shards(found.state) == shards(state(step))
    print("restored", step, flush=True)
    for new in (4, 6) if found is None else ():
        assert checkpoints.save(new, state(new), metadata={})
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_a_local_step_counts_if_every_process_has_it(tmp_path):
    def both() -> set[str]:
        address = f"127.0.0.1:{free_port()}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        peers = [
            subprocess.Popen(
                [sys.executable, "-c", PEER, str(tmp_path), address, str(rank)],
                cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        outputs = [peer.communicate(timeout=120) for peer in peers]
        assert [peer.returncode for peer in peers] == [0, 0], outputs
        return {line for out, _ in outputs for line in out.splitlines() if line.startswith("restored")}

    assert both() == {"restored 0"}
    assert both() == {"restored 6"}
    files = [[path for path in (tmp_path / f"disk{rank}").rglob("*") if path.is_file()] for rank in (0, 1)]
    assert all(files) and (tmp_path / "shared" / "4").is_dir()
    shutil.rmtree(tmp_path / "disk1")  # one host was replaced
    assert both() == {"restored 4"}


def test_a_rewound_run_does_not_resume_from_the_local_steps_that_it_left(tmp_path):
    with TieredCheckpointer(tmp_path / "shared", tmp_path / "local", every=4) as checkpoints:
        for step in (4, 6):
            checkpoints.save(step, random_state(step, mesh_of(4, 2)), metadata={})
        assert checkpoints.newest(7) == 4
        checkpoints.abandon_after(4)
    assert restored(tmp_path) == 4
