"""One of two processes under jax.distributed, on 4 virtual devices each; started by the tests as a program.

python -m tests.train.peers SCENARIO ADDRESS RANK FOLDER
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.checkpoint import Checkpointer, CheckpointError
from train.signals import StopSignal, exit_hard_on_exception


def make_state(mesh: jax.sharding.Mesh, seed: int) -> dict:
    w = np.random.default_rng(seed).normal(size=(1000, 800)).astype(np.float32)

    def place(x, *spec):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P(*spec)), lambda index: x[index])

    return {
        "w": place(w, *mesh.axis_names),
        "b": place(w[0]),
        "host": np.int64(seed),
        "own": jax.numpy.int32(seed),
        "rng": jax.random.key(seed),
    }


def same(a: dict, b: dict) -> bool:
    pairs = zip(a["w"].addressable_shards, b["w"].addressable_shards, strict=True)
    return (
        all(np.array_equal(x.data, y.data) for x, y in pairs)
        and np.array_equal(a["b"], b["b"])
        and a["host"] == b["host"]
        and int(a["own"]) == int(b["own"])
        and bool((a["rng"] == b["rng"]).all())
    )


def checkpoints(folder: Path) -> None:
    """Save on one mesh, restore on another; damage seen by one process makes both fall back; a full disk is shared."""
    axis_types = (AxisType.Explicit,) * 2
    tall = jax.make_mesh((8, 1), ("data", "tensor"), axis_types=axis_types)
    wide = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=axis_types)
    warnings: list[str] = []
    free = [1e12, 1e12, 10.0]
    with Checkpointer(folder, warn=warnings.append, free_bytes=lambda: free.pop(0), retry_waits=(0.1,)) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, make_state(tall, step), metadata={"position": step})
        checkpointer.verify(2, make_state(tall, 0))
        restored = checkpointer.restore(make_state(wide, 0))
        assert restored.step == 2 and restored.metadata == {"position": 2}
        assert same(restored.state, make_state(wide, 2))
        assert not checkpointer.save(3, make_state(tall, 3), metadata={})
        assert checkpointer.steps() == [1, 2]
        if jax.process_index() == 0:
            assert "save of step 3 failed: no space left" in warnings.pop()
            (file, *_) = sorted((folder / "2" / "ocdbt.process_1" / "d").iterdir(), key=lambda f: -f.stat().st_size)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        restored = checkpointer.restore(make_state(wide, 0))
        assert restored.step == 1 and same(restored.state, make_state(wide, 1))
        assert len(warnings) == 1 and "step 2, w: checksum mismatch; falling back to step 1" in warnings[0]
        try:
            checkpointer.restore({"w": make_state(wide, 0)["w"]})
            raise AssertionError("another state was accepted")
        except CheckpointError as error:
            assert "(absent)" in str(error)
        commit = folder / "2" / "commit.json"
        if jax.process_index() == 0:
            commit.rename(folder / "kept")
            commit.symlink_to(commit)
        jax.experimental.multihost_utils.sync_global_devices("unreadable")
        try:
            checkpointer.restore(make_state(wide, 0))
            raise AssertionError("an older step was taken for one that cannot be read")
        except CheckpointError as error:
            assert "step 2" in str(error) and "not be read in 2 tries" in str(error), error
    print("checkpoints held", flush=True)


def stop(folder: Path) -> None:
    """Runs until the peers agree to stop; one of them is sent SIGTERM by the test."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.make_array_from_callback((8,), NamedSharding(mesh, P("data")), lambda index: np.ones(8)[index])
    total = jax.jit(lambda x: x.sum())
    with StopSignal() as stop_signal:
        for step in range(100_000):
            total(x).block_until_ready()
            if step == 5:
                (folder / f"running-{jax.process_index()}").write_text("")
            if stop_signal.agreed(step):
                break
            time.sleep(0.002)
    print(f"stopped at {step}, asked here: {stop_signal.requested}", flush=True)


def crash(folder: Path) -> None:
    """Rank 1 raises; without the hook it would wait at exit for rank 0, which waits for it."""
    exit_hard_on_exception()
    if jax.process_index() == 1:
        raise RuntimeError("injected")
    time.sleep(60)


if __name__ == "__main__":
    scenario, address, rank, folder = sys.argv[1:]
    jax.distributed.initialize(address, num_processes=2, process_id=int(rank))
    {"checkpoints": checkpoints, "stop": stop, "crash": crash}[scenario](Path(folder))
