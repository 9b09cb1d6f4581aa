"""Checkpoints restore bit for bit on any mesh, from disks and buckets, and a save that fails leaves the older steps."""

import math
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.train.checkpoints import DTYPES, as_template, cheap, mesh_of, random_state, same_bits
from train.checkpoint import COMMIT_FILE, STAGING_SUFFIX, Checkpointer, CheckpointError
from train.leaves import checksums, named_leaves

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------- checksums


@cheap
@given(st.sampled_from(DTYPES), st.sampled_from([(), (5, 3)]), st.data())
def test_a_flip_of_one_bit_changes_the_checksum(dtype, shape, data):
    x = (
        np.asarray(
            jax.random.normal(jax.random.key(0), shape) > 0
            if dtype == jnp.bool_
            else jax.random.normal(jax.random.key(0), shape) * 50
        )
        .astype(dtype)
        .reshape(shape)
    )
    flipped = x.copy().reshape(-1)
    at = data.draw(st.integers(0, flipped.size - 1))
    if dtype == jnp.bool_:
        flipped[at] = not flipped[at]
    else:
        flipped.view(np.uint8)[at * x.itemsize] ^= 1 << data.draw(st.integers(0, 7))
    sums = checksums({"x": jnp.asarray(x), "numpy": x, "flipped": jnp.asarray(flipped.reshape(shape))})
    assert sums["x"] == sums["numpy"] != sums["flipped"]


def test_checksum_detects_cancelling_changes_and_order():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    variants = {
        "x": x,
        "two signs": x.at[3, 5].multiply(-1).at[9, 2].multiply(-1),
        "transposed": x.T,
        "negated": -x,
        "swapped": x.at[0, 0].set(x[0, 1]).at[0, 1].set(x[0, 0]),
        "reversed": x[::-1],
        "zeros": jnp.zeros((64, 64)),
    }
    assert len(set(checksums(variants).values())) == len(variants)


def test_checksum_does_not_depend_on_the_mesh():
    def some(mesh):
        state = random_state(3, mesh)
        return {"w": state["params"]["w"], "bias": state["params"]["bias"]}

    assert checksums(some(None)) == checksums(some(mesh_of(4, 2)))


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    ("saved_on", "restored_on"),
    [(None, None), (None, (4, 2)), ((4, 2), (4, 2)), ((4, 2), (2, 2)), ((4, 2), (8,)), ((2, 2), None)],
)
def test_restores_bit_for_bit_on_another_mesh(tmp_path, saved_on, restored_on):
    state = random_state(1, saved_on and mesh_of(*saved_on))
    template = as_template(state, mesh_of(*restored_on)) if restored_on else random_state(0)
    metadata = {"data": {"position": 7, "é": [1.5, None]}}
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(3, state, metadata=metadata)
        restored = checkpointer.restore(template)
    assert restored.step == 3 and restored.metadata == metadata
    assert same_bits(restored.state, state)
    for name, leaf in named_leaves(template).items():
        found = named_leaves(restored.state)[name]
        if isinstance(leaf, jax.ShapeDtypeStruct):
            assert found.sharding == leaf.sharding, name
        else:
            assert isinstance(found, type(leaf)), name
    # An uncommitted leaf must not be restored to a committed array on a device outside the mesh.
    assert np.isfinite(
        jax.jit(lambda s: s["w"].sum() + jax.random.key_data(s["streams"]).sum())(
            restored.state["params"] | restored.state
        )
    )


def test_donated_buffers_are_safe_after_save(tmp_path):
    step_fn = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.5 + 1, tree), donate_argnums=0)
    with Checkpointer(tmp_path, keep_last=9) as checkpointer:
        state = {
            "a": jnp.arange(400_000.0),
            "b": jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh_of(4, 2), P("data", "tensor"))),
        }
        expected = {}
        for step in range(4):
            expected[step] = jax.tree.map(np.array, state)
            checkpointer.save(step, state, metadata={})
            for _ in range(5):
                state = step_fn(state)
        for step, tree in expected.items():
            assert same_bits(checkpointer.restore(tree, step=step).state, tree)


def test_an_empty_folder_restores_nothing(tmp_path):
    with Checkpointer(tmp_path / "new" / "run") as checkpointer:
        assert checkpointer.restore(random_state(0)) is None
        assert checkpointer.steps() == []


# ---------------------------------------------------------------------------------------------------- object stores


def test_in_a_bucket_a_step_is_valid_once_its_commit_file_exists(good_folder, tmp_path):
    """`local=False` on a disk simulates a bucket, whose folders cannot be renamed."""
    warnings: list[str] = []
    with Checkpointer(tmp_path, local=False, keep_last=2, log=warnings.append) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, random_state(step), metadata={"position": step}, wait=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
        assert same_bits(checkpointer.restore(random_state(0)).state, random_state(2))
    shutil.copytree(tmp_path / "2", tmp_path / "3")  # a save that was killed: all arrays, no commit.json
    (tmp_path / "3" / COMMIT_FILE).unlink()
    with Checkpointer(tmp_path, local=False, read_only=True) as checkpointer:
        assert checkpointer.steps() == [1, 2] and (tmp_path / "3").exists()
    with Checkpointer(tmp_path, local=False, log=warnings.append) as checkpointer:
        assert not (tmp_path / "3").exists()
        assert checkpointer.restore(random_state(0)).step == 2
        assert checkpointer.save(3, random_state(3), metadata={}, wait=True)
        assert checkpointer.steps() == [2, 3]
    assert warnings == []


def test_in_a_bucket_a_failed_save_invalidates_its_step_first(tmp_path):
    """If a second save of a step is cut short, neither its old commit.json nor its new arrays count as a checkpoint."""
    warnings: list[str] = []
    big = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path, local=False, log=warnings.append) as checkpointer:
        assert checkpointer.save(1, big, metadata={}, wait=True) and checkpointer.save(2, big, metadata={}, wait=True)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            assert not checkpointer.save(2, big, metadata={}, wait=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpointer.steps() == [1] and checkpointer.restore(big).step == 1
        assert "save of step 2 failed: " in warnings[0] and warnings[0].endswith("last good step 1")


def test_a_path_of_another_scheme_is_refused():
    with pytest.raises(CheckpointError, match=r"checkpoints = 's3://bucket/run': .* gs://"):
        Checkpointer("s3://bucket/run")


# ---------------------------------------------------------------------------------------------------- failed saves


def test_a_full_disk_is_reported_and_the_next_save_tries_again(tmp_path):
    warnings: list[str] = []
    free = [math.inf, 1000.0, math.inf]
    with Checkpointer(tmp_path, log=warnings.append, free_bytes=lambda: free.pop(0)) as checkpointer:
        assert checkpointer.save(2, random_state(2), metadata={}, wait=True)
        assert not checkpointer.save(4, random_state(4), metadata={})
        assert checkpointer.steps() == [2]
        assert len(warnings) == 1 and "save of step 4 failed: no space left in" in warnings[0]
        assert warnings[0].endswith("last good step 2")
        assert checkpointer.save(6, random_state(6), metadata={}, wait=True)
        assert same_bits(checkpointer.restore(random_state(0)).state, random_state(6))


def test_a_failed_write_is_reported_and_cleaned_up(tmp_path):
    """A file size limit makes the kernel fail the asynchronous write midway."""
    warnings: list[str] = []
    big = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpointer(tmp_path, log=warnings.append) as checkpointer:
        assert checkpointer.save(2, big, metadata={}, wait=True)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            assert not checkpointer.save(4, big, metadata={}, wait=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "save of step 4 failed: " in warnings[0] and warnings[0].endswith("last good step 2")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["2"]
        assert checkpointer.save(6, big, metadata={}, wait=True) and checkpointer.steps() == [2, 6]


def test_invalid_arguments_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/proc/cannot/be/made"):
        with pytest.raises(CheckpointError, match="cannot be written to"):
            Checkpointer(path)
    with pytest.raises(CheckpointError, match="not a directory of checkpoints"):
        Checkpointer(tmp_path / "absent", read_only=True)
    with pytest.raises(ValueError, match="keep_last = 0"):
        Checkpointer(tmp_path, keep_last=0)
    with pytest.raises(ValueError, match="best_mode = 'low'"):
        Checkpointer(tmp_path, best_mode="low")
    with Checkpointer(tmp_path / "run") as checkpointer:
        with pytest.raises(TypeError, match="steps is a int"):
            checkpointer.save(1, {"steps": 3}, metadata={})
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpointer.save(1, {"x": jnp.ones(3)}, metadata={"x": jnp.ones(3)})
        with pytest.raises(ValueError, match="both named 'a/b'"):
            checkpointer.save(1, {"a": {"b": jnp.ones(3)}, "a/b": jnp.ones(3)}, metadata={})
        assert checkpointer.steps() == []


# ---------------------------------------------------------------------------------------------------- retention


@settings(cheap, max_examples=6)
@given(
    st.lists(st.sampled_from([None, math.nan, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=5),
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from(["min", "max"]),
)
def test_the_last_and_the_best_steps_are_kept(tmp_path_factory, metrics, keep_last, keep_best, mode):
    folder = tmp_path_factory.mktemp("retention")
    kept: set[int] = set()
    with Checkpointer(folder, keep_last=keep_last, keep_best=keep_best, best_mode=mode) as checkpointer:
        for step, metric in enumerate(metrics):
            assert checkpointer.save(step, {"x": np.int32(step)}, metadata={}, metric=metric, wait=True)
            kept.add(step)
            scored = [s for s in kept if metrics[s] is not None and not math.isnan(metrics[s])]
            best = sorted(scored, key=lambda s: (metrics[s] if mode == "min" else -metrics[s], -s))[:keep_best]
            kept = set(sorted(kept)[-keep_last:]) | set(best)
            assert checkpointer.steps() == sorted(kept)


def test_a_run_that_did_not_restore_does_not_overwrite(good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match="already holds step 2; restore from it first"):
            checkpointer.save(1, random_state(1), metadata={})
        assert checkpointer.steps() == [1, 2]


@pytest.mark.parametrize("local", [True, False])
def test_after_a_fallback_the_damaged_step_is_set_aside(good_folder, tmp_path, local):
    for next_step, left in ((2, [1, 2]), (3, [1, 3])):
        folder = tmp_path / str(next_step)
        shutil.copytree(good_folder, folder)
        os.truncate(folder / "2" / "manifest.ocdbt", 10)
        with Checkpointer(folder, log=lambda message: None, local=local) as checkpointer:
            assert checkpointer.restore(random_state(0)).step == 1
            assert checkpointer.save(next_step, random_state(9), metadata={}, wait=True)
            assert checkpointer.steps() == left
            assert same_bits(checkpointer.restore(random_state(0)).state, random_state(9))
        with Checkpointer(folder, log=lambda message: pytest.fail(message), local=local) as checkpointer:
            assert checkpointer.steps() == left
        aside = folder / ("2.damaged" if local else "2")
        assert (aside / "manifest.ocdbt").stat().st_size == 10 or (next_step == 2 and not local)


@pytest.mark.parametrize("local", [True, False])
def test_rewinding_sets_later_steps_aside_once_the_new_one_is_saved(good_folder, tmp_path, local):
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2.abandoned").mkdir()  # from an earlier rewind
    warnings: list[str] = []
    with Checkpointer(tmp_path, log=warnings.append, keep_last=5, local=local) as checkpointer:
        checkpointer.restore(random_state(0), step=1)
        assert checkpointer.save(1, random_state(8), metadata={}, wait=True) and checkpointer.steps() == [1]
        assert len(warnings) == 1 and "set aside steps 2" in warnings[0]
        assert same_bits(checkpointer.restore(random_state(0)).state, random_state(8))
        if local:  # a user may undo it
            (tmp_path / "2.abandoned-1").rename(tmp_path / "2")
        else:
            (tmp_path / "2" / "set_aside").unlink()
        assert same_bits(checkpointer.restore(random_state(0)).state, random_state(2))


def test_a_failed_clean_up_is_not_a_failed_save(tmp_path):
    warnings: list[str] = []
    with Checkpointer(tmp_path / "run", log=warnings.append, keep_last=1) as checkpointer:
        assert checkpointer.save(1, {"x": np.int32(1)}, metadata={}, wait=True)
        (tmp_path / "run" / "1").rename(tmp_path / "elsewhere")
        (tmp_path / "run" / "1").symlink_to(tmp_path / "elsewhere")  # a folder that rmtree cannot remove
        assert checkpointer.save(2, {"x": np.int32(2)}, metadata={}, wait=True)
    (warning,) = warnings
    assert "step 2 is saved, but" in warning and "1 could not be removed" in warning and "failed:" not in warning


# ---------------------------------------------------------------------------------------------------- kill -9

KILLED = """
import os, signal, sys
import jax.numpy as jnp
from train.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
state = {"w": jnp.arange(8_000_000.0)}
assert checkpointer.save(1, state, metadata={}, wait=True)
checkpointer.save(2, state, metadata={})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_save_that_is_killed_leaves_the_older_step(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any(STAGING_SUFFIX in path.name for path in tmp_path.iterdir())
    template = {"w": jax.ShapeDtypeStruct((8_000_000,), jnp.float32)}
    with Checkpointer(tmp_path, read_only=True) as checkpointer:  # a reader does not remove the leftovers
        assert checkpointer.restore(template).step == 1
        assert len(list(tmp_path.iterdir())) > 1
    with Checkpointer(tmp_path) as checkpointer:
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        assert checkpointer.restore(template).step == 1
        assert checkpointer.save(2, {"w": jnp.ones(3)}, metadata={}, wait=True)
