"""Any text round-trips exactly, as a whole or as a stream, and no text encodes to a special token."""

import argparse
import gc
import inspect
import os
import signal
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.config import SPECIAL_PIECES, DataError, TokenizerConfig
from data.tokenizer import ByteTokenizer, SpecialTokens, byte_lengths, load_tokenizer, read_tokenizer, train_tokenizer
from tests.fake_bucket import use_fake_bucket

CONFIG = TokenizerConfig(vocab_size=400)
# Names of special tokens and byte pieces must stay text, even in the training text.
TEXTS = [
    inspect.getsource(argparse),
    "def f(x):\n    return x + 1\n\n" * 50,
    "été <end> <0x41> <pad> <unk>\n" * 200,
    "<end>" * 500,
    "\u2581\u2581a \0 b\tc\r\n" * 50,
]
TOKENIZERS = {"byte": ByteTokenizer(), "sentencepiece": train_tokenizer(CONFIG, TEXTS)}
TRICKY = [
    *SPECIAL_PIECES,
    "<0x41>",
    "<s>",
    "</s>",
    "\u2581",
    "\0",
    "\r",
    "\r\n",
    "\n",
    "\t",
    "\u0301",
    "\ufeff",
    "\ufffd",
    "\u2047",
    "  ",
    "𝕏",
    "\u2028",
]
any_text = st.lists(st.sampled_from(TRICKY) | st.text(st.characters(codec="utf-8"))).map("".join)


each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


@each
@given(text=any_text)
def test_any_text_round_trips_without_special_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not np.any(ids < len(SPECIAL_PIECES)) and not np.any(ids >= tokenizer.vocab_size)
    assert byte_lengths(tokenizer)[ids].sum() == len(text.encode())


@each
def test_long_lines_round_trip(tokenizer):
    text = "x = '" + "ab é" * 50_000 + "'"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@each
@given(texts=st.lists(any_text, max_size=5))
def test_encode_many_equals_encode(tokenizer, texts):
    for ids, text in zip(tokenizer.encode_many(texts), texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


@each
@given(data=st.data())
def test_a_stream_equals_decode(tokenizer, data):
    text = data.draw(any_text)
    from_text = tokenizer.encode(text).tolist()
    ids = data.draw(st.just(from_text) | st.lists(st.integers(0, tokenizer.vocab_size - 1)))  # includes invalid UTF-8
    decoder = tokenizer.stream()
    pushed = "".join(decoder.push(token) for token in ids)
    assert pushed + decoder.flush() == tokenizer.decode(ids)
    if ids == from_text:
        assert pushed == text


@each
def test_special_ids_are_the_same_in_both_kinds(tokenizer):
    assert tokenizer.special == SpecialTokens() == (*range(len(SPECIAL_PIECES)), SpecialTokens().end)
    assert all(tokenizer.token_bytes(i) == b"" for i in tokenizer.special)
    assert tokenizer.decode([tokenizer.special.end, *tokenizer.encode("a"), tokenizer.special.mask]) == "a"


@each
def test_ids_out_of_range_are_refused(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match=f"token id {token}"):
            tokenizer.decode([token])


@each
def test_a_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.identity == tokenizer.identity and loaded.vocab_size == tokenizer.vocab_size
    np.testing.assert_array_equal(loaded.encode(TEXTS[0]), tokenizer.encode(TEXTS[0]))


def test_training_is_reproducible_and_compresses():
    again = train_tokenizer(CONFIG, TEXTS)
    assert again.identity == TOKENIZERS["sentencepiece"].identity
    assert again.vocab_size == 400
    assert len(again.encode(TEXTS[0])) < len(TEXTS[0]) / 1.5


def test_an_interrupt_ends_the_training():
    def texts():
        """Yield texts slowly, to use little memory, and end if the interrupt does not arrive."""
        for _ in range(1000):
            yield TEXTS[0]
            time.sleep(0.005)

    gc.disable()  # Python drops an exception that a handler raises in a garbage collector callback
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_tokenizer(CONFIG, texts())
    finally:
        timer.join()
        gc.enable()


@pytest.mark.parametrize("error", [DataError("changed"), OSError("gone")])
def test_an_error_in_the_texts_is_raised_unchanged(error):
    def texts():
        yield TEXTS[0]
        raise error

    with pytest.raises(type(error), match=str(error)):
        train_tokenizer(CONFIG, texts())


def test_damaged_tokenizers_are_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    TOKENIZERS["sentencepiece"].save(tmp_path)
    model = tmp_path / "tokenizer.model"
    content = model.read_bytes()
    model.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(tmp_path)
    train_tokenizer(TokenizerConfig(vocab_size=380), TEXTS).save(tmp_path / "other")
    model.write_bytes((tmp_path / "other" / "tokenizer.model").read_bytes())
    with pytest.raises(DataError, match="different tokenizers"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_too_large_for_the_text_is_refused():
    with pytest.raises(DataError, match=r"vocab_size = 4096: .*value <= "):
        train_tokenizer(TokenizerConfig(), ["only a few words"])


def test_a_tokenizer_can_be_saved_in_a_bucket(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_fake_bucket()
    folder = "gs://bucket/test_tokenizer/tokenizer"
    ByteTokenizer().save(folder)
    for read in (load_tokenizer, read_tokenizer):
        assert read(folder).identity == ByteTokenizer().identity
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no tokenizer in gs://bucket/absent"):
        load_tokenizer("gs://bucket/absent")
    with pytest.raises(DataError, match="not s3://"):
        load_tokenizer("s3://bucket/tokenizer")
