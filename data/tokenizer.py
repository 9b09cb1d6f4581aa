"""Tokenizers whose text round-trips exactly: SentencePiece BPE with byte fallback, and plain UTF-8 bytes.

Both put the specials of `SPECIAL_PIECES` at the same small ids, and no text ever encodes to a special. Decoding joins the
bytes of the pieces, so that every tokenizer also says what each id spells (`token_bytes`) and bits per byte are exact.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import sentencepiece

from data.config import SPECIAL_PIECES, DataError, TokenizerConfig

# SentencePiece writes a space as U+2581 and would give a real U+2581 back as a space: we spell that one in bytes.
_SPACE_MARK = "\u2581"
# Longer lines are cut for training alone: SentencePiece silently ignores long sentences.
_TRAINING_LINE = 1000
# Characters beyond this share of the text, the rare ones, are spelled in bytes.
_CHARACTER_COVERAGE = 0.9995


class SpecialTokens(NamedTuple):
    """Ids of the specials, equal in every tokenizer."""

    pad: int = 0
    end: int = 1  # opens and closes every document
    unk: int = 2  # reserved: byte fallback leaves nothing unknown
    fim_prefix: int = 3
    fim_suffix: int = 4
    fim_middle: int = 5
    system: int = 6
    user: int = 7
    assistant: int = 8
    end_of_turn: int = 9
    mask: int = 10


class Tokenizer(Protocol):
    """Text to ids and back: `decode(encode(text)) == text` for every text that UTF-8 can hold."""

    special: SpecialTokens

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        ...

    @property
    def identity(self) -> str:
        """SHA-256 in hex of all that decides an encoding."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [L] of a text; no special is added, none comes from the text."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on several threads where that pays."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; specials spell nothing, broken UTF-8 becomes U+FFFD. Raises DataError for an id out of range."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes an id spells: b'' for a special."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer into a folder, for `load_tokenizer`."""
        ...


class _BytesTable:
    """What tokenizers share: ids are decoded by joining the bytes they spell."""

    special = SpecialTokens()
    _table: tuple[bytes, ...]

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < len(self._table):
            raise DataError(f"token id {token} is outside the vocabulary of {len(self._table)}: ids start at 0")
        return self._table[token]

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(token)) for token in ids).decode("utf-8", "replace")


class ByteTokenizer(_BytesTable):
    """The specials, then the 256 bytes."""

    _table = (b"",) * len(SPECIAL_PIECES) + tuple(bytes([byte]) for byte in range(256))
    identity = hashlib.sha256(f"byte {SPECIAL_PIECES}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) + len(SPECIAL_PIECES)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def save(self, directory: str | Path) -> None:
        _write_description(directory, "byte", self.identity)


class SentencePieceTokenizer(_BytesTable):
    """SentencePiece BPE from its serialized model, as `train_tokenizer` makes it."""

    def __init__(self, model: bytes):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = [self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size())]
        if tuple(pieces[: len(SPECIAL_PIECES)]) != SPECIAL_PIECES:
            raise DataError(
                f"the tokenizer's first pieces are {pieces[: len(SPECIAL_PIECES)]}, not the specials {SPECIAL_PIECES}: "
                "train it with data.tokenizer.train_tokenizer"
            )
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

    def save(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        Path(directory, "tokenizer.model").write_bytes(self.model)
        _write_description(directory, "sentencepiece", self.identity)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes each id spells, int32 [vocab_size]: a document's tokens sum to its size."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int32)


class StreamDecoder:
    """Decodes ids one by one without ever splitting a character; the pieces joined equal `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps ''."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """U+FFFD for a character left incomplete, else ''; the decoder starts afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def stream_decoder(tokenizer: Tokenizer) -> StreamDecoder:
    """A fresh incremental decoder."""
    return StreamDecoder(tokenizer)


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Learn a tokenizer from texts; the same texts in the same order give the same identity.

    Raises DataError when the texts are too few for the vocabulary.
    """
    if config.kind == "byte":
        return ByteTokenizer()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts),
            model_writer=model,
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
            control_symbols=list(SPECIAL_PIECES[3:]),  # control symbols, unlike user symbols, are never found in text
            user_defined_symbols=["\n"],
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise DataError(
            f"data.tokenizer.vocab_size = {config.vocab_size} cannot be learned from the training text: {reason} "
            "Change it, add text, or set data.tokenizer.kind to 'byte'"
        ) from error
    return SentencePieceTokenizer(model.getvalue())


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.replace("\0", "").split("\n"):  # SentencePiece drops a whole line for one NUL
            for start in range(0, len(line), _TRAINING_LINE):
                yield line[start : start + _TRAINING_LINE]


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read a saved tokenizer. Raises DataError naming the file that is missing, damaged or of another tokenizer."""
    path = Path(directory, "tokenizer.json")
    try:
        description = json.loads(path.read_bytes())
        kind, identity = description["kind"], description["identity"]
        tokenizer = (
            ByteTokenizer()
            if kind == "byte"
            else SentencePieceTokenizer(Path(directory, "tokenizer.model").read_bytes())
        )
    except OSError as error:
        raise DataError(f"no tokenizer in {directory}: {error.filename}: {error.strerror}; save one there") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"tokenizer in {directory} is damaged ({error}); save it again") from error
    if tokenizer.identity != identity:
        raise DataError(
            f"tokenizer in {directory}: content hash {tokenizer.identity[:16]}, but {path.name} says {identity[:16]}; "
            "the files are damaged or of two tokenizers; save it again"
        )
    return tokenizer


def _write_description(directory: str | Path, kind: str, identity: str) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    Path(directory, "tokenizer.json").write_text(json.dumps({"kind": kind, "identity": identity}) + "\n")
