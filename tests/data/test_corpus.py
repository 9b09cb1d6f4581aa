"""Reading sources: globs, bad files, JSONL, duplicates, and a split that does not depend on other documents."""

import hashlib
import json
import os
import re
from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.compressors import compressed_sizes
from data.config import DataConfig, DataError, SourceConfig, TokenizerConfig
from data.corpus import Entry, KeptText, find_files, glob_pattern, read_documents, reread, split, survey

names = st.lists(st.text("ab.", min_size=1, max_size=3).filter(lambda s: set(s) != {"."}), min_size=1, max_size=4).map(
    "/".join
)


@given(
    glob=st.lists(st.text("ab.*?", min_size=1, max_size=3).filter(lambda s: "**" not in s), min_size=1, max_size=3),
    name=names,
)
def test_globs_without_double_stars_agree_with_fnmatch(glob, name):
    parts = name.split("/")
    expected = len(glob) == len(parts) and all(map(fnmatchcase, parts, glob))
    assert bool(glob_pattern("/".join(glob)).match(name)) == expected


def test_double_stars_cross_folders():
    deep = glob_pattern("**/*.py")
    assert deep.match("a.py") and deep.match("a/b/c.py") and not deep.match("a/b.pyc")
    assert glob_pattern("**/test/**").match("test/") and glob_pattern("**/test/**").match("a/test/b/c")
    assert not glob_pattern("**/test/**").match("a/tests/b")


def source(tmp_path, files: dict[str, bytes], **fields) -> SourceConfig:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return SourceConfig(name="s", path=str(tmp_path), **fields)


def test_the_standard_library_is_read_without_tests():
    files = dict(find_files(SourceConfig()))
    assert {"argparse.py", "json/decoder.py"} <= files.keys() and len(files) > 400
    assert not any(re.search(r"(^|/)(tests?|site-packages|__pycache__)/|_sysconfigdata", name) for name in files)


def test_unreadable_files_are_skipped_and_named(tmp_path):
    config = source(
        tmp_path,
        {"good.py": b"a\r\nb", "latin.py": b"caf\xe9", "nothing.py": b"", ".hidden/x.py": b"h", "c/.h.py": b"h"},
    )
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.py")
    found = survey(config, set())
    assert [entry.name for entry in found.entries] == ["good.py"]
    assert found.empty == 1
    assert sorted(found.skipped) == [
        "gone.py: not a regular file",
        "latin.py: not UTF-8 (byte 3)",
        "pipe.py: not a regular file",
    ]
    assert [d.content for d in reread(config, found.entries)] == [b"a\r\nb"]


def test_jsonl_gives_one_document_per_valid_line(tmp_path):
    lines = [
        json.dumps({"body": "one\n\u2028two\x85"}, ensure_ascii=False),
        "",
        "{not json",
        json.dumps({"text": "x"}),
        '{"body": "\\ud800"}',
        "[1]",
        '{"body": 3}',
        '{"body": "last"}',
    ]
    config = source(
        tmp_path, {"a.jsonl": "\n".join(lines).encode()}, kind="jsonl", text_field="body", include=("*.jsonl",)
    )
    skipped: list[str] = []
    assert list(read_documents(config, skipped)) == [
        ("a.jsonl:1", "one\n\u2028two\x85".encode()),
        ("a.jsonl:8", b"last"),
    ]
    assert [line.split(":")[1] for line in skipped] == ["3", "4", "5", "6", "7"]
    assert "no text in field 'body' (the record has ['text'])" in skipped[1]


def test_a_source_can_be_a_file(tmp_path):
    source(tmp_path, {"poem.txt": b"roses"})
    assert list(read_documents(SourceConfig(path=str(tmp_path / "poem.txt")), [])) == [("poem.txt", b"roses")]


def test_duplicates_count_once_over_all_sources(tmp_path):
    seen: set[str] = set()
    first = survey(source(tmp_path / "1", {"a.py": b"x", "b.py": b"x", "c.py": b"y"}), seen)
    second = survey(source(tmp_path / "2", {"d.py": b"y", "e.py": b"z"}), seen)
    assert ([e.name for e in first.entries], first.duplicates) == (["a.py", "c.py"], 1)
    assert ([e.name for e in second.entries], second.duplicates) == (["e.py"], 1)


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {"a.py": b""}, {"a.py": b"\xff"}])
def test_the_error_for_an_empty_corpus_names_path_and_globs(tmp_path, files):
    with pytest.raises(DataError, match=re.escape(f"path {str(tmp_path)!r}, include ('**/*.py',)")):
        survey(source(tmp_path, files), set())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        find_files(SourceConfig(path=str(tmp_path / "nowhere")))


def test_a_document_that_changes_while_being_read_is_refused(tmp_path):
    config = source(tmp_path, {"a.py": b"x"})
    entries = survey(config, set()).entries
    for changes in ({"a.py": b"y"}, {"a.py": b"\xff"}):
        source(tmp_path, changes)
        with pytest.raises(DataError, match=r"a\.py in .* changed"):
            list(reread(config, entries))
    (tmp_path / "a.py").unlink()
    with pytest.raises(DataError, match=r"a\.py in .* changed"):
        list(reread(config, entries))


@given(
    files=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4),
    wanted=st.sets(st.integers(0, 9)),
    limit=st.integers(0, 40),
)
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_documents_are_reread_in_order_for_any_memory_limit(tmp_path_factory, kind, files, wanted, limit):
    texts = [[f"{'x' * i} {i}" for i in numbers] for numbers in files]
    if kind == "jsonl":
        contents = {f"{i}.py": "\n".join(json.dumps({"text": t}) for t in file) for i, file in enumerate(texts)}
    else:
        contents = {f"{i}/{j}.py": t for i, file in enumerate(texts) for j, t in enumerate(file)}
    if not any(files):
        return
    config = source(tmp_path_factory.mktemp("s"), {n: t.encode() for n, t in contents.items()}, kind=kind)
    kept = KeptText(limit)
    found = survey(config, set(), kept)
    assert [d.content for d in reread(config, found.entries, kept)] == list(
        dict.fromkeys(t.encode() for file in texts for t in file)
    )
    chosen = [entry for entry in found.entries if int(entry.size) - 2 in wanted]
    expected = [(entry.name, entry.digest) for entry in chosen]
    reread_ = [(d.name, hashlib.sha256(d.content).hexdigest()) for d in reread(config, chosen, kept)]
    assert reread_ == expected


def test_a_deeply_nested_line_is_skipped_with_its_reason(tmp_path):
    deep = '{"text": "x", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    at_limit, beyond = ('{"text": "x", "a": ' + "[" * n + "]" * n + "}" for n in (499, 500))
    lines = ['{"text": "first"}', "[" * 100_000, deep, '{"a":' * 100_000, beyond, at_limit]
    config = source(tmp_path, {"a.jsonl": "\n".join(lines).encode()}, kind="jsonl", include=("*.jsonl",))
    found = survey(config, set())
    assert [entry.name for entry in found.entries] == ["a.jsonl:1", "a.jsonl:6"]
    assert found.skipped == tuple(f"a.jsonl:{n}: JSON nested deeper than 500" for n in (2, 3, 4, 5))


def test_text_in_a_bucket_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"path = 'gs://bucket/text': text is read from local folders"):
        find_files(SourceConfig(path="gs://bucket/text"))


digests = st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=60, unique=True)


@given(digests=digests, fraction=st.floats(0.01, 0.99), added=st.binary(min_size=32, max_size=32))
def test_splits_are_disjoint_and_independent_of_other_documents(digests, fraction, added):
    entries = [Entry(str(i), digest.hex(), 1) for i, digest in enumerate(digests)]
    train, heldout = split(entries, fraction, "s")
    assert train and heldout and sorted(train + heldout) == sorted(entries)
    new = Entry("new", added.hex(), 1)
    train_after, heldout_after = split([new, *entries], fraction, "s")
    by_hash = sum(int(e.digest[:8], 16) < fraction * 2**32 for e in entries)
    if 0 < by_hash < len(entries):  # otherwise an empty side was filled
        assert set(train_after) - {new} == set(train) and set(heldout_after) - {new} == set(heldout)


def test_split_holds_out_the_fraction_and_refuses_one_document():
    entries = [Entry(str(i), f"{i * 2**22:08x}" + "0" * 56, 1) for i in range(1024)]
    assert len(split(entries, 0.25, "s")[1]) == 256
    assert split(entries[:1], 0, "s") == (entries[:1], [])
    with pytest.raises(DataError, match="1 document"):
        split(entries[:1], 0.05, "s")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sources": ()}, "sources"),
        ({"evaluation_sources": (SourceConfig(),)}, "different name"),
        ({"sources": (SourceConfig(name="a/b"),)}, "a/b"),
        ({"sources": (SourceConfig(weight=0),)}, "weight"),
        ({"sources": (SourceConfig(kind="xml"),)}, "kind"),
        ({"sources": (SourceConfig(include=()),)}, "include"),
        ({"sources": (SourceConfig(path=""),)}, "path"),
        ({"tokenizer": TokenizerConfig(vocab_size=100)}, "vocab_size"),
        ({"tokenizer": TokenizerConfig(kind="words")}, "kind"),
        ({"tokenizer": TokenizerConfig(kind="saved")}, "path is empty"),
        (
            {"tokenizer": TokenizerConfig(path="runs/a/tokenizer")},
            "path = 'runs/a/tokenizer': a sentencepiece tokenizer",
        ),
        ({"tokenizer": TokenizerConfig(kind="saved", path="x", vocab_size=0)}, "vocab_size = 0"),
        ({"tokenizer": TokenizerConfig(train_bytes=0)}, "train_bytes"),
        ({"sequence_length": 1}, "sequence_length = 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"packing": "best"}, "packing"),
        ({"temperature": float("inf")}, "temperature"),
        ({"holdout_fraction": 1.0}, "holdout_fraction"),
        ({"seed": -1}, "seed"),
        ({"prefetch": -1}, "prefetch"),
        ({"prefetch": 10**8}, "prefetch = 100000000: .* between 0 .* and 1024"),
        ({"sequence_length": 10**9}, "sequence_length = 1000000000: .* at most 16777216"),
        ({"batch_size": 10**9}, "batch_size = 1000000000: .* between 1 and 16777216"),
        ({"tokenizer": TokenizerConfig(vocab_size=10**9)}, "vocab_size = 1000000000: .* between 1 and 16777216"),
        ({"sources": (SourceConfig(name="x" * 300),)}, "300 characters"),
        ({"cache_dir": "gs://bucket/cache"}, "cache_dir = 'gs://bucket/cache': .* needs a local file system"),
    ],
)
def test_invalid_config_fields_are_refused_by_name(changes, field):
    DataConfig().validate()
    with pytest.raises(DataError, match=field):
        DataConfig(**changes).validate()


def test_compressors_compress_files_separately():
    # gzip writes a header of 10 bytes, 3 bytes of deflate for one literal, and a trailer of 8 bytes.
    assert compressed_sizes([b"a"])["gzip -9"] == (10 + 3 + 8) * 8
    assert compressed_sizes([b"a", b"a"]) == compressed_sizes([b"a"])
    assert all(0 < size < 1 for size in compressed_sizes([b"abc" * 5000]).values())
    with pytest.raises(DataError, match="0 bytes"):
        compressed_sizes([b""])
