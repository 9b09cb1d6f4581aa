"""Tokenizers from a Hugging Face tokenizer.json, run by the tokenizers package (Rust)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data.config import DataError
from data.paths import parse_path
from data.tokenizers.description import write_description
from data.tokenizers.extras import needed
from data.tokenizers.protocol import BytesTable, SpecialTokens, Stream
from data.tokenizers.spelling import PieceStream, read_spelling

FILE = "huggingface.json"  # in a saved folder: the published tokenizer.json, byte for byte
_MODELS = ("BPE", "Unigram")


class HFTokenizer(BytesTable):
    """A tokenizer from the text of a tokenizer.json.

    `special` and `names` come from the other files in its folder (data.tokenizers.published). The normalizer and
    pre-tokenizer are used; the post-processor, truncation and padding are not. Added tokens that are not special
    ('<tool_call>') are found in any text, special tokens only by `encode_marked`.
    """

    def __init__(
        self,
        text: str,
        special: SpecialTokens,
        *,
        stop_token_ids: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        self.text, self.special, self.chat_template = text, special, chat_template
        self.stop_token_ids = tuple(dict.fromkeys([special.end, *stop_token_ids]))
        self.names = dict(names or {})
        self.description = read_json(text)
        model = self.description["model"]
        if model.get("type", "BPE") not in _MODELS:
            raise DataError(
                f"tokenizer.json: model.type = {model['type']!r}: not supported (supported: {', '.join(_MODELS)})"
            )
        self._marked = open_json(text)
        self._plain = open_json(_hide_special_tokens(self.description) if model.get("type") == "Unigram" else text)
        self._plain.encode_special_tokens = True
        added = self._marked.get_added_tokens_decoder()
        self.special_ids = special_ids = frozenset(i for i, token in added.items() if token.special)
        pieces = {i: piece for piece, i in self._marked.get_vocab(with_added_tokens=False).items()}
        pieces |= {i: token.content for i, token in added.items()}
        self.pieces = pieces
        self._spelling = read_spelling(self.description.get("decoder"), pieces, special_ids)
        self._table = tuple(spelled or b"" for spelled in self._spelling.later)
        self._special_token_ids = {token.content: i for i, token in added.items() if token.special}
        self._is_special = np.zeros(len(self._table), bool)
        self._is_special[list(special_ids)] = True
        unknown = self._marked.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
        if unknown is not None:
            self._is_special[unknown] = False  # the only special token that text may encode to

    @cached_property
    def identity(self) -> str:
        framing = (self.special.start, self.special.end)
        return hashlib.sha256(f"huggingface {framing} ".encode() + self.text.encode("utf-8")).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return self._checked(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [
            self._checked(found.ids) for found in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def encode_marked(self, text: str, apart: str = "") -> np.ndarray:
        if apart:  # encode parts separately, so that tokenizers which add a leading space to a text add it to each part
            return super().encode_marked(text, apart)
        return np.array(self._marked.encode(text, add_special_tokens=False).ids, np.int32)

    def _checked(self, ids: list[int]) -> np.ndarray:
        found = np.array(ids, np.int32)
        if self._is_special[found].any():
            names = sorted({self.pieces[i] for i in found[self._is_special[found]].tolist()})
            raise DataError(
                f"tokenizer.json: plain text was encoded to the special tokens {names}, because merges produce them. "
                "Text could forge them. Publish it without these merges"
            )
        return found

    def stream(self) -> Stream:
        return super().stream() if self._spelling.joined else PieceStream(self._spelling, self.token_bytes)

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = parse_path(directory, "tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.text.encode("utf-8"))
        write_description(
            directory, "huggingface", self, special=self.special._asdict(), stop_token_ids=self.stop_token_ids,
            names=self.names,
        )  # fmt: skip


def read_json(text: str) -> dict[str, Any]:
    """Parse a tokenizer.json. Raises DataError if it is damaged or has another format."""
    try:
        description = json.loads(text)
        model = description["model"]
        model["vocab"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"tokenizer.json is damaged or has another format ({error!r}). Download it again") from error
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get("type", "BPE") == "BPE" and model.get(key):  # some of these end the process inside the package
            raise DataError(
                f"tokenizer.json: model.{key} = {model[key]!r}: not supported (supported: byte-level BPE and "
                "SentencePiece). Use a tokenizer.json without it"
            )
    return description


def open_json(text: str) -> Any:
    """Return the tokenizers package's Tokenizer without truncation and padding. Raises DataError."""
    tokenizers = needed("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the package raises bare Exception
        raise DataError(f"tokenizers {tokenizers.__version__} cannot read tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _hide_special_tokens(description: dict[str, Any]) -> str:
    """Return a tokenizer.json whose special tokens cannot match text.

    Unigram looks for every piece in the text, including special tokens. A leading space in their names, which Unigram
    never sees, prevents this.
    """
    special = {token["content"] for token in description.get("added_tokens", ()) if token["special"]}
    unknown = description["model"].get("unk_id")
    vocab = [
        [f" {piece}" if piece in special and i != unknown else piece, score]
        for i, (piece, score) in enumerate(description["model"]["vocab"])
    ]
    added = [
        {**token, "content": f" {token['content']}"} if token["special"] and token["id"] != unknown else token
        for token in description.get("added_tokens", ())
    ]
    changed = {
        **description,
        "model": {**description["model"], "vocab": vocab},
        "added_tokens": added,
        "post_processor": None,
    }
    return json.dumps(changed)
