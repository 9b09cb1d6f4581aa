"""Checkpoints restore bit for bit on any mesh, and damaged steps are reported and skipped."""

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from train.checkpoint import COMMIT_FILE, STAGING_SUFFIX, Checkpointer, CheckpointError
from train.checkpoint_folder import CheckpointFolder
from train.checkpoint_reader import CheckpointReader
from train.commit import DamagedError, UnreadableError
from train.leaves import checksums, named_leaves

ROOT = Path(__file__).parents[2]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.uint32, jnp.bool_, jnp.float8_e4m3fn)
FILES = ("manifest.ocdbt", "_METADATA", "_sharding", COMMIT_FILE, "ocdbt.process_0", "d/", "array_metadatas")
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


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory) -> Path:
    """A folder with steps 1 and 2 that stays intact; tests damage copies of it."""
    folder = tmp_path_factory.mktemp("good")
    with Checkpointer(folder) as checkpointer:
        for step in (1, 2):
            assert checkpointer.save(step, random_state(step), metadata={"position": step}, wait=True)
    return folder


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


# ---------------------------------------------------------------------------------------------------- damage


def test_undamaged_copy_restores_the_newest(good_folder, tmp_path):
    restored, warnings = restore_copy(good_folder, tmp_path, lambda step: None)
    assert restored.step == 2 and not warnings and same_bits(restored.state, random_state(2))
    assert all(any(part in name for name in files_of(good_folder / "2")) for part in FILES)


def test_each_missing_or_truncated_file_is_named(good_folder, tmp_path):
    for name in files_of(good_folder / "2"):

        def remove(step, name=name):
            (step / name).unlink()

        def truncate(step, name=name):
            os.truncate(step / name, (step / name).stat().st_size // 2)

        for damage in (remove, truncate):
            restored, (warning,) = restore_copy(good_folder, tmp_path, damage)
            assert warning.startswith("step 2, ") and name in warning and warning.endswith("falling back to step 1")
            assert restored.step == 1 and same_bits(restored.state, random_state(1))
            assert restored.metadata == {"position": 1}


@cheap
@given(st.data())
def test_a_flipped_bit_never_gives_wrong_values(good_folder, tmp_path, data):
    name = data.draw(st.sampled_from(files_of(good_folder / "2")))
    size = (good_folder / "2" / name).stat().st_size
    offset, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))

    def flip(step):
        content = bytearray((step / name).read_bytes())
        content[offset] ^= 1 << bit
        (step / name).write_bytes(content)

    restored, warnings = restore_copy(good_folder, tmp_path, flip)
    assert same_bits(restored.state, random_state(restored.step))
    assert restored.metadata == {"position": restored.step}
    assert [restored.step, len(warnings)] in ([2, 0], [1, 1])
    if warnings:
        assert warnings[0].startswith("step 2, ") and "\n" not in warnings[0]


def test_a_flipped_bit_in_the_arrays_names_the_leaf(tmp_path):
    tree = {"params": {"w": jax.random.normal(jax.random.key(1), (700, 700)), "v": jnp.ones(3)}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, jax.tree.map(jnp.zeros_like, tree), metadata={})
        checkpointer.save(2, tree, metadata={})
    (file,) = (path for path in (tmp_path / "2").rglob("*") if path.is_file() and path.stat().st_size > 1 << 20)
    content = bytearray(file.read_bytes())
    at = content.index(np.asarray(tree["params"]["w"])[350].tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    warnings: list[str] = []
    with Checkpointer(tmp_path, log=warnings.append) as checkpointer:
        assert checkpointer.restore(tree).step == 1
    assert warnings == ["step 2, params/w: checksum mismatch; falling back to step 1"]


def test_a_garbled_commit_file_is_reported(good_folder, tmp_path):
    for garbage in (b"", b"{", b"\xff\xfe", b"[]", b"3", b"[" * 100_000, b"1" * 9999, b'{"body": {}, "crc32": 1}'):
        restored, (warning,) = restore_copy(
            good_folder, tmp_path, lambda s, g=garbage: (s / COMMIT_FILE).write_bytes(g)
        )
        assert restored.step == 1 and f"step 2, {COMMIT_FILE}" in warning


def test_edited_metadata_is_refused(good_folder, tmp_path):
    def edit(step):
        document = json.loads((step / COMMIT_FILE).read_text())
        document["body"]["metadata"]["position"] = 99
        (step / COMMIT_FILE).write_text(json.dumps(document))

    restored, (warning,) = restore_copy(good_folder, tmp_path, edit)
    assert restored.step == 1 and "checksum mismatch" in warning


def test_when_every_step_is_damaged_each_is_listed(good_folder, tmp_path):
    def damage(step):
        (step / COMMIT_FILE).unlink()
        (step.parent / "1" / "manifest.ocdbt").unlink()

    with pytest.raises(CheckpointError, match=r"(?s)no good.*step 2, commit.json is missing.*step 1, manifest.ocdbt"):
        restore_copy(good_folder, tmp_path, damage)


def test_an_explicit_step_does_not_fall_back(good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "2" / COMMIT_FILE).unlink()
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=r"step 2, commit\.json is missing"):
            checkpointer.restore(random_state(0), step=2)
        with pytest.raises(CheckpointError, match=r"step 7 is not in .* holds 1, 2"):
            checkpointer.restore(random_state(0), step=7)
        assert checkpointer.restore(random_state(0), step=1).step == 1


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (
            lambda s: s["params"].update(w=jnp.zeros((8, 16, 32), jnp.bfloat16)),
            r"params/w +float32\[8, 16, 32\] +bfloat16",
        ),
        (lambda s: s["params"].update(w=jnp.zeros((8, 16, 31))), r"params/w .*float32\[8, 16, 31\]"),
        (lambda s: s["params"].pop("w"), r"params/w +float32\[8, 16, 32\] +\(absent\)"),
        (lambda s: s["params"].update(v=jnp.zeros(3)), r"params/v +\(absent\) +float32\[3\]"),
        (lambda s: s.update(rng=jax.random.key(0, impl="rbg")), r"rng +key<fry>\[\] +key<rbg>\[\]"),
        (lambda s: s.update(rng=jax.random.key_data(s["rng"])), r"rng +key<fry>\[\] +uint32\[2\]"),
    ],
)
def test_a_mismatched_state_is_refused_with_a_table(good_folder, change, row):
    template = random_state(0)
    change(template)
    warnings: list[str] = []
    with (
        Checkpointer(good_folder, log=warnings.append, read_only=True) as checkpointer,
        pytest.raises(CheckpointError, match=f"(?s)step 2 .*leaf.*in the checkpoint.*{row}"),
    ):
        checkpointer.restore(template)
    assert not warnings


# ---------------------------------------------------------------------------------------------------- odd folders


def test_a_step_copied_under_another_name_is_damaged(good_folder, tmp_path):
    restored, (warning,) = restore_copy(good_folder, tmp_path, lambda two: shutil.copytree(two, two.with_name("37")))
    assert restored.step == 2 and "step 37, commit.json belongs to step 2" in warning and "back to step 2" in warning


def test_only_plain_numbers_are_steps(good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    for name in ("\u0663", "\u00b2", "007", "3.damaged", "+5", "99999999999", "3000000000"):
        shutil.copytree(good_folder / "2", tmp_path / name)
    (tmp_path / "9").write_text("a file")
    warnings: list[str] = []
    with Checkpointer(tmp_path, log=warnings.append) as checkpointer:
        assert checkpointer.steps() == [1, 2] and checkpointer.restore(random_state(0)).step == 2
        assert checkpointer.save(8, random_state(8), metadata={}, wait=True)
    assert warnings == [] and (tmp_path / "9").read_text() == "a file"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: [],
        lambda body: None,
        lambda body: body | {"step": "2"},
        lambda body: body | {"files": []},
        lambda body: body | {"files": {"a": 3}},
        lambda body: body | {"files": body["files"] | {"../1/manifest.ocdbt": {"size": 1}}},
        lambda body: body | {"leaves": {"w": {}}},
        lambda body: body | {"metadata": None},
        lambda body: body | {"metric": "low"},
        lambda body: {key: value for key, value in body.items() if key != "format"},
    ],
)
def test_a_malformed_commit_file_is_damage(good_folder, tmp_path, change):
    def edit(step):
        body = change(json.loads((step / COMMIT_FILE).read_text())["body"])
        crc32 = zlib.crc32(json.dumps(body, sort_keys=True).encode())
        (step / COMMIT_FILE).write_text(json.dumps({"crc32": crc32, "body": body}))

    restored, (warning,) = restore_copy(good_folder, tmp_path, edit)
    assert restored.step == 1 and "step 2, commit.json does not describe a checkpoint" in warning


# ---------------------------------------------------------------------------------------------------- read errors


def make_unreadable(file: Path) -> None:
    """Make the kernel fail to open a file (ELOOP), even for root. Its content is kept next to it."""
    file.rename(file.with_name(f"{file.name}.kept"))
    file.symlink_to(file)


def make_readable(file: Path) -> None:
    file.unlink()
    file.with_name(f"{file.name}.kept").rename(file)


@pytest.mark.parametrize("name", [COMMIT_FILE, "manifest.ocdbt", "the largest"])
def test_an_unreadable_step_stops_the_run_and_is_not_damaged(good_folder, tmp_path, name):
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    files = [file for file in (tmp_path / "2").rglob("*") if file.is_file()]
    file = tmp_path / "2" / name if name != "the largest" else max(files, key=lambda file: file.stat().st_size)
    make_unreadable(file)
    warnings: list[str] = []
    with Checkpointer(tmp_path, log=warnings.append, retry_waits=(0, 0)) as checkpointer:
        with pytest.raises(CheckpointError, match=rf"(?s)step 2 .*not be read in 3 tries: .*{file.name}.*nothing was"):
            checkpointer.restore(random_state(0))
        with pytest.raises(CheckpointError, match="already holds step 2"):  # nor can a save get past it
            checkpointer.save(1, random_state(1), metadata={})
    make_readable(file)
    with Checkpointer(tmp_path, log=warnings.append) as checkpointer:
        assert same_bits(checkpointer.restore(random_state(0)).state, random_state(2))
    assert warnings == []


def test_a_transient_read_error_is_retried(good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "2" / COMMIT_FILE
    make_unreadable(file)
    timer = threading.Timer(0.1, make_readable, [file])
    with Checkpointer(tmp_path, log=pytest.fail, retry_waits=(0.05, 0.2, 5)) as checkpointer:
        timer.start()
        assert checkpointer.restore(random_state(0)).step == 2
    timer.join()


class FailingHandler:
    """A stand-in for Orbax that fails as TensorStore does, with each of `messages` in turn, and then succeeds."""

    def __init__(self, *messages: str):
        self.messages = list(messages)

    def restore(self, path, args):
        if self.messages:
            raise ValueError(self.messages.pop(0))
        return {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in args.item.items()}


def read_with(handler, folder: Path) -> dict:
    leaves = {"w": np.ones(3, np.float32)}
    body = {"leaves": {"w": {"checksum": checksums(leaves)["w"]}}}
    steps = CheckpointFolder(epath.Path(folder), local=True, keep_last=1, keep_best=0, best_mode="min", log=print)
    return CheckpointReader(steps, handler, (0, 0)).read_verified(2, leaves, body)


def test_arrays_are_damaged_only_when_their_files_can_be_read(good_folder, tmp_path):
    assert (read_with(FailingHandler("UNAVAILABLE: try later", "odd"), good_folder)["w"] == 1).all()
    for message in ("PERMISSION_DENIED: no", "Error: DEADLINE_EXCEEDED reading d/12"):
        with pytest.raises(UnreadableError, match=message):
            read_with(FailingHandler(*[message] * 3), good_folder)
    with pytest.raises(DamagedError, match="DATA_LOSS"):
        read_with(FailingHandler(*["DATA_LOSS: checksum"] * 3), good_folder)
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    make_unreadable(tmp_path / "2" / "manifest.ocdbt")
    with pytest.raises(UnreadableError, match=r"manifest\.ocdbt"):
        read_with(FailingHandler(*["DATA_LOSS: checksum"] * 3), tmp_path)


def test_a_step_whose_metric_cannot_be_read_is_not_deleted(tmp_path):
    with Checkpointer(tmp_path, keep_last=1, keep_best=1, log=pytest.fail) as checkpointer:
        assert checkpointer.save(1, {"x": np.int32(1)}, metadata={}, metric=1.0, wait=True)
        make_unreadable(tmp_path / "1" / COMMIT_FILE)
        for step in (2, 3, 4):
            assert checkpointer.save(step, {"x": np.int32(step)}, metadata={}, metric=float(step), wait=True)
        make_readable(tmp_path / "1" / COMMIT_FILE)
        assert checkpointer.steps() == [1, 2, 4]
        assert checkpointer.restore({"x": np.int32(0)}, step=1).step == 1


# ---------------------------------------------------------------------------------------------------- verifying


def test_verify_reads_back_what_was_saved(good_folder, tmp_path):
    shutil.copytree(good_folder, tmp_path, dirs_exist_ok=True)
    with Checkpointer(tmp_path, retry_waits=(0,)) as checkpointer:
        checkpointer.verify(2, as_template(random_state(0), None))
        with pytest.raises(CheckpointError, match=r"step 3 of .* is damaged: commit\.json is missing"):
            checkpointer.verify(3, random_state(0))
        make_unreadable(tmp_path / "1" / COMMIT_FILE)
        with pytest.raises(CheckpointError, match=r"step 1 .*not be read in 2 tries"):
            checkpointer.verify(1, random_state(0))
    big = {"a": jnp.ones((600, 600)), "b": jax.random.normal(jax.random.key(1), (600, 600)), "empty": jnp.zeros((0,))}
    with Checkpointer(tmp_path / "big") as checkpointer:
        assert checkpointer.save(1, big, metadata={}, wait=True)
        checkpointer.verify(1, big)
        row = np.asarray(big["b"])[300].tobytes()
        files = [path for path in (tmp_path / "big" / "1").rglob("*") if path.is_file()]
        (file,) = (path for path in files if row in path.read_bytes())
        content = bytearray(file.read_bytes())
        content[content.index(row)] ^= 1
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"step 1 of .* is damaged: b: checksum mismatch"):
            checkpointer.verify(1, big)


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
