"""Tokenizers in GGUF files match the originals from the packages tokenizers and sentencepiece."""

import io
import json

import gguf
import pytest
import sentencepiece
import tokenizers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.config import DataError
from data.tokenizer import read_tokenizer
from data.tokenizers.gguf import read_gguf_tokenizer

TEXT = [
    "def add(a, b):\n    return a + b  # 12 345\n\n\n",
    "The king's men shan't'VE gone; 1234567 of them ÄÖÜ наш 東京 are  here.\r\n\t x = [1,  22,  333,  4,  5]\n",
    "We'll say so. we'LL SAY SO. They are the ones that there were, the others are not there yet.\n",
] * 4
# The patterns in the models' tokenizer.json.
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|end|>", "<|user|>"]
anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    st.sampled_from(" \n\r\t'sSlLvV.ab12345Äé▁京\u0301<|>"), max_size=40
)


def pre_tokenizer(pre):
    def split(pattern):
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    return plain if pre == "gpt-2" else split(LLAMA3 if pre == "llama-bpe" else QWEN2)


def byte_level(pre):
    """Return a byte-level BPE tokenizer as published models have it."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer, made.decoder = pre_tokenizer(pre), decoders.ByteLevel()
    if pre == "qwen2":
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=340, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
    )
    return made


def write(path, kind, tokens, types, **values):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in values.items():
        add = writer.add_array if isinstance(value, list) else writer.add_key_value
        add(f"tokenizer.{key}", value, *() if isinstance(value, list) else (gguf.GGUFValueType.get_type(value),))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_byte_level(path, made, pre, **values):
    ids = made.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [" ".join(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
    specials = {"ggml.eos_token_id": 0, "ggml.bos_token_id": 1}
    types = [3 if token in SPECIALS else 1 for token in tokens]
    return write(path, "gpt2", tokens, types, **specials | {"ggml.pre": pre, "ggml.merges": merges, **values})


@pytest.fixture(scope="module", params=["gpt-2", "smollm", "llama-bpe", "qwen2"])
def pair(request, tmp_path_factory):
    """Return (a tokenizer, the same one read from a GGUF file)."""
    made = byte_level(request.param)
    path = write_byte_level(tmp_path_factory.mktemp("gguf") / "a.gguf", made, request.param)
    return made, tokenizers.Tokenizer.from_str(read_gguf_tokenizer(path).json)


@given(text=anything)
@example(text="x =  12,  345\n")  # splits differently in each pattern
@settings(max_examples=150)
def test_byte_level_bpe_matches_the_original(pair, text):
    made, read = pair
    ids = made.encode(text).ids
    assert read.encode(text, add_special_tokens=False).ids == ids
    assert read.decode(ids, skip_special_tokens=False) == made.decode(ids, skip_special_tokens=False)


def test_the_texts_distinguish_the_patterns():
    """Each of the four splits the texts differently. Otherwise the tests above could not detect a wrong pattern."""
    cuts = [
        [[piece for piece, _ in pre_tokenizer(pre).pre_tokenize_str(t)] for t in TEXT]
        for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")
    ]
    assert all(one != other for i, one in enumerate(cuts) for other in cuts[:i])


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("qwen2", False)])
def test_only_llama_3_encodes_a_whole_word_token_without_merges(tmp_path, pre, whole):
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "zqz"]
    values = {"ggml.pre": pre, "ggml.merges": ["z q"], "ggml.eos_token_id": 0}
    path = write(tmp_path / "a.gguf", "gpt2", [*tokens, "zq"], [3, 3, *[1] * 258], **values)
    read = tokenizers.Tokenizer.from_str(read_gguf_tokenizer(path).json)
    assert read.encode("zqz").tokens == (["zqz"] if whole else ["zq", "z"])


def trained_pieces(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        model_type="bpe",
        vocab_size=380,
        byte_fallback=True,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|tool|>"],
        allow_whitespace_only_pieces=True,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def write_pieces(path, sp, **values):
    """Write a SentencePiece model like llama.cpp's converter."""
    size = range(sp.get_piece_size())
    kinds = [
        2
        if sp.is_unknown(i)
        else 3
        if sp.is_control(i)
        else 6
        if sp.is_byte(i)
        else 4
        if sp.id_to_piece(i) == "<|tool|>"
        else 1
        for i in size
    ]
    more = {"ggml.scores": [sp.get_score(i) for i in size], "ggml.bos_token_id": 1, "ggml.eos_token_id": 2, **values}
    return write(path, "llama", [sp.id_to_piece(i) for i in size], kinds, **more)


@pytest.fixture(scope="module", params=[True, False])
def pieces(request, tmp_path_factory):
    """Return (a SentencePiece model with or without a leading space, the same one read from a GGUF file)."""
    sp = trained_pieces(add_dummy_prefix=request.param)
    path = write_pieces(tmp_path_factory.mktemp("gguf") / "a.gguf", sp, **{"ggml.add_space_prefix": request.param})
    return sp, tokenizers.Tokenizer.from_str(read_gguf_tokenizer(path).json)


@given(text=anything)
@settings(max_examples=150)
def test_pieces_match_sentencepiece(pieces, text):
    sp, read = pieces
    text = text.replace("\0", "")  # SentencePiece ends a text there
    assume(not any(special in text for special in ("<unk>", "<s>", "</s>", "<|tool|>")))  # see the next test
    assert read.encode(text, add_special_tokens=False).ids == sp.encode(text)
    assert read.decode(sp.encode(text)) == sp.decode(sp.encode(text))


def test_text_after_a_special_token_is_encoded_separately_as_in_llama_cpp(pieces):
    sp, read = pieces
    for special, i in (("<|tool|>", 3), ("</s>", 2)):
        assert read.encode(f"the{special}there", add_special_tokens=False).ids == [
            *sp.encode("the"),
            i,
            *sp.encode("there"),
        ]


def test_special_tokens_and_chat_template_are_read(tmp_path):
    made = byte_level("smollm")
    path = write_byte_level(
        tmp_path / "a.gguf", made, "smollm", chat_template="{{ messages }}", **{"ggml.eot_token_id": 1}
    )
    found = read_gguf_tokenizer(path)
    assert (found.bos, found.eos, found.pad, found.add_bos, found.stop_token_ids) == (1, 0, None, False, (0, 1))
    assert found.chat_template == "{{ messages }}"
    read = tokenizers.Tokenizer.from_str(found.json)
    assert read.encode("a<|user|>").ids == made.encode("a<|user|>").ids and read.decode([1]) == ""
    opening = write_byte_level(tmp_path / "b.gguf", made, "smollm", **{"ggml.add_bos_token": True})
    assert tokenizers.Tokenizer.from_str(read_gguf_tokenizer(opening).json).encode("a").ids[0] == 1
    assert read_gguf_tokenizer(
        write_byte_level(tmp_path / "c.gguf", byte_level("llama-bpe"), "llama-bpe")
    ).add_bos  # the default of llama.cpp
    ours = read_tokenizer(path)
    assert ours.special.end == 0 and ours.stop_token_ids == (0, 1)
    assert ours.encode(TEXT[0]).tolist() == made.encode(TEXT[0]).ids


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ggml.pre": "tekken"}, "pre = 'tekken'.*smollm"),
        ({"ggml.merges": ["a bc", "xx"]}, "merge"),
        ({"ggml.eos_token_id": 5000}, "eos_token_id = 5000: outside"),
    ],
)
def test_unsupported_values_are_refused(tmp_path, values, message):
    with pytest.raises(DataError, match=message):
        read_gguf_tokenizer(write_byte_level(tmp_path / "a.gguf", byte_level("gpt-2"), "gpt-2", **values))


def test_other_kinds_and_damaged_files_are_refused(tmp_path):
    for name, kind, types, more, message in (
        ("a", "bert", [1, 1], {}, "model = 'bert'.*gpt2, llama"),
        ("b", "llama", [1, 1], {}, "2 tokens and 0 scores"),
        ("c", "gpt2", [1], {}, "2 tokens .* 1 types"),
        ("d", "llama", [1, 1], {"ggml.scores": [0.0, 0.0]}, "neither byte tokens nor an unknown"),
        (
            "e",
            "llama",
            [2, 1],
            {"ggml.scores": [0.0, 0.0], "ggml.precompiled_charsmap": [1, 2]},
            "precompiled_charsmap",
        ),
    ):
        with pytest.raises(DataError, match=message):
            read_gguf_tokenizer(write(tmp_path / f"{name}.gguf", kind, ["a", "b"], types, **more))
    whole = (tmp_path / "a.gguf").read_bytes()
    for size in (0, 3, 20, 90, len(whole) - 40):
        (tmp_path / "f.gguf").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"f\.gguf: not a GGUF file, truncated or damaged"):
            read_gguf_tokenizer(tmp_path / "f.gguf")
    with pytest.raises(DataError, match=r"g\.gguf: No such file"):
        read_gguf_tokenizer(tmp_path / "g.gguf")
