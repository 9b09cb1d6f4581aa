"""Tokens as text: labels of single tokens, and the text that each token adds.

A token may hold part of a character. Its bytes are then shown in hexadecimal.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from data.tokenizer import Tokenizer

SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}  # of characters that leave no mark


def special_token_names(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the names of special tokens by id: {1: '<end>', ...}."""
    found = ((name, tokenizer.encode_marked(name).tolist()) for name in tokenizer.special_names)
    return {ids[0]: name for name, ids in found if len(ids) == 1}


def labels(tokenizer: Tokenizer, ids: Iterable[int]) -> dict[int, str]:
    """Return a label for each id. A vocabulary may be padded with ids that the tokenizer lacks."""
    names = special_token_names(tokenizer)

    def label(token: int) -> str:
        if token in names:
            return names[token]
        if token >= tokenizer.vocab_size:
            return f"⟨unused {token}⟩"
        spelled = tokenizer.token_bytes(token)
        try:
            return "".join(map(_visible, spelled.decode("utf-8"))) or f"⟨empty {token}⟩"
        except UnicodeDecodeError:
            return hexadecimal(spelled)

    return {token: label(token) for token in sorted(set(ids))}


def added_text(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds to those before it: '' for special tokens and for a part of a character that
    a later token completes."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(tokenizer.token_bytes(token)) for token in ids]


def hexadecimal(spelled: bytes) -> str:
    """Return bytes as text: ⟨E2 82⟩."""
    return f"⟨{spelled.hex(' ').upper()}⟩"


def _visible(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    return character if character.isprintable() else f"\\u{ord(character):04x}"
