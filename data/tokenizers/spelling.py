"""What the ids of a tokenizer.json spell: its decoder read as tables of bytes and a stream, equal to the tokenizers
package's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from data.config import DataError

_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_SUPPORTED = "ByteLevel, Metaspace, Replace of a string, ByteFallback, Fuse, and Strip at the start"


class Spelling(NamedTuple):
    """Of V ids; specials and gaps spell None."""

    later: tuple[bytes | None, ...]
    first: tuple[bytes | None, ...]  # as the first piece of a text
    byte_pieces: frozenset[int]  # ids of byte fallback: a run of them is UTF-8 as a whole, or U+FFFD for each
    first_bytes: frozenset[int]  # the same as the first piece of a text: '▁<0x41>' that loses its space is one, too
    strip: tuple[str, int]  # at most so many of a character are dropped at the start of a text
    joined: bool  # all pieces are bytes of one UTF-8 text


def read_spelling(decoder: Mapping[str, Any] | None, pieces: Mapping[int, str], specials: frozenset[int]) -> Spelling:
    """Of the `decoder` of a tokenizer.json, for pieces by id. Raises DataError for one that is not expressed."""
    steps = _steps(decoder)
    kinds = [step["type"] for step in steps]
    joined = "ByteLevel" in kinds
    if joined and kinds != ["ByteLevel"]:
        raise _refused(f"ByteLevel among {kinds}")
    fallback, strip = "ByteFallback" in kinds, ("", 0)
    changes: list[Callable[[str, bool], str]] = []
    for i, step in enumerate(steps):
        kind = step["type"]
        if kind == "Metaspace":
            changes.append(_metaspace(step))
        elif kind == "Replace" and "String" in step["pattern"] and "Fuse" not in kinds[:i]:
            changes.append(_replacing(step["pattern"]["String"], step["content"]))
        elif kind == "Strip" and step["stop"] == 0 and "Fuse" in kinds[:i] and not strip[1]:
            strip = (step["content"], step["start"])
        elif kind not in ("ByteLevel", "ByteFallback", "Fuse"):
            raise _refused(f"{kind}: {step}")

    def changed(token: int, is_first: bool) -> str:
        piece = pieces[token]
        for change in changes:
            piece = change(piece, is_first)
        return piece

    def spelled(token: int, is_first: bool) -> bytes | None:
        piece = pieces.get(token)
        if piece is None or token in specials:
            return None
        if joined:
            table = byte_characters()
            known = all(character in table for character in piece)
            return bytes(table[character] for character in piece) if known else piece.encode("utf-8")
        piece = changed(token, is_first)
        if fallback and _BYTE_PIECE.fullmatch(piece):
            return bytes([int(piece[3:5], 16)])
        return piece.encode("utf-8")

    def byte_pieces(is_first: bool) -> frozenset[int]:
        spells = (i for i in ids if fallback and later[i] is not None)
        return frozenset(i for i in spells if _BYTE_PIECE.fullmatch(changed(i, is_first)))

    ids = range(max(pieces) + 1)
    later = tuple(spelled(i, False) for i in ids)
    first = tuple(spelled(i, True) for i in ids) if "Metaspace" in kinds else later
    return Spelling(later, first, byte_pieces(False), byte_pieces(True), strip, joined)


def _steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        raise _refused("none (pieces joined by spaces)")
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _replacing(old: str, new: str) -> Callable[[str, bool], str]:
    return lambda piece, _: piece.replace(old, new)


def _metaspace(step: Mapping[str, Any]) -> Callable[[str, bool], str]:
    mark = step["replacement"]
    drops = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    return lambda piece, is_first: piece.replace(mark, "" if is_first and drops else " ")


def _refused(what: str) -> DataError:
    return DataError(
        f"tokenizer.json: its decoder is {what}, which is not read; supported are {_SUPPORTED} (byte-level BPE, and "
        "SentencePiece with byte fallback)"
    )


@cache
def byte_characters() -> dict[str, int]:
    """The bytes that the characters of byte-level BPE stand for (Radford et al. 2019, encoder.py): printable ones for
    themselves, the others, in order, for the characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class PieceStream:
    """Decodes pieces, each a text of its own, and runs of bytes."""

    def __init__(self, spelling: Spelling, check: Callable[[int], object]):
        self._spelling, self._check = spelling, check
        self._begin()

    def _begin(self) -> None:
        self._run = bytearray()  # of byte pieces: only its end tells whether it is UTF-8
        self._table = self._spelling.first
        self._strip = self._spelling.strip[1]

    def push(self, token: int) -> str:
        self._check(token)
        spelled = self._table[token]
        if spelled is None:
            return ""  # a special: it neither begins the text nor ends a run
        byte_pieces = self._spelling.first_bytes if self._table is self._spelling.first else self._spelling.byte_pieces
        self._table = self._spelling.later
        if token in byte_pieces:
            self._run += spelled
            return ""
        return self._stripped(self._end_run() + spelled.decode("utf-8"))

    def flush(self) -> str:
        text = self._stripped(self._end_run())
        self._begin()
        return text

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._spelling.strip[0]:
                self._strip = 0
            else:
                text, self._strip = text[1:], self._strip - 1
        return text
