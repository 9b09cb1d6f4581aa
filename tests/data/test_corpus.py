"""Reading sources: globs, bad files, JSONL, duplicates, and a split that does not depend on other documents."""

import gzip
import hashlib
import json
import os
import random
import re
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.compressors import compressed_sizes
from data.config import DataConfig, DataError, SourceConfig, TokenizerConfig
from data.corpus import Files, Skipped, find_files, glob_pattern, read_records
from data.paths import parse_path
from data.survey import (
    ENTRY,
    KeptText,
    Rereader,
    Survey,
    lowest_digests,
    remove_duplicates,
    sections,
    split,
    survey,
)
from tests.fake_bucket import use_fake_bucket

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


def documents(config, skipped=None):
    """Return a source's documents as (name, content)."""
    files = find_files(config)
    found = read_records(config, files, Skipped() if skipped is None else skipped)
    return [(files.name(record.file, record.line), record.content) for record in found]


def names_of(found: Survey) -> list[str]:
    return [found.name(entry) for entry in found.entries]


def reread(found: Survey, entries=None, kept=None) -> list[bytes]:
    with Rereader(found.source, found.files, kept) as reader:
        return list(reader.texts(found.entries if entries is None else entries))


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
    found = survey(config)
    assert names_of(found) == ["good.py"]
    assert found.empty == 1 and found.skipped.count == 3
    assert sorted(found.skipped.first) == [
        "gone.py: not a regular file",
        "latin.py: not UTF-8 (byte 3)",
        "pipe.py: not a regular file",
    ]
    assert reread(found) == [b"a\r\nb"]


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
    skipped = Skipped()
    assert documents(config, skipped) == [
        ("a.jsonl:1", "one\n\u2028two\x85".encode()),
        ("a.jsonl:8", b"last"),
    ]
    assert [line.split(":")[1] for line in skipped.first] == ["3", "4", "5", "6", "7"]
    assert "no text in field 'body' (the record has ['text'])" in skipped.first[1]


def test_a_source_can_be_a_file(tmp_path):
    source(tmp_path, {"poem.txt": b"roses"})
    assert documents(SourceConfig(path=str(tmp_path / "poem.txt"))) == [("poem.txt", b"roses")]


def test_duplicates_count_once_over_all_sources(tmp_path):
    first = survey(source(tmp_path / "1", {"a.py": b"x", "b.py": b"x", "c.py": b"y"}))
    second = survey(source(tmp_path / "2", {"d.py": b"y", "e.py": b"z"}))
    remove_duplicates([first, second])
    assert (names_of(first), first.duplicates) == (["a.py", "c.py"], 1)
    assert (names_of(second), second.duplicates) == (["e.py"], 1)
    with pytest.raises(DataError, match="1 duplicates of others"):
        remove_duplicates([first, survey(source(tmp_path / "3", {"f.py": b"x"}))])


def table(digests) -> np.ndarray:
    """Return the entries of documents of one byte."""
    entries = np.zeros(len(digests), ENTRY)
    for row, digest in enumerate(digests):
        entries[row]["digest"] = np.frombuffer(digest, np.uint8)
    entries["size"], entries["line"] = 1, np.arange(len(digests))
    return entries


# Few values of the first 8 bytes, which are compared first, and digests that end in zeros.
close_digests = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda t: bytes([t[0]] * 8 + [t[1]] + [0] * 23)), max_size=12
)


@given(tables=st.lists(close_digests.filter(len), min_size=1, max_size=3))
def test_only_the_first_of_equal_digests_is_kept(tables):
    surveys = [Survey(SourceConfig(), Files(Path("."), ["a"], True), table(t), Skipped(), 0) for t in tables]
    seen: set[bytes] = set()
    expected = []
    for digests in tables:
        expected.append([row for row, digest in enumerate(digests) if not (digest in seen or seen.add(digest))])
    if all(expected):
        remove_duplicates(surveys)
        assert [found.entries["line"].tolist() for found in surveys] == expected
        assert [found.duplicates for found in surveys] == [
            len(t) - len(e) for t, e in zip(tables, expected, strict=True)
        ]
    else:
        with pytest.raises(DataError, match="is empty"):
            remove_duplicates(surveys)


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {"a.py": b""}, {"a.py": b"\xff"}])
def test_the_error_for_an_empty_corpus_names_path_and_globs(tmp_path, files):
    with pytest.raises(DataError, match=re.escape(f"path {str(tmp_path)!r}, include ('**/*.py',)")):
        survey(source(tmp_path, files))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        find_files(SourceConfig(path=str(tmp_path / "nowhere")))


def test_a_document_that_changes_while_being_read_is_refused(tmp_path):
    config = source(tmp_path, {"a.py": b"x"})
    found = survey(config)
    for changes in ({"a.py": b"y"}, {"a.py": b"\xff"}):
        source(tmp_path, changes)
        with pytest.raises(DataError, match=r"a\.py in .* changed"):
            reread(found)
    (tmp_path / "a.py").unlink()
    with pytest.raises(DataError, match=r"a\.py in .* changed"):
        reread(found)


@given(
    files=st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4),
    wanted=st.sets(st.integers(0, 9)),
    limit=st.integers(0, 4000),
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
    found = survey(config, kept)
    remove_duplicates([found])
    assert reread(found, kept=kept) == list(dict.fromkeys(t.encode() for file in texts for t in file))
    chosen = found.entries[np.isin(found.entries["size"] - 2, list(wanted))]
    assert [hashlib.sha256(text).digest() for text in reread(found, chosen, kept)] == [
        entry["digest"].tobytes() for entry in chosen
    ]


def test_a_deeply_nested_line_is_skipped_with_its_reason(tmp_path):
    deep = '{"text": "x", "a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    at_limit, beyond = ('{"text": "x", "a": ' + "[" * n + "]" * n + "}" for n in (499, 500))
    lines = ['{"text": "first"}', "[" * 100_000, deep, '{"a":' * 100_000, beyond, at_limit]
    config = source(tmp_path, {"a.jsonl": "\n".join(lines).encode()}, kind="jsonl", include=("*.jsonl",))
    found = survey(config)
    assert names_of(found) == ["a.jsonl:1", "a.jsonl:6"]
    assert found.skipped.first == [f"a.jsonl:{n}: JSON nested deeper than 500" for n in (2, 3, 4, 5)]


def lines_of(texts) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("where", ["local", "bucket"])
def test_compressed_lines_give_the_documents_of_plain_ones(tmp_path, where):
    texts = [f"document {i} " + "é" * i for i in range(300)]
    folder = tmp_path
    if where == "bucket":
        use_fake_bucket()
        folder = parse_path(f"gs://bucket/{tmp_path.name}")
    (folder / "a.jsonl").write_bytes(lines_of(texts))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines_of(texts[:150])) + gzip.compress(lines_of(texts[150:])))
    for name in ("a.jsonl", "b.jsonl.gz"):
        found = survey(SourceConfig(path=str(folder), include=(name,), kind="jsonl"))
        assert names_of(found) == [f"{name}:{i}" for i in range(1, 301)]
        assert reread(found, found.entries[[2, 7, 8, 299]]) == [texts[i].encode() for i in (2, 7, 8, 299)]


def test_a_damaged_compressed_file_is_skipped_with_its_reason(tmp_path):
    whole = gzip.compress(random.Random(0).randbytes(1 << 18).hex().encode())
    for name, content in {"cut": whole[:-100], "changed": whole[:40] + b"####" + whole[44:], "other": b"text"}.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(content)
    (tmp_path / "good.jsonl").write_bytes(lines_of(["good"]))
    found = survey(SourceConfig(path=str(tmp_path), include=("*",), kind="jsonl"))
    assert names_of(found) == ["good.jsonl:1"]
    assert any("cut.jsonl.gz: the compressed file is damaged" in reason for reason in found.skipped.first)
    assert {reason.split(".")[0] for reason in found.skipped.first} == {"cut", "changed", "other"}


def test_a_bucket_gives_the_documents_of_a_local_folder(tmp_path):
    use_fake_bucket()
    bucket = parse_path(f"gs://bucket/{tmp_path.name}")
    names = ["a.py", "b/c.py", "b/d.txt", "b/.hidden.py", ".git/e.py", "tests/f.py", "tests/g/h.py"]
    for folder in (tmp_path, bucket):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(name.encode())
    local, remote = (SourceConfig(path=str(folder), exclude=("tests/**",)) for folder in (tmp_path, bucket))
    assert documents(remote) == documents(local) == [("a.py", b"a.py"), ("b/c.py", b"b/c.py")]
    assert documents(SourceConfig(path=f"{bucket}/b/d.txt")) == [("d.txt", b"b/d.txt")]
    with pytest.raises(DataError, match=r"path = '.*/absent': not a folder or file"):
        find_files(SourceConfig(path=f"{bucket}/absent"))
    with pytest.raises(DataError, match="source 'stdlib': path = 's3://bucket/text': only local folders and gs://"):
        find_files(SourceConfig(path="s3://bucket/text"))


digests = st.lists(st.binary(min_size=32, max_size=32), min_size=2, max_size=60, unique=True)


@given(digests=digests, fraction=st.floats(0.01, 0.99), added=st.binary(min_size=32, max_size=32))
def test_splits_are_disjoint_and_independent_of_other_documents(digests, fraction, added):
    heldout = split(table(digests), fraction, "s")
    count = sum(int.from_bytes(digest[:4], "big") < fraction * 2**32 for digest in digests)
    lowest = sorted(digests)[: min(max(count, 1), len(digests) - 1)]  # an empty side gets one document
    assert [digest in lowest for digest in digests] == heldout.tolist()
    if 0 < count < len(digests):
        assert split(table([added, *digests]), fraction, "s")[1:].tolist() == heldout.tolist()


def test_split_holds_out_the_fraction_and_refuses_one_document():
    entries = table([(i * 2**22).to_bytes(4, "big") + bytes(28) for i in range(1024)])
    assert split(entries, 0.25, "s").sum() == 256
    assert not split(entries[:1], 0, "s").any()
    with pytest.raises(DataError, match="1 document"):
        split(entries[:1], 0.05, "s")


@given(digests=digests, limit=st.integers(1, 70), cut=st.integers(1, 59))
def test_the_lowest_digests_are_chosen_until_they_have_enough_bytes(digests, limit, cut):
    cut = min(cut, len(digests) - 1)
    masks = lowest_digests([table(digests[:cut]), table(digests[cut:])], limit)
    chosen = {digest for digest, is_chosen in zip(digests, np.concatenate(masks), strict=True) if is_chosen}
    assert chosen == set(sorted(digests)[:limit])


@given(sizes=st.lists(st.integers(1, 30), max_size=40), limit=st.integers(1, 60), documents=st.integers(1, 7))
def test_sections_are_full_and_within_their_limits(sizes, limit, documents):
    bounds = sections(np.array(sizes, np.int64), limit, documents)
    assert [i for first, last in bounds for i in range(first, last)] == list(range(len(sizes)))
    for first, last in bounds:
        assert last - first == 1 or (sum(sizes[first:last]) <= limit and last - first <= documents)
        if last < len(sizes):  # the next document doesn't fit
            assert last - first == documents or sum(sizes[first : last + 1]) > limit


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
        ({"cache_dir": "s3://bucket/cache"}, "data.cache_dir = 's3://bucket/cache': only local folders and gs://"),
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
