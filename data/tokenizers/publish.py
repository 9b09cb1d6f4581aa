"""Write tokenizers for publication: tokenizer.json and the other files that transformers' AutoTokenizer reads."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.config import SPECIAL_PIECES, DataError
from data.tokenizers.huggingface import HFTokenizer, open_json
from data.tokenizers.protocol import SpecialTokens, Tokenizer
from data.tokenizers.published import opened_by
from data.tokenizers.spelling import byte_characters
from data.tokenizers.trained import ByteTokenizer, SentencePieceTokenizer

_SAMPLES = 400  # texts that check an equivalent tokenizer.json against the original
_SPACE_MARK = "\u2581"


def write_published(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, generation_config.json and the chat template to a folder, creating
    it if needed.

    An HFTokenizer's tokenizer.json is copied. This project's own tokenizers are converted to an equivalent one, which
    must give the same ids for 400 random texts. transformers then encodes names of special tokens ('<end>') in any text
    as special tokens, as it does for every tokenizer, while this project does so only in `encode_marked`. Raises
    DataError.
    """
    if isinstance(tokenizer, HFTokenizer):
        text = tokenizer.text
    elif isinstance(tokenizer, ByteTokenizer | SentencePieceTokenizer):
        text = equivalent_json(tokenizer)
    else:
        raise DataError(
            f"a {type(tokenizer).__name__} cannot be written as a tokenizer.json. Copy the file that it was read from "
            f"to {folder}, or read the model's tokenizer.json instead"
        )
    text = _with_start_token(text, tokenizer)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="")
    config = {
        **tokenizer.names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,  # otherwise decoding drops spaces before punctuation
        "model_max_length": int(1e30),  # means "no limit" in transformers
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    generation = json.dumps(special_ids(tokenizer), indent=2)
    (folder / "generation_config.json").write_text(generation + "\n", encoding="utf-8")
    if tokenizer.chat_template is not None:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")


def special_ids(tokenizer: Tokenizer) -> dict[str, int | list[int]]:
    """Return the special token ids for config.json and generation_config.json.

    'eos_token_id' has the ids that end a generation (a list if there are several); 'bos_token_id' and 'pad_token_id'
    are present if the tokenizer has these tokens.
    """
    stop_token_ids = list(tokenizer.stop_token_ids)
    found: dict[str, int | list[int]] = {
        "eos_token_id": stop_token_ids if len(stop_token_ids) > 1 else stop_token_ids[0]
    }
    bos = tokenizer.encode_marked(tokenizer.names["bos_token"]).tolist() if "bos_token" in tokenizer.names else []
    if len(bos) == 1:
        found["bos_token_id"] = bos[0]
    if tokenizer.special.pad >= 0:
        found["pad_token_id"] = tokenizer.special.pad
    return found


def equivalent_json(tokenizer: ByteTokenizer | SentencePieceTokenizer) -> str:
    """Return a tokenizer.json equivalent to `tokenizer`. Raises DataError if the ids of a random text differ."""
    if isinstance(tokenizer, ByteTokenizer):
        characters = {byte: character for character, byte in byte_characters().items()}
        pieces = [*SPECIAL_PIECES, *(characters[byte] for byte in range(256))]
        merges: list[tuple[str, str]] = []
        form = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        pre_tokenizer, decoder = form, form
    else:
        # Pieces contain spaces instead of U+2581, so that a real U+2581 falls back to its bytes, as in the original.
        pieces = [piece.replace(_SPACE_MARK, " ") for piece in tokenizer.pieces]
        merges = [merge for piece in pieces[len(SPECIAL_PIECES) :] for merge in _splits(piece, frozenset(pieces))]
        # No piece crosses a newline, so splitting there changes no id and keeps the merged texts short.
        pre_tokenizer = {"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated", "invert": False}
        decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, piece in enumerate(SPECIAL_PIECES)
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": isinstance(tokenizer, SentencePieceTokenizer),
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [list(merge) for merge in merges],
        },
    }
    text = json.dumps(description, ensure_ascii=False)
    _compare(tokenizer, HFTokenizer(text, SpecialTokens()), pieces)
    return text


def _splits(piece: str, known: frozenset[str]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that merge into `piece`, in the order in which pair-based BPE must try them.

    SentencePiece ranks merges by the merged piece and takes the leftmost of several. In x·y·z with x + y = y + z, both
    pairs give the piece; (x, y) is on the left and must come first.
    """
    at = [i for i in range(1, len(piece)) if piece[:i] in known and piece[i:] in known]
    after: dict[int, set[int]] = defaultdict(set)  # split: splits that must precede it
    for i in at:
        other = len(piece) - i
        if other != i and other in at and piece[i:] == piece[:other]:
            after[other].add(i)
    done: list[int] = []
    while len(done) < len(at):
        rest = [i for i in at if i not in done]
        free = [i for i in rest if not (after[i] - set(done))]
        # Repeats of one text ('  '·' ' and ' '·'  ') require both orders. Merge runs from the left, longest first.
        done.append(free[0] if free else rest[-1])
    return [(piece[:i], piece[i:]) for i in done]


def _compare(ours: Tokenizer, other: Tokenizer, pieces: list[str]) -> None:
    for text in _samples(pieces[len(SPECIAL_PIECES) :]):
        if ours.encode(text).tolist() != other.encode(text).tolist():
            raise DataError(
                f"this tokenizer cannot be written as a tokenizer.json: {text!r} would be split differently, because "
                "SentencePiece merges the leftmost of equal pieces. Publish the run's tokenizer folder instead"
            )


def _samples(pieces: list[str]) -> Iterator[str]:
    """Yield texts that test the merges: joined and repeated pieces, runs, and characters of all planes."""
    draw = random.Random(0)
    characters = sorted({character for piece in pieces for character in piece})
    for _ in range(_SAMPLES):
        parts = []
        for _ in range(draw.randrange(1, 12)):
            kind = draw.random()
            if kind < 0.4:
                parts.append(draw.choice(pieces))
            elif kind < 0.7:
                parts.append(draw.choice(characters) * draw.randrange(1, 9))
            elif kind < 0.9:
                parts.append(draw.choice([*" \n\t▁a", *characters]))
            else:
                code = draw.randrange(0x10F000)
                parts.append(chr(code + 0x800 if code >= 0xD800 else code))  # not the surrogates
        yield "".join(parts)


def _with_start_token(text: str, tokenizer: Tokenizer) -> str:
    """Return the tokenizer.json with a post-processor that adds the tokenizer's start token, if any, to texts."""
    opened = open_json(text)
    start = tokenizer.special.start
    if opened_by(opened) == start:
        return text
    description: dict[str, Any] = json.loads(text)
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    if start < 0:
        description["post_processor"] = None
        return json.dumps(description, ensure_ascii=False)
    name = opened.id_to_token(start)
    mark = {"SpecialToken": {"id": name, "type_id": 0}}
    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [mark, sequence],
        "pair": [mark, sequence, {"SpecialToken": {"id": name, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [start], "tokens": [name]}},
    }
    return json.dumps(description, ensure_ascii=False)
