"""Fit a tokenizer to the rows of a model's embedding."""

from __future__ import annotations

import json

from data.config import DataError
from data.tokenizers.huggingface import HFTokenizer
from data.tokenizers.protocol import SpecialTokens, Tokenizer, check_vocabulary


def fit_vocabulary(tokenizer: Tokenizer, rows: int) -> tuple[Tokenizer, int]:
    """Return (a tokenizer with at most `rows` ids, the number of unused embedding rows).

    Special tokens without a row are dropped from a tokenizer.json, such as Gemma 3's image token in its text-only
    models. The tokenizer then has another identity, and the dropped names are encoded as text. Raises DataError if an
    id without a row is not a special token, or opens texts, ends them or ends a generation.
    """
    if tokenizer.vocab_size > rows and isinstance(tokenizer, HFTokenizer):
        without_row = {i for i in tokenizer.pieces if i >= rows}
        needed = {tokenizer.special.start, tokenizer.special.end, *tokenizer.stop_token_ids}
        if without_row <= tokenizer.special_ids and not without_row & needed:
            tokenizer = _without_ids_from(tokenizer, rows)
    return tokenizer, check_vocabulary(tokenizer, rows)


def _without_ids_from(tokenizer: HFTokenizer, rows: int) -> HFTokenizer:
    """Return the tokenizer with only the ids below `rows`."""
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
                f"tokenizer.json: merges use {sorted(dropped)}, whose ids have no row in an embedding of {rows} rows"
            )
    else:
        model["vocab"] = model["vocab"][:rows]
    limited = HFTokenizer(
        json.dumps(description, ensure_ascii=False),
        SpecialTokens(*(-1 if i >= rows else i for i in tokenizer.special)),
        stop_token_ids=tokenizer.stop_token_ids,
        names={name: token for name, token in tokenizer.names.items() if token not in dropped},
        chat_template=tokenizer.chat_template,
    )
    # The package ignores the file's ids of added tokens that its model lacks, and numbers them by the model's size.
    if limited.pieces != {i: piece for i, piece in tokenizer.pieces.items() if i < rows}:
        raise DataError(
            f"tokenizer.json: without {sorted(dropped)}, whose ids have no row in an embedding of {rows} rows, other "
            "ids would change. Use the tokenizer that was published with the model, or enlarge the embedding"
        )
    return limited
