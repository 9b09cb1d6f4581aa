"""The cache on disk: a full disk gives an error with numbers; leftovers are removed unless their writer is running."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.storage import discard, open_array, remove_leftovers, whole_folder
from tests.data.conftest import byte_config, write_corpus
from tests.data.peers import ROOT, results, start

NO_SPACE = (
    r"data.cache_dir: {cache} has no space for the prepared data \(\S+ needs [\d,]+ bytes and [\d,]+ bytes are free"
)


@pytest.mark.parametrize("limit", [100, 5_000, 12_000])
def test_a_file_size_limit_gives_an_error_with_numbers(tmp_path, limit):
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 12))
    (found,) = results(start(tmp_path, [config], {0: f"limit={limit}"}))
    assert found["kind"] == "DataError" and re.match(NO_SPACE.format(cache=re.escape(config.cache_dir)), found["error"])
    assert os.listdir(config.cache_dir) == []


def mount_of(disk: Path, size: str) -> str:
    """Return the beginning of a shell script that mounts a file system of this size at the new folder `disk`."""
    disk.mkdir()
    mount = f"mount -t tmpfs -o size={size} none {disk} && "
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount + "true"]).returncode:
        pytest.skip("file systems cannot be mounted here")
    return mount


def test_a_full_disk_gives_an_error_with_numbers(tmp_path):
    """The cache is on a private file system of 64 KiB."""
    mount = mount_of(tmp_path / "disk", "64k")
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 40), cache_dir=str(tmp_path / "disk" / "cache"))
    script = f'{mount} "$@"; test -z "$(ls {config.cache_dir})" || echo null'  # null: a leftover
    (found,) = results(start(tmp_path, [config], None, "unshare", "-rm", "sh", "-c", script, "sh"))
    assert re.match(NO_SPACE.format(cache=re.escape(config.cache_dir)), found["error"])
    needed, free = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", found["error"]))
    assert needed > free and free <= 2**16


def test_a_disk_too_small_for_all_shards_is_refused_before_they_are_written(tmp_path):
    """The cache is on a private file system of 256 KiB, and a shard fits."""
    mount = mount_of(tmp_path / "disk", "256k")
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 160), cache_dir=str(tmp_path / "disk" / "cache"))
    script = f'{mount} "$@"; test -z "$(ls {config.cache_dir})" || echo null'  # null: a leftover
    (found,) = results(start(tmp_path, [config], {0: "section=9000"}, "unshare", "-rm", "sh", "-c", script, "sh"))
    assert re.search(r"no space .* \(it needs about [\d,]+ bytes and [\d,]+ bytes are free\)", found["error"])
    needed, free = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+) bytes", found["error"]))
    tokens = sum(path.stat().st_size + 2 for path in (tmp_path / "s").iterdir())  # a fifth is held out
    assert 0.7 * 4 * tokens < needed < 1.1 * 4 * tokens and free <= 2**18 < needed


def test_an_array_file_equals_one_that_numpy_saves(tmp_path):
    expected = np.arange(21, dtype=np.uint16).reshape(7, 3)
    with open_array(tmp_path / "a.npy", expected.shape, expected.dtype) as write:
        for block in (expected[:4].astype(np.int32), expected[4:]):
            write(block)
    np.save(tmp_path / "b.npy", expected)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def writer(cache: Path) -> subprocess.Popen:
    """Start a process that is writing a folder."""
    code = (
        "import sys, time; from pathlib import Path; from data.storage import whole_folder\n"
        f"with whole_folder(Path({str(cache)!r}) / 'packed') as folder:\n"
        "    (folder / 'part').write_text('x'); print('writing', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_leftovers_are_removed_unless_their_writer_is_running(tmp_path):
    with writer(tmp_path) as living, writer(tmp_path) as killed:
        try:
            assert remove_leftovers(tmp_path) == [] and len(os.listdir(tmp_path)) == 2
            killed.kill()
            killed.wait()
            assert len(remove_leftovers(tmp_path)) == 1 and len(os.listdir(tmp_path)) == 1
        finally:
            killed.kill()
            living.kill()
    assert len(remove_leftovers(tmp_path)) == 1 and os.listdir(tmp_path) == []


def test_folders_without_a_lock_are_leftovers_after_a_day(tmp_path):
    for name in ("writing-new", "writing-old", "sharing-new", "sharing-old", "packed-old"):
        (tmp_path / name / "part").mkdir(parents=True)
        if name.endswith("old"):
            for path in (tmp_path / name / "part", tmp_path / name):
                os.utime(path, (0, 0))
    (tmp_path / "writing-old" / "lock").write_text("another host")
    os.utime(tmp_path / "writing-old" / "lock", (0, 0))
    os.utime(tmp_path / "writing-old", (0, 0))
    (tmp_path / "writing-new" / "lock").write_text("another host")
    assert remove_leftovers(tmp_path) == ["sharing-old", "writing-old"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_is_complete_or_absent(tmp_path, error):
    with pytest.raises(error), whole_folder(tmp_path / "a") as folder:
        (folder / "part").write_text("")
        raise error
    assert os.listdir(tmp_path) == []
    for _ in range(2):  # a second writer of the same content keeps the first one's folder
        with whole_folder(tmp_path / "a") as folder:
            (folder / "part").write_text("whole")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a" / "part").read_text() == "whole"
    discard(tmp_path / "a", "part")
    discard(tmp_path / "a", "part")
    assert os.listdir(tmp_path) == []
