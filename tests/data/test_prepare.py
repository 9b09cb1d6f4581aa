"""Prepared folders: counts add up, equal content hits the cache, and damaged folders are made again."""

import dataclasses
import json

import pytest

from data.config import DataError, SourceConfig, TokenizerConfig
from data.corpus import find_files
from data.prepare import heldout_files, open_prepared, prepare
from tests.data.conftest import byte_config, write_corpus


def folders(root, prefix=""):
    return sorted(path.name for path in (root / "cache").iterdir() if path.name.startswith(prefix))


def test_counts_add_up_to_the_files(two_sources):
    prepared, config = two_sources
    for source in config.sources:
        counts = prepared.counts(source.name)
        sizes = [path.stat().st_size for _, path in find_files(source)]
        assert counts.documents == counts.train_documents + counts.heldout_documents == len(sizes)
        assert counts.train_bytes + counts.heldout_bytes == sum(sizes)
        # Tokens are bytes here, and every document has two end tokens.
        assert counts.train_tokens == counts.train_bytes + 2 * counts.train_documents
        assert counts.heldout_tokens == counts.heldout_bytes + 2 * counts.heldout_documents
        assert counts.max_id < prepared.vocab_size
        assert len(prepared.array(f"train.{source.name}.tokens")) == counts.windows
    with pytest.raises(DataError, match="no source named 'x'"):
        prepared.counts("x")


def test_heldout_files_are_complete_and_not_trained_on(two_sources):
    prepared, config = two_sources
    for source in config.sources:
        files = heldout_files(prepared, source.name)
        assert sum(len(text.encode()) for _, text in files) == prepared.counts(source.name).heldout_bytes
        on_disk = dict(find_files(source))
        assert all(on_disk[name].read_text(encoding="utf-8") == text for name, text in files)
        tokens, segment_ids = (prepared.array(f"train.{source.name}.{part}") for part in ("tokens", "segment_ids"))
        trained = prepared.tokenizer.decode(tokens[segment_ids > 0])
        assert not any(text[:20] in trained for _, text in files)


def test_line_ends_and_separators_survive(tmp_path):
    source = write_corpus(tmp_path / "s", 3)
    text = "a\r\nb\rc\u2028d\x85e\u2581f\0\ufeff"
    (tmp_path / "s" / "odd.py").write_bytes(text.encode())
    prepared = prepare(byte_config(tmp_path, sources=(write_corpus(tmp_path / "t", 2),), evaluation_sources=(source,)))
    assert dict(heldout_files(prepared, "s"))["odd.py"] == text


def test_evaluation_sources_are_held_out_and_removed_from_training(tmp_path):
    train = write_corpus(tmp_path / "train", 6)
    evaluation = write_corpus(tmp_path / "evaluation", 2)
    leak = (tmp_path / "evaluation" / "000.py").read_bytes()
    (tmp_path / "train" / "leak.py").write_bytes(leak)
    prepared = prepare(byte_config(tmp_path, train, evaluation_sources=(evaluation,), holdout_fraction=0))
    assert prepared.train_names == ("train",) and prepared.heldout_names == ("evaluation",)
    assert prepared.counts("train").duplicates == 1 and prepared.counts("train").train_documents == 6
    assert leak.decode() in dict(heldout_files(prepared, "evaluation")).values()
    with pytest.raises(DataError, match="has no held-out documents"):
        heldout_files(prepared, "train")


def test_the_cache_is_hit_only_by_equal_content(tmp_path):
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 8))
    first = prepare(config)
    changed_batch = dataclasses.replace(config, batch_size=4, seed=7, temperature=2.0)
    assert prepare(config).identity == prepare(changed_batch).identity == first.identity
    assert folders(tmp_path) == [first.directory.name]
    (tmp_path / "s").rename(tmp_path / "moved")
    moved = byte_config(tmp_path, SourceConfig(name="s", path=str(tmp_path / "moved")))
    assert prepare(moved).identity == first.identity
    others = [dataclasses.replace(moved, **change) for change in ({"sequence_length": 16}, {"packing": "best_fit"})]
    (tmp_path / "moved" / "new.py").write_text("one more")
    assert len({first.identity, *(prepare(c).identity for c in [moved, *others])}) == 4


def test_the_tokenizer_is_trained_once_and_on_training_text_only(tmp_path):
    source = write_corpus(tmp_path / "s", 10)
    config = byte_config(tmp_path, source, tokenizer=TokenizerConfig(vocab_size=300))
    first = prepare(config)
    again = prepare(dataclasses.replace(config, sequence_length=16))
    assert again.tokenizer.identity == first.tokenizer.identity and again.identity != first.identity
    assert len(folders(tmp_path, "tokenizer-")) == 1 and len(folders(tmp_path)) == 3
    assert open_prepared(first.directory).tokenizer.identity == first.tokenizer.identity
    heldout = tmp_path / "s" / heldout_files(first, "s")[0][0]
    heldout.unlink()  # held-out text must not affect the vocabulary
    assert prepare(config).tokenizer.identity == first.tokenizer.identity


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_truncated_file_is_named_and_made_again(tmp_path, size):
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 8))
    prepared = prepare(config)
    path = prepared.directory / "train.s.tokens.npy"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    held = len(content[:size])
    with pytest.raises(DataError, match=rf"train\.s\.tokens\.npy has {held} bytes instead of {len(content)}"):
        open_prepared(prepared.directory)
    lines: list[str] = []
    assert prepare(config, lines.append).identity == prepared.identity
    assert any("cache damaged" in line and f"has {held} bytes instead" in line for line in lines)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "victim", ["train.s.segment_ids.npy", "heldout.s.jsonl", "tokenizer/tokenizer.json", "manifest.json"]
)
def test_a_missing_or_altered_file_is_named_and_made_again(tmp_path, victim):
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 8))
    path = prepare(config).directory / victim
    content = path.read_bytes()
    for damage in (path.unlink, lambda: path.write_bytes(content[:-2] + b"#" + content[-1:])):
        damage()
        with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
            open_prepared(path.parents[victim.count("/")])
        prepare(config)
        assert path.read_bytes() == content


def test_two_writers_of_the_same_content_agree(tmp_path, monkeypatch):
    config = byte_config(tmp_path, write_corpus(tmp_path / "s", 8))
    other = prepare(config)
    manifest = (other.directory / "manifest.json").read_bytes()
    # The other writer finishes between this one's cache lookup and its rename.
    monkeypatch.setattr("pathlib.Path.exists", lambda self: self != other.directory or self._seen(), raising=True)
    seen = iter([False, True])
    monkeypatch.setattr("pathlib.Path._seen", lambda self: next(seen), raising=False)
    assert prepare(config).identity == other.identity
    assert (other.directory / "manifest.json").read_bytes() == manifest and len(folders(tmp_path)) == 1


def test_log_lines_report_skipped_files_and_windows(tmp_path):
    source = write_corpus(tmp_path / "s", 8)
    (tmp_path / "s" / "bad.py").write_bytes(b"\xff")
    lines: list[str] = []
    prepared = prepare(byte_config(tmp_path, source), lines.append)
    assert prepared.counts("s").first_skipped == ("bad.py: not UTF-8 (byte 0)",)
    assert "1 skipped; skipped: bad.py" in lines[0] and "windows of 32" in lines[-1]
    assert json.loads((prepared.directory / "manifest.json").read_text())["identity"] == prepared.identity
