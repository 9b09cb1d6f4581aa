"""Published SentencePiece models (Llama 2's and Gemma's tokenizer.model): ids and texts match the package."""

import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from data.config import DataError
from data.tokenizer import load_tokenizer, read_tokenizer
from data.tokenizers.sentencepieces import PublishedSentencePiece
from tests.data.test_tokenizer import TEXTS


def model(**options) -> bytes:
    """Train a model like Llama 2's (dummy prefix, byte fallback, <unk> <s> </s>) with Gemma's turn token."""
    found = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.split("\n")]),
        model_writer=found,
        **{
            "model_type": "bpe",
            "vocab_size": 350,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "control_symbols": ["<start_of_turn>"],
            "user_defined_symbols": ["\n"],
            "minloglevel": 2,
            **options,
        },
    )
    return found.getvalue()


MODELS = {
    "llama": model(),
    "gemma": model(add_dummy_prefix=False),
    "t5": model(model_type="unigram", remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc"),
    "no bytes": model(byte_fallback=False, vocab_size=200, unk_surface="?", hard_vocab_limit=False),
    "spaces": model(remove_extra_whitespaces=True, add_dummy_prefix=False, allow_whitespace_only_pieces=True),
    "suffix": model(treat_whitespace_as_suffix=True),
}
OURS = {name: PublishedSentencePiece.published(content, None, [9], "x") for name, content in MODELS.items()}
PACKAGE = {name: sentencepiece.SentencePieceProcessor(model_proto=content) for name, content in MODELS.items()}
each = pytest.mark.parametrize("name", MODELS)
TEXT = st.lists(st.text() | st.sampled_from(["<s>", "</s>", "<start_of_turn>", "  ", "the "])).map("".join)


@each
@given(text=TEXT)
def test_ids_and_texts_match_the_package(name, text):
    ours, package = OURS[name], PACKAGE[name]
    ids = ours.encode(text)
    assert ids.tolist() == package.encode(text) and not {1, 2, 3} & set(ids.tolist())
    assert ours.decode(ids) == package.decode(ids.tolist())
    np.testing.assert_array_equal(ours.encode_many([text, "a"])[0], ids)


def byte_ids(package, content: bytes) -> list[int]:
    return [package.piece_to_id(f"<0x{byte:02X}>") for byte in content]


@each
@given(data=st.data())
def test_any_ids_decode_like_the_package(name, data):
    """Ids include cut, invalid and interrupted runs of byte pieces, unknown pieces, control symbols and spaces."""
    ours, package = OURS[name], PACKAGE[name]
    spaces = [i for i in range(ours.vocab_size) if package.id_to_piece(i).startswith("\u2581")]
    parts = st.integers(0, ours.vocab_size - 1).map(lambda i: [i])
    parts |= st.sampled_from([*spaces[:4], 0, 1, 2]).map(lambda i: [i])
    parts |= st.sampled_from(spaces).map(lambda i: [i])
    if name != "no bytes":
        runs = st.binary(max_size=6) | st.text(min_size=1, max_size=3).map(str.encode).flatmap(
            lambda run: st.integers(0, len(run)).map(lambda end: run[:end])
        )
        parts |= runs.map(lambda run: byte_ids(package, run))
    ids = [i for part in data.draw(st.lists(parts, max_size=8)) for i in part]
    expected = package.decode(ids)
    assert ours.decode(ids) == expected
    stream = ours.stream()
    for _ in range(2):  # a flushed stream starts a new text
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == expected


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_cut_run_of_bytes_keeps_its_whole_characters(name):
    ours = OURS[name]
    assert ours.decode(ours.encode("鰯鰤鯖")[:-1]) == "鰯鰤\ufffd\ufffd"
    assert ours.decode([0]) == " \u2047 " and ours.token_bytes(0) == b""
    stream = ours.stream()
    pushed = [stream.push(i) for i in byte_ids(PACKAGE[name], "鰯".encode())]
    assert pushed == ["", "", "鰯"]  # a character appears when it is complete, not at the end of its run


@each
def test_special_tokens_match_the_model(name, tmp_path):
    ours = OURS[name]
    assert (ours.special.start, ours.special.end, ours.special.unk, ours.special.pad) == (1, 2, 0, -1)
    assert ours.stop_token_ids == (2, 9) and ours.names == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    marked = ours.encode_marked("<s><start_of_turn>the</s>").tolist()
    assert marked == [1, 3, *ours.encode("the").tolist(), 2]
    ours.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.identity, loaded.special, loaded.stop_token_ids, loaded.names) == (
        ours.identity,
        ours.special,
        ours.stop_token_ids,
        ours.names,
    )
    assert loaded.chat_template == "x"


def test_a_published_folder_is_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODELS["llama"])
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert read_tokenizer(tmp_path).special.start == -1
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 349]}')
    assert read_tokenizer(tmp_path).stop_token_ids == (2, 349)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 350]}')
    with pytest.raises(DataError, match=r"generation_config.json: eos_token_id = 350: expected .* from 0 to 349"):
        read_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(MODELS["llama"][:100])
    with pytest.raises(DataError, match="neither a SentencePiece model nor a tiktoken file"):
        read_tokenizer(tmp_path)
