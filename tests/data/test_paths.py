"""Paths are either local or gs://, and files are written atomically."""

import os
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from data.array_files import read_arrays, write_arrays
from data.paths import (
    PathError,
    file_size,
    is_local,
    list_names,
    parse_path,
    require_backend,
    write_whole,
)
from tests.fake_bucket import use_fake_bucket


def test_a_path_is_local_or_in_a_bucket():
    for text in ("runs/a", "/abs/run", ".", "a:b/c"):
        assert parse_path(text) == epath.Path(text) and is_local(parse_path(text))
    assert parse_path(Path("runs") / "a") == epath.Path("runs/a")
    bucket = parse_path("gs://bucket-1/runs/a")
    assert not is_local(bucket) and str(bucket / "b") == "gs://bucket-1/runs/a/b"
    assert parse_path(bucket) == bucket


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("s3://bucket/a", "not s3://"),
        ("https://host/a", "not https://"),
        ("gs://", "gs://BUCKET/NAME"),
        ("gs:///a", "gs://BUCKET/NAME"),
        ("gs://bucket//a", "gs://BUCKET/NAME"),
        (Path("gs://bucket/a"), "one slash instead of two"),  # pathlib removes one of them
        ("gs:/bucket/a", "one slash instead of two"),
        ("", "not a valid file name"),
        ("a\0b", "not a valid file name"),
        ("x" * 300, "300 bytes, .* at most 255"),
        ("runs/" + "é" * 128, "256 bytes"),
    ],
)
def test_other_paths_are_refused_with_field_value_and_fix(value, words):
    with pytest.raises(PathError, match=f"(?s)^--run = .*{words}.* Try ") as caught:
        parse_path(value, "--run")
    assert len(str(caught.value)) < 400


def test_a_bucket_without_gcsfs_is_refused(monkeypatch):
    import fsspec

    def missing(name):
        raise ImportError("Please install gcsfs")

    assert require_backend(parse_path("runs/a")) == epath.Path("runs/a")
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(PathError, match=r"--run = 'gs://bucket/a': .* pip install gcsfs"):
        require_backend(parse_path("gs://bucket/a"), "--run")


@pytest.mark.parametrize("local", [True, False])
def test_a_file_is_replaced_atomically(tmp_path, local):
    if not local:
        use_fake_bucket()
    file = parse_path(tmp_path if local else "gs://bucket/test_paths") / "a.json"
    for content in ("ü\n", b"\xff\0", ""):
        write_whole(file, content)
        assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
        assert file_size(file) == len(file.read_bytes())
    assert list_names(file.parent) == ["a.json"] and list_names(file.parent / "absent") == []


@pytest.mark.parametrize("local", [True, False])
def test_arrays_round_trip_and_a_truncated_file_is_refused(tmp_path, local):
    use_fake_bucket()
    file = parse_path(tmp_path if local else "gs://bucket/test_paths") / "a.npz"
    arrays = {"choices": np.arange(6, dtype=np.int16).reshape(2, 3), "none": np.zeros(0)}
    for compress in (True, False):
        write_arrays(file, arrays, compress=compress)
        found = read_arrays(file)
        assert found.keys() == arrays.keys() and all((found[name] == arrays[name]).all() for name in arrays)
        assert found["choices"].dtype == np.int16
    content = file.read_bytes()
    for cut in range(0, len(content), 37):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError):
            read_arrays(file)


def test_a_failed_write_leaves_no_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "folder", tmp_path / "absent" / "file"):
        with pytest.raises(OSError):
            write_whole(target, "text")
    assert os.listdir(tmp_path) == ["folder"]
