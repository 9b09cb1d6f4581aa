"""tiktoken files: the number of ranks gives the kind, ids match tiktoken, any text round-trips, damage is named."""

import base64
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from data.config import DataError
from data.tokenizer import byte_lengths, load_tokenizer, read_tokenizer, write_published
from data.tokenizers import ranks
from data.tokenizers.ranks import KINDS, TiktokenTokenizer
from tests.data.test_tokenizer import TEXTS


def learned(count: int) -> bytes:
    """Return a tiktoken file of `count` ranks: up to 300 learned by BPE from a few words, the others made up."""
    table = [bytes([byte]) for byte in range(256)]
    words = Counter(" ".join(TEXTS).encode()[:4000].split(b" "))
    parts = {b" " + word: [bytes([byte]) for byte in b" " + word] for word in words}
    while len(table) < min(count, 300):
        pairs = Counter(pair for word, cut in parts.items() for pair in pairwise(cut))
        merged = max((pair for pair in pairs if b"".join(pair) not in table), key=lambda pair: (pairs[pair], pair))
        table.append(b"".join(merged))
        for word, cut in parts.items():
            i = 0
            while i + 1 < len(cut):
                if (cut[i], cut[i + 1]) == merged:
                    cut[i : i + 2] = [table[-1]]
                i += 1
            parts[word] = cut
    table += [b"\xff\xfe%d" % i for i in range(count - len(table))]
    return b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(table))


SMALL = learned(300)
TOKENIZERS = {kind: TiktokenTokenizer(SMALL, kind=kind) for kind in KINDS}
each = pytest.mark.parametrize("kind", KINDS)
TEXT = st.lists(
    st.text(max_size=8) | st.sampled_from(["<|endoftext|>", "<|im_end|>", "I'LL ", "\n\n", "1234567", "   ", "é", "🦜"])
).map("".join)


@each
@given(text=TEXT)
def test_any_text_round_trips_without_special_tokens(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and (ids < 300).all()
    if kind != "qwen":  # which first composes characters
        assert tokenizer.decode(ids) == text and byte_lengths(tokenizer)[ids].sum() == len(text.encode())
    np.testing.assert_array_equal(tokenizer.encode_many([text, "x"])[0], ids)
    assert tokenizer.encode_marked(text).tolist() == tokenizer._encoding.encode(
        tokenizer._normal(text), allowed_special="all"
    )


def test_qwen_composes_characters():
    assert (
        TOKENIZERS["qwen"].encode("e\u0301").tolist()
        == TOKENIZERS["qwen"].encode("\u00e9").tolist()
        != TOKENIZERS["gpt2"].encode("e\u0301").tolist()
    )


@each
@given(data=st.data())
def test_a_stream_equals_decode(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    stream = tokenizer.stream()
    decoded = tokenizer.decode(ids)
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == decoded
    spelled = [i for i in ids if i < 300]
    assert decoded == tokenizer._encoding.decode(spelled)  # special tokens and unused ids have no text


@pytest.mark.parametrize("kind", ["gpt2", "cl100k_base", "o200k_base", "o200k_harmony"])
def test_patterns_and_special_tokens_match_openai(kind, monkeypatch):
    for load in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, load, lambda *args, **kwargs: {})  # prevents a download
    theirs, ours = getattr(openai_public, kind)(), KINDS[kind]
    assert ours.pattern == theirs["pat_str"]
    specials = {name: ours.ranks + i for name, i in ours.specials.items()}
    assert specials.items() <= theirs["special_tokens"].items()
    assert set(specials.values()) == set(theirs["special_tokens"].values())


def test_special_tokens_have_their_published_ids():
    def ids(kind: str) -> dict[str, int]:
        return {name: KINDS[kind].ranks + i for name, i in KINDS[kind].specials.items()}

    llama, qwen = ids("llama3"), ids("qwen")
    assert (llama["<|begin_of_text|>"], llama["<|eot_id|>"], llama["<|python_tag|>"]) == (128000, 128009, 128010)
    assert (llama["<|reserved_special_token_0|>"], llama["<|reserved_special_token_247|>"]) == (128002, 128255)
    assert sorted(llama.values()) == list(range(128000, 128256))
    assert (qwen["<|endoftext|>"], qwen["<|im_end|>"], max(qwen.values())) == (151643, 151645, 151850)


def test_the_number_of_ranks_gives_the_kind(tmp_path, monkeypatch):
    monkeypatch.setitem(ranks.KINDS, "llama3", replace(KINDS["llama3"], ranks=300))
    (tmp_path / "tokenizer.model").write_bytes(SMALL)  # Meta's file name
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [301, 308]}))
    found = read_tokenizer(tmp_path)
    assert found.kind == "llama3" and found.special.start == 300 and found.special.end == 301
    assert found.stop_token_ids == (301, 308, 309) and found.vocab_size == 556
    found.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.identity, loaded.special, loaded.stop_token_ids, loaded.kind) == (
        found.identity,
        found.special,
        found.stop_token_ids,
        "llama3",
    )
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 556}))
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id = 556: expected .* from 0 to 555"):
        read_tokenizer(tmp_path)
    with pytest.raises(DataError, match="cannot be written"):
        write_published(found, tmp_path / "published")


def test_the_file_name_gives_the_kind(tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(SMALL)
    assert read_tokenizer(tmp_path).kind == "qwen"
    (tmp_path / "qwen.tiktoken").rename(tmp_path / "mine.tiktoken")
    with pytest.raises(DataError, match=r"'mine' of 300 ranks: unknown kind.*llama3 \(128000\)"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (SMALL[:-20] + b"!!\n", "line"),
        (SMALL[: len(SMALL) // 3], "line|missing"),
        (SMALL.replace(b" 7\n", b" 8\n"), "ranks are not"),
        (b"\n".join(SMALL.split(b"\n")[3:]), "0x00 is missing"),
        (b"AA==", "line 1"),
    ],
)
def test_damaged_files_are_refused_with_the_reason(content, words):
    with pytest.raises(DataError, match=f"tiktoken file.*{words}"):
        TiktokenTokenizer(content, kind="gpt2")


def test_nothing_is_downloaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a download")

    monkeypatch.setattr(tiktoken.load, "read_file", refuse)
    TiktokenTokenizer(SMALL, kind="gpt2").encode("x")
