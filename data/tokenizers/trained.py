"""Tokenizers that round-trip text exactly: SentencePiece BPE with byte fallback, and plain UTF-8 bytes.

Both have the special tokens `SPECIAL_PIECES` at the same small ids, and no text encodes to a special token. Decoding
joins the bytes of the pieces (`token_bytes`), so that bits per byte are exact.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data.config import SPECIAL_PIECES, DataError, TokenizerConfig
from data.paths import parse_path
from data.tokenizers.description import write_description
from data.tokenizers.extras import needed
from data.tokenizers.protocol import BytesTable, Tokenizer

# SentencePiece writes a space as U+2581 and would decode a real U+2581 to a space, so that one is encoded as bytes.
_SPACE_MARK = "\u2581"
# Longer lines are split for training only, because SentencePiece silently ignores long sentences.
_TRAINING_LINE = 1000
# Share of the text's characters that get pieces; the rare others are encoded as bytes.
_CHARACTER_COVERAGE = 0.9995
NAMES = {"bos_token": "<end>", "eos_token": "<end>", "pad_token": "<pad>", "unk_token": "<unk>"}


class ByteTokenizer(BytesTable):
    """A tokenizer whose ids are the special tokens, then the 256 bytes."""

    names = NAMES
    _table = (b"",) * len(SPECIAL_PIECES) + tuple(bytes([byte]) for byte in range(256))
    _special_token_ids = {piece: i for i, piece in enumerate(SPECIAL_PIECES)}  # noqa: RUF012
    identity = hashlib.sha256(f"byte {SPECIAL_PIECES}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(SPECIAL_PIECES)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def save(self, directory: str | os.PathLike[str]) -> None:
        write_description(directory, "byte", self)


class SentencePieceTokenizer(BytesTable):
    """SentencePiece BPE from the serialized model that `train_tokenizer` makes."""

    names = NAMES

    def __init__(self, model: bytes):
        self.model = model
        self._processor = needed("sentencepiece").SentencePieceProcessor(model_proto=model)
        pieces = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        if tuple(pieces[: len(SPECIAL_PIECES)]) != SPECIAL_PIECES:
            raise DataError(
                f"the tokenizer's first pieces are {pieces[: len(SPECIAL_PIECES)]}, not {SPECIAL_PIECES}. "
                "Train it with data.tokenizer.train_tokenizer"
            )
        self.pieces = tuple(pieces)
        self._special_token_ids = {piece: i for i, piece in enumerate(SPECIAL_PIECES)}
        self._table = tuple(self._spelling(i, piece) for i, piece in enumerate(pieces))
        self._space_mark = np.array([pieces.index(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()], np.int32)

    def _spelling(self, token: int, piece: str) -> bytes:
        if token < len(SPECIAL_PIECES):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode("utf-8")

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256(b"sentencepiece" + self.model).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        first, *rest = text.split(_SPACE_MARK)
        ids = [self._processor.encode(first, return_type="numpy")]
        for part in rest:
            ids += [self._space_mark, self._processor.encode(part, return_type="numpy")]
        return np.concatenate(ids).astype(np.int32, copy=False)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        plain = [text for text in texts if _SPACE_MARK not in text]
        encoded = iter(self._processor.encode(plain, return_type="numpy", num_threads=os.cpu_count()) if plain else ())
        return [self.encode(text) if _SPACE_MARK in text else next(encoded) for text in texts]

    def save(self, directory: str | os.PathLike[str]) -> None:
        folder = parse_path(directory, "tokenizer")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self.model)
        write_description(directory, "sentencepiece", self)


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Train a tokenizer on texts. The same texts in the same order give the same identity.

    Raises DataError if the texts are too few for the vocabulary.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    try:
        model = _learn(
            _training_lines(texts),
            model_type="bpe",
            vocab_size=config.vocab_size,
            character_coverage=_CHARACTER_COVERAGE,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _TRAINING_LINE,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece=SPECIAL_PIECES[0],
            eos_piece=SPECIAL_PIECES[1],
            unk_piece=SPECIAL_PIECES[2],
            control_symbols=list(SPECIAL_PIECES[3:]),  # unlike user symbols, control symbols are never found in text
            user_defined_symbols=["\n"],
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise DataError(
            f"data.tokenizer.vocab_size = {config.vocab_size}: not possible with the training text: {reason} "
            "Change it, add text, or set data.tokenizer.kind to 'byte'"
        ) from error
    return SentencePieceTokenizer(model)


def _learn(lines: Iterator[str], **options: Any) -> bytes:
    """Return the model that SentencePiece learns from the lines. Raises errors of `lines`, or RuntimeError.

    The trainer runs in another thread, because it cannot be interrupted. An interrupt stops it while it reads lines;
    after that, it ends with the process.
    """
    model, failed, stopped = io.BytesIO(), list[Exception](), threading.Event()

    def watched() -> Iterator[str]:
        try:
            for line in lines:
                if stopped.is_set():
                    raise InterruptedError
                yield line
        except Exception as error:  # the trainer would turn it into a RuntimeError
            failed.append(error)
            raise

    def learn() -> None:
        try:
            needed("sentencepiece").SentencePieceTrainer.train(
                sentence_iterator=watched(), model_writer=model, **options
            )
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=learn, name="tokenizer training", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    finally:
        stopped.set()
    if failed:
        raise failed[0]
    return model.getvalue()


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.replace("\0", "").split("\n"):  # SentencePiece drops a line that contains NUL
            for start in range(0, len(line), _TRAINING_LINE):
                yield line[start : start + _TRAINING_LINE]
