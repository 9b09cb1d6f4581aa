"""Config of a run's text and batches: frozen dataclasses that `DataConfig.validate` checks."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from data.paths import PathError, parse_path, require_backend

# Padding, end of document, fill-in-the-middle, chat roles and the mask; their ids precede all pieces of text.
SPECIAL_PIECES = (
    "<pad>", "<end>", "<unk>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>",
    "<system>", "<user>", "<assistant>", "<end_of_turn>", "<mask>",
)  # fmt: skip
# Far above any useful value, to refuse typing errors, and low enough that no array of indices overflows.
MAX_SEQUENCE_LENGTH = 2**24
MAX_BATCH_SIZE = 2**24
MAX_PREFETCH = 1024
MAX_VOCAB_SIZE = 2**24
_MAX_NAME = 100
# SentencePiece needs every special token, the 256 bytes and the newline before it can learn a merge.
MIN_SENTENCEPIECE_VOCAB = len(SPECIAL_PIECES) + 256 + 1


class DataError(ValueError):
    """Invalid data or an invalid data config; the message names the field or file, its value and the fix."""


@dataclass(frozen=True)
class SourceConfig:
    """One named corpus: a folder or a file of text or JSONL, local or on gs://, or Python's standard library.

    Globs are relative to `path` and `**` crosses folders. Hidden files and folders are not read, and links to folders
    are not followed.
    """

    name: str = "stdlib"
    path: str = "stdlib"  # 'stdlib': the running interpreter's standard library, without its tests
    include: tuple[str, ...] = ("**/*.py",)  # for a folder; a single file is read regardless of its name
    exclude: tuple[str, ...] = ()
    kind: Literal["text", "jsonl"] = "text"  # jsonl: one document per line; files '*.gz' are decompressed
    text_field: str = "text"  # key of the text in a JSONL record
    weight: float = 1.0  # multiplies this source's share of the mixture


@dataclass(frozen=True)
class TokenizerConfig:
    """SentencePiece BPE trained on the training split, plain UTF-8 bytes, or a tokenizer saved in a folder."""

    kind: Literal["sentencepiece", "byte", "saved"] = "sentencepiece"
    path: str = ""  # saved: folder of a run's or a published tokenizer; an imported run sets it
    vocab_size: int = 4096  # number of ids, up to 2**24; sentencepiece: including special tokens and 256 bytes
    train_bytes: int = 64_000_000  # maximum bytes of text to train the tokenizer on

    @property
    def ids(self) -> int:
        """Return the number of ids, including special tokens and bytes."""
        return len(SPECIAL_PIECES) + 256 if self.kind == "byte" else self.vocab_size


@dataclass(frozen=True)
class DataConfig:
    """Sources, tokenizer, windows and batches of a run."""

    sources: tuple[SourceConfig, ...] = (SourceConfig(),)
    evaluation_sources: tuple[SourceConfig, ...] = ()  # held out as a whole, and removed from training sources
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    sequence_length: int = 512  # predicted tokens per window, 2 to 2**24; a window holds one more
    batch_size: int = 16  # windows per global batch over all hosts, 1 to 2**24
    packing: Literal["split", "best_fit"] = "split"
    temperature: float = 1.0  # share of a source ~ weight * tokens^(1/temperature): 1 by size, large towards uniform
    holdout_fraction: float = 0.05  # fraction of each source's documents, 0 to below 1
    seed: int = 0  # seed of the order of windows
    cache_dir: str = ""  # local or gs:// folder of prepared data; '': .cache/data under the working directory
    prefetch: int = 4  # batches that a thread prepares ahead, at most 1024; 0: no thread

    def validate(self) -> None:
        """Raise DataError for the first invalid field."""
        names = [source.name for source in self.sources + self.evaluation_sources]
        if not self.sources:
            raise DataError("data.sources is empty. Add at least one SourceConfig")
        if len(set(names)) < len(names):
            raise DataError(
                f"data.sources and data.evaluation_sources have the names {names}. Give each source a different name"
            )
        for source in self.sources + self.evaluation_sources:
            _validate_source(source)
        _validate_tokenizer(self.tokenizer)
        length = self.sequence_length
        if length < 2:
            raise DataError(f"data.sequence_length = {length}: a window needs at least 2 tokens. Set it to 2 or more")
        if length > MAX_SEQUENCE_LENGTH:
            raise DataError(
                f"data.sequence_length = {length}: a window holds at most {MAX_SEQUENCE_LENGTH} tokens. Set it lower"
            )
        if not 1 <= self.batch_size <= MAX_BATCH_SIZE:
            raise DataError(f"data.batch_size = {self.batch_size}: set it between 1 and {MAX_BATCH_SIZE}")
        if self.packing not in ("split", "best_fit"):
            raise DataError(f"data.packing = {self.packing!r}: choose 'split' or 'best_fit'")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise DataError(f"data.temperature = {self.temperature}: set it above 0 (1: by size; 100: nearly uniform)")
        if not 0 <= self.holdout_fraction < 1:
            raise DataError(f"data.holdout_fraction = {self.holdout_fraction}: set it to 0 or more and below 1")
        if not 0 <= self.seed < 2**32:
            raise DataError(f"data.seed = {self.seed}: set it between 0 and 2**32 - 1")
        if not 0 <= self.prefetch <= MAX_PREFETCH:
            raise DataError(
                f"data.prefetch = {self.prefetch}: batches prepared ahead stay in memory. Set it between 0 "
                f"(no thread) and {MAX_PREFETCH}"
            )
        if self.cache_dir:
            try:
                require_backend(parse_path(self.cache_dir, "data.cache_dir"), "data.cache_dir")
            except PathError as error:
                raise DataError(str(error)) from error


def _validate_source(source: SourceConfig) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", source.name):
        raise DataError(f"source.name = {source.name!r}: it is part of file names. Use letters, digits, '_' and '-'")
    if len(source.name) > _MAX_NAME:
        raise DataError(
            f"source.name = {source.name[:20]!r}...: it has {len(source.name)} characters and is part of file names. "
            f"Use at most {_MAX_NAME}"
        )
    where = f"source {source.name!r}"
    if not source.path:
        raise DataError(f"{where}: path is empty. Give a folder, a file or 'stdlib'")
    if not source.include:
        raise DataError(f"{where}: include is empty. Give a glob such as '**/*.txt'")
    if source.kind not in ("text", "jsonl"):
        raise DataError(f"{where}: kind = {source.kind!r}: choose 'text' or 'jsonl'")
    if not (source.weight > 0 and math.isfinite(source.weight)):
        raise DataError(f"{where}: weight = {source.weight}: must be above 0. Set it higher, or remove the source")


def _validate_tokenizer(tokenizer: TokenizerConfig) -> None:
    if tokenizer.kind not in ("sentencepiece", "byte", "saved"):
        raise DataError(f"data.tokenizer.kind = {tokenizer.kind!r}: choose 'sentencepiece', 'byte' or 'saved'")
    if tokenizer.kind == "saved" and not tokenizer.path:
        raise DataError("data.tokenizer.kind = 'saved': data.tokenizer.path is empty. Set it to the tokenizer's folder")
    if tokenizer.kind != "saved" and tokenizer.path:
        raise DataError(
            f"data.tokenizer.path = {tokenizer.path!r}: a {tokenizer.kind} tokenizer is not read from a folder. Leave "
            "it empty, or set data.tokenizer.kind to 'saved'"
        )
    if not 1 <= tokenizer.vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(f"data.tokenizer.vocab_size = {tokenizer.vocab_size}: set it between 1 and {MAX_VOCAB_SIZE}")
    if tokenizer.kind == "sentencepiece" and tokenizer.vocab_size <= MIN_SENTENCEPIECE_VOCAB:
        raise DataError(
            f"data.tokenizer.vocab_size = {tokenizer.vocab_size}: special tokens and the 256 bytes already take "
            f"{MIN_SENTENCEPIECE_VOCAB} ids. Set it higher, or set data.tokenizer.kind to 'byte'"
        )
    if tokenizer.train_bytes < 1:
        raise DataError(f"data.tokenizer.train_bytes = {tokenizer.train_bytes}: set it to 1 or more")
