"""What every tokenizer does, and what tokenizers share: ids spell bytes, and text is made of bytes without splitting a
character."""

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
    """Ids of the specials. The defaults are those of our own kinds; of a published tokenizer, -1 is what it lacks."""

    pad: int = 0
    end: int = 1  # closes every document; every tokenizer has it
    unk: int = 2  # reserved in our own kinds: byte fallback leaves nothing unknown
    fim_prefix: int = 3
    fim_suffix: int = 4
    fim_middle: int = 5
    system: int = 6
    user: int = 7
    assistant: int = 8
    end_of_turn: int = 9
    mask: int = 10
    start: int = 1  # opens prompts and documents; -1: nothing opens a prompt

    @property
    def document_start(self) -> int:
        """What opens a document: `start`, or `end` where nothing opens a prompt (a window's first token is not
        predicted)."""
        return self.end if self.start < 0 else self.start


class Stream(Protocol):
    """Decodes ids one by one without ever splitting a character; the pieces joined equal `decode` of all ids."""

    def push(self, token: int) -> str:
        """The text that this id completes, perhaps ''. Raises DataError for an id out of range."""
        ...

    def flush(self) -> str:
        """Return U+FFFD for an incomplete rest, else '', and start a new text."""
        ...


class Tokenizer(Protocol):
    """Text to ids and back.

    Our own kinds: `decode(encode(text)) == text` for every text that UTF-8 can hold. A published tokenizer may change
    text by its normalizer; all say what each id spells.
    """

    special: SpecialTokens
    stops: tuple[int, ...]  # ids that end a generation: `end`, and what else the publisher lists
    chat_template: str | None  # Jinja2 source, for data.chat
    names: dict[str, str]  # what chat templates call the specials: {'bos_token': '<s>', ...}

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        ...

    @property
    def identity(self) -> str:
        """SHA-256 in hex of all that decides an encoding."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [L] of a document's or a user's text; no special is added, none comes from the text."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on several threads where that pays."""
        ...

    def encode_marked(self, text: str, apart: str = "") -> np.ndarray:
        """As `encode`, but names of specials in the text ('<|im_end|>') become the specials: for rendered chat
        templates.

        `apart` is dropped from the text afterwards: put into a name, it keeps it text.
        """
        ...

    @property
    def special_names(self) -> tuple[str, ...]:
        """What `encode_marked` finds."""
        ...

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        """Text of ids; specials spell nothing, broken UTF-8 becomes U+FFFD. Raises DataError for an id out of range."""
        ...

    def stream(self) -> Stream:
        """A fresh incremental decoder."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes an id spells, b'' for specials and for the piece that stands for unknown text.

        SentencePiece's space before a text counts, though `decode` drops it.
        """
        ...

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the tokenizer into a folder, for `load_tokenizer`."""
        ...


class ByteStream:
    """Decodes what ids spell as one UTF-8 text."""

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
    """What tokenizers share: ids are decoded by joining the bytes they spell, and marked text is cut at the
    specials."""

    special = SpecialTokens()
    stops: tuple[int, ...] = (SpecialTokens().end,)
    chat_template: str | None = None
    names: dict[str, str]
    _table: tuple[bytes, ...]
    _marks: dict[str, int]  # ids of the specials by name
    encode: Callable[..., np.ndarray]  # of the kind

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < len(self._table):
            raise DataError(f"token id {token} is outside the vocabulary of {len(self._table)}: ids start at 0")
        return self._table[token]

    def stream(self) -> Stream:
        return ByteStream(self)

    def decode(self, ids: Iterable[int | np.integer]) -> str:
        stream = self.stream()
        return "".join([stream.push(int(token)) for token in ids]) + stream.flush()

    def with_stops(self, stops: Iterable[int]) -> Self:
        """With further ids that end a generation."""
        self.stops = tuple(dict.fromkeys([*self.stops, *stops]))
        return self

    @cached_property
    def _split(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self._marks, key=len, reverse=True))) + ")")

    @property
    def special_names(self) -> tuple[str, ...]:
        return tuple(self._marks)

    def encode_marked(self, text: str, apart: str = "") -> np.ndarray:
        if not self._marks:
            return self.encode(text.replace(apart, ""))
        parts = [
            np.array([self._marks[part]], np.int32) if i % 2 else self.encode(part.replace(apart, ""))
            for i, part in enumerate(self._split.split(text))
            if part
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to be continued: what opens a prompt, then the text. An empty one is opened as a document is."""
    start = tokenizer.special.start
    ids = [start] if start >= 0 else []
    return ids + tokenizer.encode(text).tolist() or [tokenizer.special.document_start]


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes each id spells, int32 [vocab_size]: a document's tokens sum to its size.

    A published tokenizer that puts a space before a text, or normalizes it, makes the sum that of the changed text.
    """
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int32)


def check_vocabulary(tokenizer: Tokenizer, rows: int) -> int:
    """The rows of an embedding that no id of the tokenizer uses: 0 or more. Raises DataError when ids have no row."""
    if tokenizer.vocab_size > rows:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's embedding has {rows} rows: ids from "
            f"{rows} on would have none; use the tokenizer that was published with the model, or enlarge the embedding"
        )
    return rows - tokenizer.vocab_size
