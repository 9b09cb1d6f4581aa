"""Several processes prepare data once per cache, and all fail if one does. Uses real processes without JAX."""

import dataclasses
from pathlib import Path

import pytest

from data.config import SourceConfig, TokenizerConfig
from data.prepare import prepare
from tests.data.conftest import byte_config, write_corpus
from tests.data.peers import results, start

DOCUMENTS = 12


def config(tmp_path, cache="cache", **changes):
    """Return a config with a source of files, a source of one file with three lines, and a trained tokenizer."""
    if not (tmp_path / "s").exists():
        write_corpus(tmp_path / "s", DOCUMENTS)
        (tmp_path / "s" / "lines.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    files = SourceConfig(name="files", path=str(tmp_path / "s"))
    lines = dataclasses.replace(files, name="lines", include=("*.jsonl",), kind="jsonl")
    tokenizer = TokenizerConfig(vocab_size=300)
    return byte_config(tmp_path, files, lines, tokenizer=tokenizer, cache_dir=str(tmp_path / cache), **changes)


def names(cache: Path) -> list[str]:
    return sorted(path.name.split("-")[0] for path in cache.iterdir())


@pytest.mark.parametrize("caches", [["a", "a", "a"], ["a", "b", "a", "b"]])
def test_one_process_per_cache_reads_each_file_once(tmp_path, caches):
    found = results(start(tmp_path, [config(tmp_path, cache) for cache in caches]))
    assert [result.get("error") for result in found] == [None] * len(caches)
    assert len({result["identity"] for result in found}) == 1
    leaders = {cache: caches.index(cache) for cache in caches}
    for index, (cache, result) in enumerate(zip(caches, found, strict=True)):
        assert result["directory"].startswith(str(tmp_path / cache))
        if leaders[cache] == index:
            assert list(result["opened"].values()) == [1] * (DOCUMENTS + 1)
        else:
            assert result["opened"] == {}
            assert result["lines"][0].startswith(f"process {leaders[cache]} prepares the data")
    for cache in leaders:
        assert names(tmp_path / cache) == ["packed", "tokenizer"]


def test_rereading_text_gives_the_same_result_as_keeping_it_in_memory(tmp_path):
    kept = prepare(config(tmp_path, "kept"))
    (found,) = results(start(tmp_path, [config(tmp_path, "reread")], {0: "keep=0"}))
    assert found["identity"] == kept.identity
    for path in kept.directory.rglob("*.*"):
        assert (Path(found["directory"]) / path.relative_to(kept.directory)).read_bytes() == path.read_bytes()
    # A file is read by the survey, for training the tokenizer unless it is held out, and for encoding: once for the
    # held-out and once for the training documents, which the file of lines both has.
    heldout = kept.counts("files").heldout_documents
    assert sorted(found["opened"].values()) == [2] * heldout + [3] * (DOCUMENTS - heldout) + [4]


def test_the_error_of_a_leader_is_raised_everywhere(tmp_path):
    (tmp_path / "empty").mkdir()
    empty = byte_config(tmp_path, SourceConfig(name="none", path=str(tmp_path / "empty")))
    found = results(start(tmp_path, [empty] * 3))
    assert [result["kind"] for result in found] == ["DataError", "OtherProcessFailed", "OtherProcessFailed"]
    assert "source 'none' is empty" in found[0]["error"]
    assert [r["error"] for r in found[1:]] == [f"process 0 failed while preparing the data: {found[0]['error']}"] * 2


def test_the_error_of_a_waiting_process_is_raised_everywhere(tmp_path):
    (tmp_path / "file").write_text("")
    found = results(start(tmp_path, [config(tmp_path, "cache"), config(tmp_path, "file")]))
    assert found[1]["kind"] in ("FileExistsError", "NotADirectoryError")
    assert found[0]["error"].startswith(f"process 1 failed while preparing the data: {found[1]['kind']}: ")
    assert found[0]["opened"] == {}


def test_hosts_that_prepared_different_data_both_fail(tmp_path):
    one = config(tmp_path, "a")
    found = results(start(tmp_path, [one, dataclasses.replace(config(tmp_path, "b"), sequence_length=16)]))
    assert all("the hosts prepared different data" in result["error"] for result in found)


def test_an_interrupted_leader_stops_at_once_and_cleans_up(tmp_path):
    found = results(start(tmp_path, [config(tmp_path)] * 2, {0: "interrupt"}))
    assert found[0]["kind"] == "KeyboardInterrupt"
    assert found[1]["error"] == "process 0 failed while preparing the data: KeyboardInterrupt"
    assert names(tmp_path / "cache") == []


@pytest.mark.parametrize("interrupted", [0, 2])
def test_interrupting_a_waiting_process_ends_the_others(tmp_path, interrupted):
    """Process 1 leads its cache and is slow. The interrupt arrives while another process waits for it."""
    caches = ["a", "b", "c"]
    scenarios = {1: "slow", interrupted: "interrupt waiting"}
    found = results(start(tmp_path, [config(tmp_path, cache) for cache in caches], scenarios))
    assert found[interrupted]["kind"] == "KeyboardInterrupt"
    for index in {0, 1, 2} - {interrupted}:
        assert found[index]["error"] == (f"process {interrupted} failed while preparing the data: KeyboardInterrupt")
