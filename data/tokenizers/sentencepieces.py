"""SentencePiece models that others trained (Llama 2's and Gemma's tokenizer.model): their own normalization and
specials."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from data.config import DataError
from data.tokenizers.description import write_description
from data.tokenizers.protocol import BytesTable, SpecialTokens, Stream
from data.tokenizers.spelling import PieceStream, Spelling

FILE = "published.model"  # in a saved folder
_SPACE_MARK = "\u2581"


class PublishedSentencePiece(BytesTable):
    """From a serialized model. Control symbols are the specials; user-defined ones are found in any text."""

    def __init__(
        self,
        model: bytes,
        *,
        special: SpecialTokens,
        stops: Sequence[int] = (),
        names: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ):
        self.model, self.special, self.chat_template = model, special, chat_template
        self.stops = tuple(dict.fromkeys([special.end, *stops]))
        self.names = dict(names or {})
        self._processor = _opened(model)
        ids = range(self._processor.get_piece_size())
        pieces = [self._processor.id_to_piece(i) for i in ids]
        self._marks = {pieces[i]: i for i in ids if self._processor.is_control(i)}
        spelled = tuple(self._spelled(i, pieces[i]) for i in ids)
        self._table = tuple(piece or b"" for piece in spelled)
        # The model says whether it puts a space before a text: seen by what it does with one letter.
        prefixed = "".join(self._processor.encode("a", out_type=str)).startswith(_SPACE_MARK)
        byte_pieces = frozenset(i for i in ids if self._processor.is_byte(i))
        self._spelling = Spelling(spelled, spelled, byte_pieces, byte_pieces, (" ", 1 if prefixed else 0), False)

    @classmethod
    def published(
        cls, model: bytes, add_bos: bool | None, stops: Sequence[int], chat_template: str | None
    ) -> PublishedSentencePiece:
        """With the specials that the model itself names. `add_bos`: whether a prompt is opened by bos (None: it is)."""
        opened = _opened(model)
        bos, end, pad, unk = opened.bos_id(), opened.eos_id(), opened.pad_id(), opened.unk_id()
        if end < 0:
            raise DataError("tokenizer.model has no end of text (eos_id -1); it cannot mark where documents end")
        names = {"bos_token": bos, "eos_token": end, "pad_token": pad, "unk_token": unk}
        special = SpecialTokens(
            pad=pad, end=end, unk=unk, fim_prefix=-1, fim_suffix=-1, fim_middle=-1, system=-1, user=-1, assistant=-1,
            end_of_turn=-1, mask=-1, start=-1 if add_bos is False else bos,
        )  # fmt: skip
        spelled = {name: opened.id_to_piece(i) for name, i in names.items() if i >= 0}
        return cls(model, special=special, stops=stops, names=spelled, chat_template=chat_template)

    def _spelled(self, token: int, piece: str) -> bytes | None:
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return None
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
        return PieceStream(self._spelling, self.token_bytes)

    def save(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, FILE).write_bytes(self.model)
        write_description(
            directory,
            "published_sentencepiece",
            self,
            special=self.special._asdict(),
            stops=self.stops,
            names=self.names,
        )


def _opened(model: bytes) -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise DataError(
            f"tokenizer.model is neither a SentencePiece model nor a tiktoken file, or damaged ({error}); fetch it "
            f"again"
        ) from error
