"""Read tokenizers from folders: saved ones and those of published models."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from etils import epath

from data.config import DataError, TokenizerConfig
from data.paths import PathError, is_local, parse_path
from data.tokenizers import huggingface, published, ranks, sentencepieces
from data.tokenizers.description import CHAT_TEMPLATE, DESCRIPTION
from data.tokenizers.huggingface import HFTokenizer
from data.tokenizers.protocol import SpecialTokens, Tokenizer
from data.tokenizers.ranks import TiktokenTokenizer
from data.tokenizers.sentencepieces import PublishedSentencePiece
from data.tokenizers.trained import ByteTokenizer, SentencePieceTokenizer


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Read a saved tokenizer. Raises DataError if a file is missing, damaged or belongs to another tokenizer."""
    try:
        folder = parse_path(directory, "tokenizer")
    except PathError as error:
        raise DataError(str(error)) from error
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
        identity = description["identity"]
        tokenizer = _READERS[description["kind"]](folder, description)
    except DataError:
        raise
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else f"{error} cannot be read"  # in a bucket
        raise DataError(f"no tokenizer in {directory}: {reason}. Save one there") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"tokenizer in {directory} is damaged ({error}). Save it again") from error
    if tokenizer.identity != identity:
        raise DataError(
            f"tokenizer in {directory}: content hash {tokenizer.identity[:16]}, but {path.name} has {identity[:16]}: "
            "the files are damaged or belong to different tokenizers. Save it again"
        )
    return tokenizer


def read_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer of a saved folder, a published model's folder or a GGUF file.

    A published folder holds tokenizer.json, a tiktoken file or a SentencePiece model. Raises DataError.
    """
    if not is_local(path):
        return load_tokenizer(path)
    path = Path(path)
    if path.suffix == ".gguf" and path.is_file():
        return published.of_gguf(path)
    if not path.is_dir():
        raise DataError(f"no tokenizer at {path}. Give a folder that holds one, or a GGUF file")
    try:
        return load_tokenizer(path) if is_saved(path) else published.of_folder(path)
    except OSError as error:
        raise DataError(f"tokenizer in {path}: {error.filename}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"tokenizer in {path} is damaged: not UTF-8 ({error}). Download it again") from error


def is_saved(directory: Path) -> bool:
    """Return whether `save` wrote this folder."""
    path = directory / DESCRIPTION
    if not path.is_file() or path.stat().st_size > 1 << 20:  # a description is small
        return False
    try:
        return "kind" in json.loads(path.read_bytes())
    except (ValueError, TypeError, RecursionError):
        return False


def saved_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer of a config of kind 'saved'. Raises DataError if it is missing or has another size."""
    tokenizer = read_tokenizer(config.path)
    if tokenizer.vocab_size != config.vocab_size:
        raise DataError(
            f"data.tokenizer.vocab_size = {config.vocab_size}: the tokenizer in {config.path} has "
            f"{tokenizer.vocab_size} ids. Set it to that number"
        )
    return tokenizer


def special_tokens(config: TokenizerConfig) -> SpecialTokens:
    """Return the special tokens of a config's tokenizer. Only the kind 'saved' reads files."""
    return saved_tokenizer(config).special if config.kind == "saved" else SpecialTokens()


def _template(directory: epath.Path) -> str | None:
    path = directory / CHAT_TEMPLATE
    return path.read_bytes().decode("utf-8") if path.is_file() else None


def _byte(directory: epath.Path, description: dict[str, Any]) -> Tokenizer:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = _template(directory)
    return tokenizer


def _sentencepiece(directory: epath.Path, description: dict[str, Any]) -> Tokenizer:
    tokenizer = SentencePieceTokenizer((directory / "tokenizer.model").read_bytes())
    tokenizer.chat_template = _template(directory)
    return tokenizer


def _published(
    make: Callable[..., Tokenizer], file: str, directory: epath.Path, description: dict[str, Any]
) -> Tokenizer:
    content = (directory / file).read_bytes()
    more = {"kind": description["tiktoken"]} if make is TiktokenTokenizer else {}
    return make(
        content.decode("utf-8") if make is HFTokenizer else content,
        special=SpecialTokens(**description["special"]),
        stop_token_ids=description["stop_token_ids"],
        names=description["names"],
        chat_template=_template(directory),
        **more,
    )


_READERS: dict[str, Callable[[epath.Path, dict[str, Any]], Tokenizer]] = {
    "byte": _byte,
    "sentencepiece": _sentencepiece,
    "huggingface": partial(_published, HFTokenizer, huggingface.FILE),
    "tiktoken": partial(_published, TiktokenTokenizer, ranks.FILE),
    "published_sentencepiece": partial(_published, PublishedSentencePiece, sentencepieces.FILE),
}
