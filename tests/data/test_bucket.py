"""Prepared data in a bucket: the bytes of a local folder, complete or absent, read by ranges, by each host its rows."""

import dataclasses
import itertools
import json
import re

import numpy as np
import pytest

from data.config import DataError
from data.paths import bucket_client, parse_path
from data.pipeline import heldout_windows, train_batches
from data.prepare import heldout_files, open_prepared, prepare
from data.ranges import BucketRanges, Range
from tests.data.test_shards import SECTION, contents, corpus
from tests.fake_bucket import use_fake_bucket
from tests.gcs_server import Fault


@pytest.fixture
def both(tmp_path):
    """Return (local, remote, config) of the same data, with `config` for the bucket."""
    use_fake_bucket()
    config = corpus(tmp_path)
    remote = dataclasses.replace(config, cache_dir=f"gs://bucket/{tmp_path.name}/cache")
    return prepare(config, section_bytes=SECTION), prepare(remote, section_bytes=SECTION), remote


def objects(folder) -> dict[str, bytes]:
    store = bucket_client()
    root = str(folder).partition("://")[2] + "/"
    return {path.removeprefix(root): store.cat_file(path) for path in store.find(str(folder))}


def test_a_bucket_holds_the_bytes_of_a_local_folder(both):
    local, remote, config = both
    assert str(remote.directory).startswith("gs://bucket/") and remote.identity == local.identity
    assert objects(remote.directory) == contents(local.directory)
    lines: list[str] = []
    assert prepare(config, lines.append, section_bytes=SECTION).identity == local.identity
    assert "found in the cache" in lines[-1]


def test_batches_from_a_bucket_equal_local_ones(both):
    local, remote, config = both
    with train_batches(local, config) as one, train_batches(remote, config) as other:
        for a, b in itertools.islice(zip(one, other, strict=True), 12):
            for name, array in a.arrays().items():
                np.testing.assert_array_equal(array, getattr(b, name))
    for name in local.heldout_names:
        assert heldout_files(local, name) == heldout_files(remote, name)
        for stride in (None, 7):
            options = {"batch_size": 4, "stride": stride, "max_windows": 9}
            pairs = zip(*(heldout_windows(p, name, **options) for p in (local, remote)), strict=True)
            for a, b in pairs:
                for field, array in a.arrays().items():
                    np.testing.assert_array_equal(array, getattr(b, field))


def test_each_host_requests_only_its_rows(both):
    _, remote, config = both
    steps, hosts = 5, 2
    window_bytes = (config.sequence_length + 1) * 4  # two arrays of uint16
    config = dataclasses.replace(config, prefetch=0)
    for host in range(hosts):
        opened = dataclasses.replace(remote)  # with an empty cache
        with train_batches(opened, config, process_index=host, process_count=hosts) as stream:
            assert opened.reader.requested_bytes == 0
            list(itertools.islice(stream, steps))
            windows = steps * config.batch_size // hosts
            assert 0 < opened.reader.requested_bytes <= windows * window_bytes
            assert opened.reader.requests <= 2 * windows
            before = opened.reader.requested_bytes
            stream.batch_at(0)  # its windows are in the cache
            assert opened.reader.requested_bytes == before


def test_heldout_windows_are_requested_once_and_by_host(both):
    _, remote, _ = both
    sizes = []
    for host, hosts in ((0, 1), (0, 2), (1, 2)):
        opened = dataclasses.replace(remote)
        list(heldout_windows(opened, "files", batch_size=4, process_index=host, process_count=hosts))
        counts = opened.counts("files")
        sizes.append(opened.reader.requested_bytes - 8 * (counts.heldout_documents + 1))
    tokens = 2 * counts.heldout_tokens
    assert tokens <= sizes[0] <= 1.05 * tokens  # windows overlap by one token
    assert sizes[1] < sizes[0] and tokens <= sizes[1] + sizes[2] <= 1.1 * tokens


def test_the_cache_of_ranges_is_bounded_and_exact():
    use_fake_bucket()
    folder = parse_path("gs://bucket/ranges")
    content = np.random.default_rng(0).bytes(10_000)
    (folder / "a").write_bytes(content)
    reader = BucketRanges(folder, cache_bytes=4_000)
    draw = np.random.default_rng(1)
    for _ in range(50):
        starts = draw.integers(0, 9_900, 8).tolist()
        ranges = [Range("a", start, start + int(draw.integers(1, 100))) for start in starts]
        assert reader.read(ranges) == [content[part.start : part.stop] for part in ranges]
        assert sum(len(part) for part in reader._cache.values()) <= 4_000
    before = reader.requests
    reader.read([Range("a", 10 * i, 10 * i + 10) for i in range(7)])  # touching ranges are requested as one
    assert reader.requests == before + 1
    for part, reason in (
        (Range("a", 9_990, 10_010), "only 10 of them"),
        (Range("b", 0, 5), "FileNotFoundError"),
    ):
        with pytest.raises(DataError, match=rf"ranges/{part.file}: bytes {part.start} to {part.stop} .*{reason}"):
            reader.read([part])


def test_an_interrupted_upload_leaves_no_folder_and_is_repeated(both, tmp_path):
    local, remote, config = both
    cache = parse_path(f"gs://bucket/{tmp_path.name}/again")
    config = dataclasses.replace(config, cache_dir=str(cache))
    store = use_fake_bucket()
    for name in ("tokenizer/", "train.files.00003-"):
        store.faults.append(Fault(rf"(POST|PUT) bucket/.*/again/.*{re.escape(name)}", 403))
        try:
            with pytest.raises(OSError):
                prepare(config, section_bytes=SECTION)
            assert store.faults[-1].seen
        finally:
            store.faults.pop()
        assert not (cache / remote.directory.name / "manifest.json").exists()
    assert prepare(config, section_bytes=SECTION).identity == local.identity
    assert objects(cache / remote.directory.name) == contents(local.directory)


@pytest.mark.parametrize("damage", ["truncated", "missing", "manifest"])
def test_a_damaged_folder_is_named_and_made_again(both, damage):
    local, remote, config = both
    victim = remote.directory / ("manifest.json" if damage == "manifest" else "tokenizer/tokenizer.json")
    if damage != "manifest":
        victim = next(p for p in remote.directory.iterdir() if p.name.startswith("train.files.00001-of"))
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[:-9])
    with pytest.raises(DataError, match=victim.name):
        open_prepared(remote.directory)
    lines: list[str] = []
    prepare(config, lines.append, section_bytes=SECTION)
    assert any("cache damaged" in line and victim.name in line for line in lines)
    assert objects(remote.directory) == contents(local.directory)


def test_a_bucket_that_cannot_be_reached_is_refused(tmp_path):
    store = use_fake_bucket()
    config = dataclasses.replace(corpus(tmp_path), cache_dir="gs://bucket/unreachable")
    store.faults.append(Fault(r"GET bucket", 403))
    try:
        with pytest.raises(DataError, match=r"data\.cache_dir = 'gs://bucket/un.*': the bucket cannot be reached"):
            prepare(config)
    finally:
        store.faults.pop()


def test_text_and_cache_may_both_be_in_a_bucket(both, tmp_path):
    local, _, config = both
    text = parse_path(f"gs://bucket/{tmp_path.name}/text")
    for path in (tmp_path / "s").iterdir():
        (text / path.name).write_bytes(path.read_bytes())
    sources = tuple(dataclasses.replace(source, path=str(text)) for source in config.sources)
    found = prepare(
        dataclasses.replace(config, sources=sources, cache_dir=f"gs://bucket/{tmp_path.name}/c2"),
        section_bytes=SECTION,
        keep_bytes=0,
    )
    assert found.identity == local.identity and objects(found.directory) == contents(local.directory)
    assert json.loads((found.directory / "manifest.json").read_bytes())["identity"] == local.identity
