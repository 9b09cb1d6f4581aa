"""Sharded data: windows by arithmetic, equal bytes from any number of processes, and an identity that is pinned."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from data.config import DataError, SourceConfig, TokenizerConfig
from data.packing import target_weights
from data.pipeline import heldout_windows, train_batches
from data.prepare import heldout_files, open_prepared, prepare
from data.prepared import shard_stems
from data.storage import Checksums
from tests.data.conftest import byte_config, write_corpus
from tests.data.peers import results, start

SECTION = 3_000


def corpus(tmp_path, cache="cache", **changes):
    """Return a config with a source of files and a source of two files of lines."""
    if not (tmp_path / "s").exists():
        write_corpus(tmp_path / "s", 30)
        for name, first in (("a", 0), ("b", 40)):
            lines = [json.dumps({"text": f"line {first + i} " + "x" * (7 * i)}) for i in range(40)]
            (tmp_path / "s" / f"{name}.jsonl").write_text("\n".join(lines))
    files = SourceConfig(name="files", path=str(tmp_path / "s"))
    lines = dataclasses.replace(files, name="lines", include=("*.jsonl",), kind="jsonl")
    return byte_config(tmp_path, files, lines, **{"cache_dir": str(tmp_path / cache), **changes})


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_shards_predict_the_tokens_of_one_shard(tmp_path, packing):
    config = corpus(tmp_path, packing=packing)
    one, many = prepare(config), prepare(config, section_bytes=SECTION)
    assert one.identity != many.identity and one.counts("files").shards == ()
    for name in ("files", "lines"):
        whole, counts = one.counts(name), many.counts(name)
        assert len(counts.shards) > 2 and sum(counts.shards) == counts.windows == len(many.windows(name))
        assert dataclasses.replace(counts, windows=0, shards=()) == dataclasses.replace(whole, windows=0)
        pairs = []
        for prepared in (one, many):
            stems = shard_stems(name, len(prepared.counts(name).shards) or 1)
            parts = [
                np.concatenate([prepared.array(f"{stem}.{part}") for stem in stems])
                for part in ("tokens", "segment_ids")
            ]
            source = prepared.windows(name)
            for window, (tokens, segment_ids) in enumerate(zip(*parts, strict=True)):
                found = source.parse(window, prepared.reader.read(source.ranges(window)))
                np.testing.assert_array_equal(found[0], tokens)
                np.testing.assert_array_equal(found[1], segment_ids)
            scored = target_weights(parts[1]) > 0
            pairs.append(sorted(zip(parts[0][:, :-1][scored].tolist(), parts[0][:, 1:][scored].tolist(), strict=True)))
        assert pairs[0] == pairs[1]
        assert heldout_files(one, name) == heldout_files(many, name)
        for a, b in zip(*(heldout_windows(p, name, batch_size=4) for p in (one, many)), strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)


def test_a_stream_of_shards_resumes_exactly_and_divides_over_hosts(tmp_path):
    config = corpus(tmp_path)
    prepared = prepare(config, section_bytes=SECTION)
    with train_batches(prepared, config) as stream:
        whole = list(itertools.islice(stream, 30))  # several epochs
        state = json.loads(json.dumps(stream.get_state()))
    hosts = [train_batches(prepared, config, process_index=i, process_count=2) for i in range(2)]
    with hosts[0] as first, hosts[1] as second:
        for stream in (first, second):
            stream.set_state({**state, "step": 11})
        for expected in whole[11:]:
            parts = [next(stream).tokens for stream in (first, second)]
            np.testing.assert_array_equal(np.concatenate(parts), expected.tokens)


@pytest.mark.parametrize("kind", ["byte", "sentencepiece"])
def test_many_processes_write_the_bytes_of_one(tmp_path, kind):
    tokenizer = TokenizerConfig(kind=kind, vocab_size=300)
    alone = prepare(corpus(tmp_path, "alone", tokenizer=tokenizer), section_bytes=SECTION)
    shared = corpus(tmp_path, "shared", tokenizer=tokenizer)
    found = results(start(tmp_path, [shared] * 3, dict.fromkeys(range(3), f"section={SECTION}")))
    assert [result.get("error") for result in found] == [None] * 3
    assert contents(Path(found[0]["directory"])) == contents(alone.directory)
    assert len({result["identity"] for result in found} | {alone.identity}) == 1
    assert all(result["opened"] for result in found)  # each encoded a part
    assert {path.name.split("-")[0] for path in (tmp_path / "shared").iterdir()} <= {"packed", "tokenizer"}


def test_a_process_that_does_not_see_the_text_does_not_help(tmp_path):
    alone = prepare(corpus(tmp_path, "alone"), section_bytes=SECTION)
    shared = corpus(tmp_path, "shared")
    blind = dataclasses.replace(
        shared, sources=tuple(dataclasses.replace(s, path=str(tmp_path / "nowhere")) for s in shared.sources)
    )
    found = results(start(tmp_path, [shared, blind, shared], dict.fromkeys(range(3), f"section={SECTION}")))
    assert [result.get("error") for result in found] == [None] * 3
    assert contents(Path(found[0]["directory"])) == contents(alone.directory)
    assert found[1]["opened"] == {} and found[2]["opened"]
    assert any("does not see the text" in line for line in found[1]["lines"])


def test_text_that_a_helper_sees_changed_is_refused_everywhere(tmp_path):
    shared = corpus(tmp_path)
    other = corpus(tmp_path / "other") if (tmp_path / "other").mkdir() is None else shared
    for path in (tmp_path / "other" / "s").iterdir():
        path.write_bytes(path.read_bytes()[::-1])
    other = dataclasses.replace(other, cache_dir=shared.cache_dir)
    found = results(start(tmp_path, [shared, other], dict.fromkeys(range(2), f"section={SECTION}")))
    assert "changed while it was being read" in found[0]["error"] and "changed while" in found[1]["error"]
    assert not list((tmp_path / "cache").glob("*"))


def test_the_identity_of_unsharded_data_is_that_of_earlier_versions(tmp_path):
    """Runs refuse to resume on data of another identity, so that it must not change."""
    config = corpus(tmp_path)
    prepared = prepare(config)
    sources = []
    for source in config.sources:
        heldout = dict(heldout_files(prepared, source.name))
        train, held = [], []
        for path in sorted((tmp_path / "s").iterdir()):
            if source.kind == "jsonl" and path.suffix == ".jsonl":
                lines = path.read_text().splitlines()
                texts = [(f"{path.name}:{i}", json.loads(line)["text"]) for i, line in enumerate(lines, 1)]
            elif source.kind == "text" and path.suffix == ".py":
                texts = [(path.name, path.read_bytes().decode())]
            else:
                continue
            for name, text in texts:
                digest = hashlib.sha256(text.encode()).hexdigest()
                if name in heldout:
                    held.append([name, digest, len(text.encode())])
                else:
                    train.append(digest)
        sources.append([source.name, train, held])
    value = {
        "format": 2,
        "tokenizer": prepared.tokenizer.identity,
        "sequence_length": config.sequence_length,
        "packing": config.packing,
        "sources": sources,
    }
    assert prepared.identity == hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def test_a_folder_of_the_earlier_version_is_verified(tmp_path):
    """Its manifest has one checksum per file and no shards."""
    config = corpus(tmp_path)
    prepared = prepare(config)
    path = prepared.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    for source in manifest["sources"]:
        del source["shards"]
    for name, (size, _) in manifest["files"].items():
        (whole,) = Checksums.of(prepared.directory / name, size or 1).sums or [0]
        manifest["files"][name] = [size, whole]
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    assert open_prepared(prepared.directory).sources == prepared.sources
    victim = prepared.directory / "train.files.tokens.npy"
    victim.write_bytes(victim.read_bytes()[:-1] + b"#")
    with pytest.raises(DataError, match=r"tokens\.npy has the wrong checksum: its \d+ bytes were altered"):
        open_prepared(prepared.directory)


@pytest.mark.parametrize("parts", [[b""], [b"abcdefgh"], [b"abc", b"", b"defghij", b"k"]])
def test_checksums_name_blocks_however_bytes_are_written(tmp_path, parts):
    found = Checksums(4)
    for part in parts:
        found.update(part)
    (tmp_path / "a").write_bytes(b"".join(parts))
    read = Checksums.of(tmp_path / "a", 4)
    assert (found.size, found.sums) == (read.size, read.sums) and len(found.sums) == -(-found.size // 4)


def test_a_damaged_shard_is_named_and_made_again(tmp_path):
    config = corpus(tmp_path)
    prepared = prepare(config, section_bytes=SECTION)
    name = next(path.name for path in prepared.directory.glob("train.files.00002-of-*.tokens.npy"))
    victim = prepared.directory / name
    content = victim.read_bytes()
    for damaged, message in (
        (content[:-100], "bytes instead of"),
        (content[:-1] + bytes([content[-1] ^ 1]), "wrong checksum"),
        (None, "is missing"),
    ):
        if damaged is None:
            victim.unlink()
        else:
            victim.write_bytes(damaged)
        with pytest.raises(DataError, match=f"{name}.* {message}"):
            open_prepared(prepared.directory)
        lines: list[str] = []
        prepare(config, lines.append, section_bytes=SECTION)
        assert any(f"{name}" in line and message in line for line in lines) and victim.read_bytes() == content


def test_a_shard_that_disappears_or_shrinks_during_a_run_is_named_with_its_offset(tmp_path):
    config = dataclasses.replace(corpus(tmp_path), prefetch=0)
    prepared = prepare(config, section_bytes=SECTION)
    for path in prepared.directory.glob("train.lines.*"):
        path.write_bytes(path.read_bytes()[:200])
    with train_batches(prepared, config) as stream, pytest.raises(DataError) as caught:
        list(itertools.islice(stream, 20))
    assert "train.lines." in str(caught.value) and "the file has only" in str(caught.value)
    for path in prepared.directory.glob("train.files.*"):
        path.unlink()
    reopened = dataclasses.replace(prepared)  # has no open files
    with (
        train_batches(reopened, config) as stream,
        pytest.raises(DataError, match=r"bytes \d+ to \d+ .* \(No such file"),
    ):
        list(itertools.islice(stream, 20))
