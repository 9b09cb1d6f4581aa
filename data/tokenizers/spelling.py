"""Tables of the bytes of each id, and a stream, from a tokenizer.json's decoder; equal to the tokenizers package."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from data.config import DataError

_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_SUPPORTED = "ByteLevel, Metaspace, Replace of a string, ByteFallback, Fuse, and Strip at the start"


class Spelling(NamedTuple):
    """Bytes of all ids; None for special tokens and unused ids."""

    later: tuple[bytes | None, ...]  # of pieces after the first of a text
    first: tuple[bytes | None, ...]  # of the first piece of a text
    byte_pieces: frozenset[int]  # ids of byte fallback: a run decodes as UTF-8, or to one U+FFFD per byte
    first_bytes: frozenset[int]  # the same for the first piece of a text, including '▁<0x41>' without its space
    strip: tuple[str, int]  # (character, maximum number of it to drop at the start of a text)
    joined: bool  # whether all pieces are bytes of one UTF-8 text


def read_spelling(decoder: Mapping[str, Any] | None, pieces: Mapping[int, str], specials: frozenset[int]) -> Spelling:
    """Return the spelling of `pieces` (by id) for a tokenizer.json's `decoder`. Raises DataError if the decoder is not
    supported."""
    steps = _steps(decoder)
    kinds = [step["type"] for step in steps]
    joined = "ByteLevel" in kinds
    if joined and kinds != ["ByteLevel"]:
        raise _unsupported(f"ByteLevel among {kinds}")
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
            raise _unsupported(f"{kind}: {step}")

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
        raise _unsupported("none (pieces joined by spaces)")
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _steps(inner)]
    return [decoder]


def _replacing(old: str, new: str) -> Callable[[str, bool], str]:
    return lambda piece, _: piece.replace(old, new)


def _metaspace(step: Mapping[str, Any]) -> Callable[[str, bool], str]:
    mark = step["replacement"]
    drops = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
    return lambda piece, is_first: piece.replace(mark, "" if is_first and drops else " ")


def _unsupported(what: str) -> DataError:
    return DataError(
        f"tokenizer.json: decoder {what}: not supported (supported: {_SUPPORTED}, as in byte-level BPE and "
        "SentencePiece with byte fallback)"
    )


@cache
def byte_characters() -> dict[str, int]:
    """Return the bytes of byte-level BPE's characters (Radford et al. 2019, encoder.py).

    Printable characters stand for themselves; the characters from U+0100 stand for the other bytes, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


class PieceStream:
    """A stream that decodes pieces as separate texts and runs of byte pieces as UTF-8."""

    def __init__(self, spelling: Spelling, check: Callable[[int], object]):
        self._spelling, self._check = spelling, check
        self._begin()

    def _begin(self) -> None:
        self._run = bytearray()  # byte pieces, decoded when the run ends
        self._table = self._spelling.first
        self._strip = self._spelling.strip[1]

    def push(self, token: int) -> str:
        self._check(token)
        spelled = self._table[token]
        if spelled is None:
            return ""  # a special token neither begins the text nor ends a run
        byte_pieces = self._spelling.first_bytes if self._table is self._spelling.first else self._spelling.byte_pieces
        self._table = self._spelling.later
        if token in byte_pieces:
            self._run += spelled
            return ""
        return self._strip_start(self._end_run() + spelled.decode("utf-8"))

    def flush(self) -> str:
        text = self._strip_start(self._end_run())
        self._begin()
        return text

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _strip_start(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._spelling.strip[0]:
                self._strip = 0
            else:
                text, self._strip = text[1:], self._strip - 1
        return text
