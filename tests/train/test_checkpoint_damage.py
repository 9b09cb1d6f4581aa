"""Damaged steps are named and skipped, and unreadable ones are neither skipped nor deleted."""

import json
import os
import shutil
import threading
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from tests.train.checkpoints import (
    as_template,
    cheap,
    files_of,
    make_readable,
    make_unreadable,
    random_state,
    restore_copy,
    same_bits,
)
from train.checkpoint import COMMIT_FILE, Checkpointer, CheckpointError
from train.checkpoint_folder import CheckpointFolder
from train.checkpoint_reader import CheckpointReader
from train.commit import DamagedError, UnreadableError
from train.leaves import checksums

FILES = ("manifest.ocdbt", "_METADATA", "_sharding", COMMIT_FILE, "ocdbt.process_0", "d/", "array_metadatas")


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
