"""Tokenizers fitted to the rows of a model's embedding."""

from __future__ import annotations

import json

from data.config import DataError
from data.tokenizers.huggingface import HFTokenizer
from data.tokenizers.protocol import SpecialTokens, Tokenizer, check_vocabulary


def fit_vocabulary(tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, int]:
    """(the tokenizer, rows of an embedding that none of its ids uses): its `vocab_size` is at most `rows`.

    Specials without a row (Gemma 3's mark of an image, in its models of text alone) are dropped from a tokenizer.json:
    the tokenizer then has another identity, and text holds their names as text. Raises DataError when other ids have no
    row, or one that opens texts, ends them or ends a generation.
    """
    if tokenizer.vocab_size > rows and isinstance(tokenizer, HFTokenizer):
        without_row = {i for i in tokenizer.pieces if i >= rows}
        needed = {tokenizer.special.start, tokenizer.special.end, *tokenizer.stops}
        if without_row <= tokenizer.special_ids and not without_row & needed:
            tokenizer = _limited(tokenizer, rows)
    return tokenizer, check_vocabulary(tokenizer, rows)


def _limited(tokenizer: HFTokenizer, rows: int) -> HFTokenizer:
    """The tokenizer without its ids from `rows` on."""
    description = json.loads(tokenizer.text)
    dropped = {token["content"] for token in description["added_tokens"] if token["id"] >= rows}
    description["added_tokens"] = [token for token in description["added_tokens"] if token["id"] < rows]
    model = description["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {piece: i for piece, i in model["vocab"].items() if i < rows}
        if any(
            dropped & set(merge.split(" ") if isinstance(merge, str) else merge) for merge in model.get("merges", ())
        ):
            raise DataError(
                f"tokenizer.json: merges are made of {sorted(dropped)}, whose ids have no row in an embedding of "
                f"{rows} rows"
            )
    else:
        model["vocab"] = model["vocab"][:rows]
    limited = HFTokenizer(
        json.dumps(description, ensure_ascii=False),
        SpecialTokens(*(-1 if i >= rows else i for i in tokenizer.special)),
        stops=tokenizer.stops,
        names={name: token for name, token in tokenizer.names.items() if token not in dropped},
        chat_template=tokenizer.chat_template,
    )
    # The package numbers added tokens that its model lacks by the model's size, whatever id the file gives them.
    if limited.pieces != {i: piece for i, piece in tokenizer.pieces.items() if i < rows}:
        raise DataError(
            f"tokenizer.json: without {sorted(dropped)}, whose ids have no row in an embedding of {rows} rows, other "
            "ids would change; use the tokenizer that was published with the model, or enlarge the embedding"
        )
    return limited
