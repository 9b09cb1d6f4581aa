"""Published SentencePiece models (Llama 2's and Gemma's tokenizer.model), decoded as the package does.

The package decodes a run of byte pieces character by character, and each byte outside a complete character becomes
U+FFFD. The piece for unknown text decodes to the model's `unk_surface`, by default " \u2047 ".
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data.config import DataError
from data.paths import parse_path
from data.tokenizers.description import write_description
from data.tokenizers.extras import needed
from data.tokenizers.protocol import BytesTable, SpecialTokens, Stream

FILE = "published.model"  # in a saved folder
_SPACE_MARK = "\u2581"


class PublishedSentencePiece(BytesTable):
    """A tokenizer from a serialized model.

    Control symbols are its special tokens; user-defined symbols are found in any text. The piece for unknown text
    decodes to the model's text for it, but its `token_bytes` are b"", because the replaced bytes are not known.
    """

    def __init__(
        self,
        model: bytes,
        *,
        special: SpecialTokens,
        stop_token_ids: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        self.model, self.special, self.chat_template = model, special, chat_template
        self.stop_token_ids = tuple(dict.fromkeys([special.end, *stop_token_ids]))
        self.names = dict(names or {})
        self._processor = _open_model(model)
        ids = range(self._processor.get_piece_size())
        pieces = [self._processor.id_to_piece(i) for i in ids]
        self._special_token_ids = {pieces[i]: i for i in ids if self._processor.is_control(i)}
        self._table = tuple(self._spelled(i, pieces[i]) for i in ids)
        self._byte_pieces = frozenset(i for i in ids if self._processor.is_byte(i))
        self._texts = {
            i: self._processor.decode([i]) if self._processor.is_unknown(i) else self._table[i].decode("utf-8")
            for i in ids
            if i not in self._byte_pieces
        }
        self._leading_spaces = _leading_spaces(self._processor, self._texts)

    @classmethod
    def published(
        cls, model: bytes, add_bos: bool | None, stop_token_ids: Sequence[int], chat_template: str | None
    ) -> PublishedSentencePiece:
        """Return the tokenizer with the model's special tokens. Prompts begin with bos unless `add_bos` is False."""
        opened = _open_model(model)
        bos, end, pad, unk = opened.bos_id(), opened.eos_id(), opened.pad_id(), opened.unk_id()
        if end < 0:
            raise DataError("tokenizer.model has no end-of-text token (eos_id -1), which documents require")
        names = {"bos_token": bos, "eos_token": end, "pad_token": pad, "unk_token": unk}
        special = SpecialTokens(
            pad=pad, end=end, unk=unk, fim_prefix=-1, fim_suffix=-1, fim_middle=-1, system=-1, user=-1, assistant=-1,
            end_of_turn=-1, mask=-1, start=-1 if add_bos is False else bos,
        )  # fmt: skip
        spelled = {name: opened.id_to_piece(i) for name, i in names.items() if i >= 0}
        return cls(model, special=special, stop_token_ids=stop_token_ids, names=spelled, chat_template=chat_template)

    def _spelled(self, token: int, piece: str) -> bytes:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode("utf-8")

    @cached_property
    def identity(self) -> str:
        framing = (self.special.start, self.special.end)
        return hashlib.sha256(f"published sentencepiece {framing} ".encode() + self.model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.encode(text, return_type="numpy"), np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self._processor.encode(list(texts), return_type="numpy", num_threads=os.cpu_count()) if texts else []
        return [np.asarray(ids, np.int32) for ids in found]

    def stream(self) -> Stream:
        return _PieceStream(
            self._texts,
            self._table,
            self._byte_pieces,
            self._processor.unk_id(),
            self._leading_spaces,
            self.token_bytes,
        )

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = parse_path(directory, "tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_bytes(self.model)
        write_description(
            directory,
            "published_sentencepiece",
            self,
            special=self.special._asdict(),
            stop_token_ids=self.stop_token_ids,
            names=self.names,
        )


def _leading_spaces(processor: Any, texts: Mapping[int, str]) -> int | None:
    """Return the number of pieces at the start of a text that lose a leading space: 0, 1, or None for all until
    visible text.

    This depends on `add_dummy_prefix` and `remove_extra_whitespaces`, which the package does not expose, so it is
    tested by decoding.
    """
    spaced = [i for i, text in texts.items() if text.startswith(" ") and not processor.is_unknown(i)]
    if not spaced or processor.decode([spaced[0]]) == texts[spaced[0]]:
        return 0
    bare = next((i for i in spaced if texts[i] == " "), None)
    return None if bare is not None and processor.decode([bare, bare]) == "" else 1


class _PieceStream:
    """A stream that decodes pieces as separate texts and runs of byte pieces as UTF-8."""

    def __init__(
        self,
        texts: Mapping[int, str],  # texts of all pieces except bytes; '' for a control symbol
        table: Sequence[bytes],
        byte_pieces: frozenset[int],
        unknown: int,  # the piece for unknown text, which keeps its leading space
        leading_spaces: int | None,
        check: Callable[[int], object],
    ):
        self._texts, self._table, self._byte_pieces, self._check = texts, table, byte_pieces, check
        self._unknown, self._leading_spaces = unknown, leading_spaces
        self._begin()

    def _begin(self) -> None:
        self._run = bytearray()  # bytes that may still become a character
        self._spaces = self._leading_spaces

    def push(self, token: int) -> str:
        self._check(token)
        if token in self._byte_pieces:
            self._run += self._table[token]
            return self._begun(_characters(self._run, final=False))
        # Any other piece ends a run, including control symbols.
        before = self._begun(_characters(self._run, final=True))
        text = self._texts[token]
        if self._spaces != 0 and token != self._unknown and text.startswith(" "):
            text = text[1:]
            if self._spaces is not None:
                self._spaces -= 1
        return before + self._begun(text)

    def flush(self) -> str:
        text = _characters(self._run, final=True)
        self._begin()
        return text

    def _begun(self, text: str) -> str:
        if text:
            self._spaces = 0
        return text


def _characters(run: bytearray, *, final: bool) -> str:
    """Remove text from the front of `run` and return it: whole characters, and U+FFFD for each invalid byte.

    Bytes that may still become a character stay, unless this is the `final` call.
    """
    found = []
    while run:
        lead = run[0]
        size = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        try:
            found.append(run[:size].decode("utf-8"))
            del run[:size]
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and not final:
                break
            found.append("\ufffd")
            del run[0]
    return "".join(found)


def _open_model(model: bytes) -> Any:
    try:
        return needed("sentencepiece").SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise DataError(
            f"tokenizer.model is damaged, or neither a SentencePiece model nor a tiktoken file ({error}). Download it "
            f"again"
        ) from error
