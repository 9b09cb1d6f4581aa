"""Published tokenizers: ids, texts and streams match the tokenizers package, and folders provide special tokens."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from data.config import SPECIAL_PIECES, DataConfig, DataError, TokenizerConfig
from data.prepare import prepare
from data.tokenizer import (
    ByteTokenizer,
    SpecialTokens,
    byte_lengths,
    check_vocabulary,
    fit_vocabulary,
    load_tokenizer,
    prompt_ids,
    read_tokenizer,
    special_ids,
    train_tokenizer,
    write_published,
)  # fmt: skip
from data.tokenizers.folders import is_saved
from data.tokenizers.publish import _splits
from tests.data.conftest import byte_config, write_corpus
from tests.data.test_tokenizer import TEXTS

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    """Return a tokenizer like those of GPT-2, Llama 3 and Qwen."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    return tokenizer


def sentencepiece_like(model: str, form: str) -> tokenizers.Tokenizer:
    """Return a tokenizer like those of Llama 2, Mistral (BPE) and T5 (Unigram). `form`: how spaces are marked."""
    trained = tokenizers.Tokenizer(models.BPE() if model == "bpe" else models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    kind = trainers.BpeTrainer if model == "bpe" else trainers.UnigramTrainer
    more = {"unk_token": "<unk>"} if model == "unigram" else {}
    trained.train_from_iterator(TEXTS, kind(vocab_size=200, special_tokens=SPECIALS, show_progress=False, **more))
    found = json.loads(trained.to_str())["model"]
    if model == "bpe":
        pieces = [*SPECIALS, *BYTES, *(piece for piece in found["vocab"] if piece not in SPECIALS)]
        merges = [tuple(merge) for merge in found["merges"]]
        network = models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    else:
        network = models.Unigram(
            [(p, s) for p, s in found["vocab"]] + [(p, -9.0) for p in BYTES], unk_id=0, byte_fallback=True
        )
    tokenizer = tokenizers.Tokenizer(network)
    fallback = [decoders.ByteFallback(), decoders.Fuse()]
    if form == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback, decoders.Strip(" ", 1, 0)])
    elif form == "replace":  # like Gemma, without a leading space
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *fallback])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=model == "unigram")
        tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), *fallback])
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


PACKAGE = {
    "byte_level": byte_level(),
    "llama": sentencepiece_like("bpe", "prepend"),
    "gemma": sentencepiece_like("bpe", "replace"),
    "metaspace": sentencepiece_like("bpe", "metaspace"),
    "unigram": sentencepiece_like("unigram", "metaspace"),
}
CONFIG = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a published folder of each tokenizer."""
    made = {}
    for name, tokenizer in PACKAGE.items():
        made[name] = tmp_path_factory.mktemp(name)
        tokenizer.save(str(made[name] / "tokenizer.json"))
        (made[name] / "tokenizer_config.json").write_text(
            json.dumps({**CONFIG, "chat_template": "{{ bos_token }}\r\nx"})
        )
        (made[name] / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [tokenizer.token_to_id("<|im_end|>")]})
        )
    return made


@pytest.fixture(scope="module")
def read(folders):
    return {name: read_tokenizer(folder) for name, folder in folders.items()}


names = pytest.mark.parametrize("name", PACKAGE)
MARKED = st.lists(
    st.text(max_size=8) | st.sampled_from([*SPECIALS, "<tool_call>", " ", "\n", "▁", "the ", "é", "e\u0301", "🦜"])
).map("".join)


@names
@given(text=MARKED)
def test_ids_match_the_package_and_no_text_gives_a_special_token(read, name, text):
    ours, package = read[name], PACKAGE[name]
    marked = package.encode(text, add_special_tokens=False).ids
    assert ours.encode_marked(text).tolist() == marked
    ids = ours.encode(text)
    assert ids.dtype == np.int32 and not {"<s>", "</s>", "<|im_end|>"} & {package.id_to_token(i) for i in ids}
    if not any(special in text for special in SPECIALS):
        assert ids.tolist() == marked
    np.testing.assert_array_equal(ours.encode_many([text, "a b"])[0], ids)


@names
def test_every_id_decodes_like_the_package_alone_and_in_pairs(read, name):
    ours, package = read[name], PACKAGE[name]
    other = ours.encode("x").tolist()[-1]
    for i in range(ours.vocab_size):
        for ids in ([i], [i, other], [other, i], [i, i]):
            assert ours.decode(ids) == package.decode(ids, skip_special_tokens=True), ids


@names
@given(data=st.data())
def test_texts_and_streams_match_the_package(read, name, data):
    ours, package = read[name], PACKAGE[name]
    some = st.integers(0, ours.vocab_size - 1) | st.sampled_from(ours.encode("é 🦜 x▁").tolist())
    drawn = data.draw(st.lists(some) | st.text())
    ids = ours.encode(drawn).tolist() if isinstance(drawn, str) else drawn
    expected = package.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids) == expected
    stream = ours.stream()
    for _ in range(2):  # a flushed stream starts a new text
        assert "".join([stream.push(i) for i in ids]) + stream.flush() == expected


@names
def test_a_stream_returns_only_complete_characters(read, name):
    ours = read[name]
    stream = ours.stream()
    ids = ours.encode("the 🦜 the").tolist()
    shown = [stream.push(i) for i in ids]
    assert all("\ufffd" not in text for text in shown) and sum(map(bool, shown)) > 2


@names
@given(text=st.text())
def test_bytes_of_ids_sum_to_the_text(read, name, text):
    ours = read[name]
    ids = ours.encode(text)
    if (
        name in ("llama", "gemma", "metaspace") and "▁" not in text
    ):  # byte-level composes characters first; Unigram has unknown text
        space = bool(text) and name != "gemma" and not (name == "metaspace" and text.startswith(" "))
        assert byte_lengths(ours)[ids].sum() == len(text.encode()) + space
    assert b"".join(ours.token_bytes(int(i)) for i in ids).decode("utf-8", "replace").strip(" ") == ours.decode(
        ids
    ).strip(" ")


@names
def test_the_folder_provides_special_tokens(read, name):
    ours, find = read[name], PACKAGE[name].token_to_id
    assert ours.special.end == find("</s>") and ours.special.unk == find("<unk>") and ours.special.pad == -1
    assert ours.special.start == (-1 if name == "byte_level" else find("<s>"))
    assert ours.special.document_start == (find("</s>") if name == "byte_level" else find("<s>"))
    assert ours.stop_token_ids == (find("</s>"), find("<|im_end|>"))
    assert (
        ours.names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        and ours.chat_template == "{{ bos_token }}\r\nx"
    )
    opened = [] if name == "byte_level" else [find("<s>")]
    assert prompt_ids(ours, "the") == opened + ours.encode("the").tolist()
    assert prompt_ids(ours, "") == [ours.special.document_start]
    assert all(ours.token_bytes(find(special)) == b"" for special in SPECIALS)
    with pytest.raises(DataError, match="outside the vocabulary"):
        ours.decode([ours.vocab_size])


def test_files_and_flags_override(folders, tmp_path):
    package = PACKAGE["llama"]
    package.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
    found = read_tokenizer(tmp_path)  # no tokenizer_config.json
    assert (
        found.special.end == 2
        and found.special.start == 1
        and found.stop_token_ids == (2,)
        and found.names["bos_token"] == "<s>"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "add_bos_token": False}))
    assert read_tokenizer(tmp_path).special.start == -1
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"mask_token": "<|im_end|>", "eos_token": "<s>"}))
    marked = read_tokenizer(tmp_path).special
    assert marked.mask == package.token_to_id("<|im_end|>") and marked.end == 2
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert read_tokenizer(tmp_path).chat_template == "from the file"


@names
def test_a_saved_tokenizer_loads_unchanged(read, name, tmp_path):
    ours = read[name]
    ours.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), read_tokenizer(tmp_path)):
        assert (
            loaded.identity == ours.identity
            and loaded.special == ours.special
            and loaded.stop_token_ids == ours.stop_token_ids
        )
        assert loaded.chat_template == ours.chat_template and loaded.names == ours.names
        np.testing.assert_array_equal(loaded.encode(TEXTS[0]), ours.encode(TEXTS[0]))
    damaged = tmp_path / "huggingface.json"
    damaged.write_text(damaged.read_text(encoding="utf-8").replace('"normalized":', '"normalized" :'), encoding="utf-8")
    with pytest.raises(DataError, match="content hash"):
        load_tokenizer(tmp_path)


@names
def test_publishing_again_gives_the_same_tokenizer(read, name, tmp_path):
    write_published(read[name], tmp_path)
    again = read_tokenizer(tmp_path)
    assert (again.identity, again.special, again.names) == (read[name].identity, read[name].special, read[name].names)
    assert again.stop_token_ids == read[name].stop_token_ids and len(again.stop_token_ids) == 2
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == special_ids(read[name])
    assert generation == {"eos_token_id": list(again.stop_token_ids), "bos_token_id": PACKAGE[name].token_to_id("<s>")}


OURS = {"byte": ByteTokenizer(), "sentencepiece": train_tokenizer(TokenizerConfig(vocab_size=400), TEXTS)}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    made = {}
    for name, tokenizer in OURS.items():
        folder = tmp_path_factory.mktemp(f"published-{name}")
        write_published(tokenizer, folder)
        assert not is_saved(folder)
        assert special_ids(tokenizer) == {"eos_token_id": 1, "bos_token_id": 1, "pad_token_id": 0}
        made[name] = read_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return made


@pytest.mark.parametrize("name", OURS)
@given(
    text=st.lists(st.text() | st.sampled_from([*SPECIAL_PIECES, "▁", "    ", "\n\n", "the the", "ababa"])).map("".join)
)
def test_published_trained_tokenizers_match_the_originals(published, name, text):
    ours, (again, package) = OURS[name], published[name]
    ids = ours.encode(text).tolist()
    assert again.encode(text).tolist() == ids and again.decode(ids) == text
    marked = ours.encode_marked(text).tolist()
    assert package.encode(text, add_special_tokens=False).ids == again.encode_marked(text).tolist() == marked
    assert package.encode(text).ids == [ours.special.start, *marked]
    assert package.decode(ids) == text and again.special == ours.special and again.stop_token_ids == ours.stop_token_ids


def test_the_leftmost_of_equal_merges_comes_first():
    # In ab·a·ba both pairs merge to aba, and SentencePiece takes (ab, a).
    assert _splits("aba", frozenset({"a", "b", "ab", "ba", "aba"})) == [("ab", "a"), ("a", "ba")]
    assert _splits("ababa", frozenset({"ab", "ba", "aba", "ababa"})) == [("ab", "aba"), ("aba", "ba")]


def test_data_can_be_prepared_with_a_saved_tokenizer(read, folders, tmp_path):
    source = write_corpus(tmp_path / "s", 30, longest=20)

    def config(**fields) -> DataConfig:
        given = {"path": str(folders["llama"]), "vocab_size": read["llama"].vocab_size, **fields}
        return byte_config(tmp_path, source, tokenizer=TokenizerConfig(kind="saved", **given))

    prepared = prepare(config())
    assert prepared.tokenizer.identity == read["llama"].identity
    stream, starts = prepared.array("heldout.s.tokens"), prepared.array("heldout.s.starts")
    assert set(stream[starts[:-1]]) == {1} and set(stream[starts[1:] - 1]) == {2}
    with pytest.raises(DataError, match=r"data.tokenizer.vocab_size = 7: .* has \d+ ids"):
        prepare(config(vocab_size=7))
    with pytest.raises(DataError, match="no tokenizer at"):
        prepare(config(path=str(tmp_path / "none")))
    with pytest.raises(DataError, match=r"data.tokenizer.path is empty"):
        prepare(config(path=""))


def change(**parts):
    return lambda description: {**description, **parts}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (change(decoder=None), "decoder none"),
        (change(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "WordPiece"),
        (change(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}), "WordLevel"),
        (change(model=3), "damaged"),
        (
            lambda d: {**d, "model": {**d["model"], "continuing_subword_prefix": "##"}},
            r"model.continuing_subword_prefix = '##'",
        ),
        (lambda d: {**d, "model": {**d["model"], "end_of_word_suffix": "</w>"}}, r"model.end_of_word_suffix = '</w>'"),
        (change(pre_tokenizer={"type": "Unheard"}), "cannot read tokenizer.json"),
    ],
)
def test_unsupported_tokenizers_are_refused_with_the_reason(tmp_path, changed, words):
    description = changed(json.loads(PACKAGE["llama"].to_str()))
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(DataError, match=words):
        read_tokenizer(tmp_path)


def test_missing_files_and_ids_are_named(tmp_path):
    with pytest.raises(DataError, match=r"expected tokenizer.json, \*.tiktoken or tokenizer.model"):
        read_tokenizer(tmp_path)
    PACKAGE["llama"].save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no end-of-text token"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json is damaged"):
        read_tokenizer(tmp_path)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", {"text_config": None}, "text_config = None"),
        ("config.json", {"eos_token_id": {}}, "eos_token_id = {}"),
        ("config.json", {"text_config": {"eos_token_id": "2"}}, "text_config.eos_token_id = '2'"),
        ("config.json", {"bos_token_id": "1"}, "bos_token_id = '1'"),
        ("config.json", {"eos_token_id": 99999}, "eos_token_id = 99999: expected ids from 0 to "),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id = '2'"),
        ("generation_config.json", {"eos_token_id": [2, -5]}, "eos_token_id = -5"),
        ("generation_config.json", {"eos_token_id": [2.5]}, r"eos_token_id = \[2.5\]"),
        ("generation_config.json", {"eos_token_id": True}, "eos_token_id = True"),
        ("generation_config.json", DEEP, "recursion"),
        ("tokenizer_config.json", {**CONFIG, "eos_token": {}}, "eos_token = {}"),
        ("tokenizer_config.json", {**CONFIG, "eos_token": 2}, "eos_token = 2"),
        ("tokenizer_config.json", {**CONFIG, "add_bos_token": "no"}, "add_bos_token = 'no'"),
        ("tokenizer_config.json", {**CONFIG, "chat_template": [1]}, r"chat_template = \[1\]"),
        (
            "tokenizer_config.json",
            {**CONFIG, "chat_template": [{"name": "default", "template": 1}]},
            "chat_template = ",
        ),
        ("special_tokens_map.json", {"sep_token": []}, r"sep_token = \[\]"),
        ("tokenizer.json", DEEP, "recursion"),
    ],
)
def test_malformed_files_are_named_by_key(tmp_path, file, content, words):
    PACKAGE["llama"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=f"{file}.*{words}"):
        read_tokenizer(tmp_path)


def test_a_pad_token_id_of_minus_one_means_no_padding(tmp_path):
    PACKAGE["llama"].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(
        json.dumps({"eos_token_id": None, "pad_token_id": -1, "text_config": {"eos_token_id": 2}})
    )
    assert read_tokenizer(tmp_path).special.pad == -1 and read_tokenizer(tmp_path).stop_token_ids == (2,)


@pytest.mark.parametrize("inside", [False, True])  # whether the model's vocabulary also has the token
@names
def test_special_tokens_without_an_embedding_row_are_dropped(read, name, tmp_path, inside):
    """In Gemma 3's text-only release, <image_soft_token> comes after the embedding's rows."""
    ours = read[name]
    rows = ours.vocab_size
    description = json.loads(ours.text)
    token = {**description["added_tokens"][0], "id": rows, "content": "<image>", "special": True}
    description["added_tokens"].append(token)
    if inside and name == "unigram":
        description["model"]["vocab"].append(["<image>", -1.0])
    elif inside:
        description["model"]["vocab"]["<image>"] = rows
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**CONFIG, "mask_token": "<image>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ours.stop_token_ids)}))
    wide = read_tokenizer(tmp_path)
    assert wide.vocab_size == rows + 1 and wide.special.mask == rows
    if inside and name == "byte_level":  # its special tokens are numbered after the model's pieces and would move
        with pytest.raises(DataError, match="other ids would change"):
            fit_vocabulary(wide, rows)
        return
    fitted, unused = fit_vocabulary(wide, rows)
    assert (fitted.vocab_size, unused) == (rows, 0)
    assert (fitted.special, fitted.stop_token_ids, fitted.names) == (ours.special, ours.stop_token_ids, ours.names)
    assert fitted.identity != wide.identity and "<image>" not in fitted.special_names
    text = "the <image> 🦜</s>"
    assert rows not in fitted.encode(text) and fitted.encode_marked(text).tolist() == ours.encode_marked(text).tolist()
    assert fit_vocabulary(fitted, rows)[0] is fitted and fit_vocabulary(wide, rows + 3) == (wide, 2)
    fitted.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert (loaded.identity, loaded.vocab_size) == (fitted.identity, rows)
    for left in (rows - 1, 3):  # an id of text, or the end tokens, would have no row
        with pytest.raises(DataError, match="ids, but the model's embedding has only"):
            fit_vocabulary(wide, left)
    with pytest.raises(DataError, match="ids, but the model's embedding has only"):
        fit_vocabulary(read_tokenizer(tmp_path).with_stop_tokens([rows]), rows)


def test_a_vocabulary_must_fit_the_embedding_rows():
    assert fit_vocabulary(ByteTokenizer(), 270)[1] == 3
    with pytest.raises(DataError, match="267 ids, but the model's embedding has only 266 rows"):
        fit_vocabulary(ByteTokenizer(), 266)
    assert check_vocabulary(ByteTokenizer(), 267) == 0 and check_vocabulary(ByteTokenizer(), 384) == 117
    with pytest.raises(DataError, match="267 ids, but the model's embedding has only 266 rows"):
        check_vocabulary(ByteTokenizer(), 266)
    assert SpecialTokens().document_start == 1
