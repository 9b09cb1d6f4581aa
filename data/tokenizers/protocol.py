"""The tokenizer protocol, and a base class for tokenizers that decode ids by joining their bytes."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol, Self

import numpy as np

from data.config import DataError


class SpecialTokens(NamedTuple):
    """Ids of special tokens, or -1 for those that a published tokenizer lacks.

    The defaults are the ids of this project's own tokenizers.
    """

    pad: int = 0
    end: int = 1  # closes every document; every tokenizer has it
    unk: int = 2  # unused in this project's tokenizers, whose byte fallback leaves nothing unknown
    fim_prefix: int = 3
    fim_suffix: int = 4
    fim_middle: int = 5
    system: int = 6
    user: int = 7
    assistant: int = 8
    end_of_turn: int = 9
    mask: int = 10
    start: int = 1  # opens prompts and documents; -1: prompts have no opening token

    @property
    def document_start(self) -> int:
        """Return the id that opens a document: `start`, or `end` if there is none, since a window's first token is not
        predicted."""
        return self.end if self.start < 0 else self.start


class Stream(Protocol):
    """An incremental decoder that never splits a character. The joined results equal `decode` of all ids."""

    def push(self, token: int) -> str:
        """Return the text that this id completes, possibly ''. Raises DataError for an id out of range."""
        ...

    def flush(self) -> str:
        """Return U+FFFD for incomplete remaining bytes, else '', and start a new text."""
        ...


class Tokenizer(Protocol):
    """Convert text to ids and back.

    For this project's own tokenizers, `decode(encode(text)) == text` for every text that UTF-8 can encode. A published
    tokenizer's normalizer may change text. Every tokenizer provides the bytes of each id.
    """

    special: SpecialTokens
    stop_token_ids: tuple[int, ...]  # ids that end a generation: `end` and others that the publisher lists
    chat_template: str | None  # Jinja2 source, for data.chat
    names: dict[str, str]  # special tokens by their names in chat templates: {'bos_token': '<s>', ...}

    @property
    def vocab_size(self) -> int:
        """Return the highest id plus 1."""
        ...

    @property
    def identity(self) -> str:
        """Return the SHA-256 in hex of everything that determines the encoding."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return ids int32 [L] of a document's or user's text, without special tokens."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text, using several threads if that is faster."""
        ...

    def encode_marked(self, text: str, apart: str = "") -> np.ndarray:
        """Return ids like `encode`, but encode names of special tokens ('<|im_end|>') as special tokens.

        This is for rendered chat templates. `apart`: a string that is removed from the text; inserted into a name, it
        keeps the name as text.
        """
        ...

    @property
    def special_names(self) -> tuple[str, ...]:
        """Return the names that `encode_marked` encodes as special tokens."""
        ...

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """Return the text of ids, without special tokens and with U+FFFD for invalid UTF-8. Raises DataError for an id
        out of range."""
        ...

    def stream(self) -> Stream:
        """Return a new incremental decoder."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of an id, or b'' for special tokens and the piece for unknown text.

        They include SentencePiece's space before a text, although `decode` drops it.
        """
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer to a folder for `load_tokenizer`."""
        ...


class ByteStream:
    """A stream that decodes the joined bytes of all ids as UTF-8."""

    def __init__(self, tokenizer: BytesTable):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class BytesTable:
    """Base class of tokenizers: decode by joining the bytes of ids, and split marked text at special tokens."""

    special = SpecialTokens()
    stop_token_ids: tuple[int, ...] = (SpecialTokens().end,)
    chat_template: str | None = None
    names: dict[str, str]
    _table: tuple[bytes, ...]
    _special_token_ids: dict[str, int]  # ids of special tokens by name
    encode: Callable[..., np.ndarray]  # defined by subclasses

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < len(self._table):
            raise DataError(f"token id {token} is outside the vocabulary of {len(self._table)} ids, numbered from 0")
        return self._table[token]

    def stream(self) -> Stream:
        return ByteStream(self)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        stream = self.stream()
        return "".join([stream.push(int(token)) for token in ids]) + stream.flush()

    def with_stop_tokens(self, stop_token_ids: Iterable[int]) -> Self:
        """Add ids that end a generation, and return self."""
        self.stop_token_ids = tuple(dict.fromkeys([*self.stop_token_ids, *stop_token_ids]))
        return self

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self._special_token_ids, key=len, reverse=True))) + ")")

    @property
    def special_names(self) -> tuple[str, ...]:
        return tuple(self._special_token_ids)

    def encode_marked(self, text: str, apart: str = "") -> np.ndarray:
        if not self._special_token_ids:
            return self.encode(text.replace(apart, ""))
        parts = [
            np.array([self._special_token_ids[part]], np.int32) if i % 2 else self.encode(part.replace(apart, ""))
            for i, part in enumerate(self._special_pattern.split(text))
            if part
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt: the start token, if any, and the text. An empty prompt is opened like a document."""
    start = tokenizer.special.start
    ids = [start] if start >= 0 else []
    return ids + tokenizer.encode(text).tolist() or [tokenizer.special.document_start]


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Return the number of bytes of each id, int32 [vocab_size]. A document's tokens sum to its size.

    If a published tokenizer adds a space before a text or normalizes it, the sum is the size of the changed text.
    """
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int32)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> int:
    """Return the number of embedding rows that no id uses. Raises DataError if the tokenizer has more ids than rows."""
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's embedding has only {rows} rows: ids from "
            f"{rows} have none. Use the tokenizer that was published with the model, or enlarge the embedding"
        )
    return rows - tokenizer.vocab_size
