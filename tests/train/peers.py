"""A program, started by the tests, that is one of two processes under jax.distributed.

python -m tests.train.peers SCENARIO ADDRESS RANK FOLDER
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sharding.manual import gather_weight
from train.checkpoint import Checkpointer, CheckpointError
from train.peer_watch import join
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
    """Save on one mesh and restore on another. Damage or a full disk that one process finds affects both."""
    axis_types = (AxisType.Explicit,) * 2
    tall = jax.make_mesh((8, 1), ("data", "tensor"), axis_types=axis_types)
    wide = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=axis_types)
    warnings: list[str] = []
    free = [1e12, 1e12, 10.0]
    with Checkpointer(folder, log=warnings.append, free_bytes=lambda: free.pop(0), retry_waits=(0.1,)) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, make_state(tall, step), metadata={"position": step})
        checkpointer.verify(2, make_state(tall, 0))
        restored = checkpointer.restore(make_state(wide, 0))
        assert restored is not None and restored.step == 2 and restored.metadata == {"position": 2}
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
        assert restored is not None and restored.step == 1 and same(restored.state, make_state(wide, 1))
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
            raise AssertionError("an older step was restored instead of an unreadable one")
        except CheckpointError as error:
            assert "step 2" in str(error) and "not be read in 2 tries" in str(error), error
    print("checkpoints held", flush=True)


def stop(folder: Path) -> None:
    """Run until the peers agree to stop; the test sends SIGTERM to one of them."""
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
    print(f"stopped at {step}, requested here: {stop_signal.requested}", flush=True)


def crash(folder: Path) -> None:
    """Raise on rank 1, which without the hook would wait at exit for rank 0, which is busy."""
    exit_hard_on_exception()
    if jax.process_index() == 1:
        raise RuntimeError("injected\nin two lines")
    time.sleep(60)


def train_forever(folder: Path) -> None:
    """Sum over both processes repeatedly, as a run does, until one of them is killed."""
    exit_hard_on_exception()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.make_array_from_callback((8,), NamedSharding(mesh, P("data")), lambda index: np.ones(8)[index])
    total = jax.jit(lambda x: x.sum())
    for step in range(1_000_000):
        total(x).block_until_ready()
        if step == 5:
            (folder / f"running-{jax.process_index()}").write_text("")
        time.sleep(0.01)


def sums(folder: Path) -> None:
    """Check repeatedly that the gradient of a gathered weight of 32 MB is the exact sum over the processes.

    The weight and the factors are integers, which float32 adds exactly in any order.
    """
    mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(AxisType.Explicit,))
    rng = np.random.default_rng(0)
    factors = rng.integers(-99, 99, size=(2, 8192, 1024)).astype(np.float32)
    expected = factors.sum(0)

    def gradient(w, factor):
        return jax.grad(lambda w: (gather_weight(w, (("fsdp",), ())) * factor[0]).sum())(w)

    def place(x):
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P("fsdp")), lambda index: x[index])

    step = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp")))
    w, factor = place(np.ones_like(expected)), place(factors)
    wrong = 0
    for _ in range(40):
        for shard in step(w, factor).addressable_shards:
            wrong += int((np.asarray(shard.data) != expected[shard.index]).sum())
    print(f"wrong sums: {wrong}", flush=True)


if __name__ == "__main__":
    scenario, address, rank, folder = sys.argv[1:]
    join(2, int(rank), address=address)
    scenarios = {function.__name__: function for function in (checkpoints, stop, crash, train_forever, sums)}
    scenarios[scenario](Path(folder))
