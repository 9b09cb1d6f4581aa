"""Decide what prepared data contains: the documents of each source, their sections, the tokenizer and the identity."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from data.config import SPECIAL_PIECES, DataConfig, DataError
from data.paths import Folder
from data.shards import SECTION_DOCUMENTS
from data.storage import discard, enough_space, whole_folder
from data.survey import KeptText, Rereader, Survey, lowest_digests, remove_duplicates, sections, split, survey
from data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer, train_tokenizer
from data.tokenizers.description import DESCRIPTION

# Versions of the folder's format: raise both when the meaning of files changes. A corpus whose sources have one shard
# each has the files of version 2, so that caches and runs of that version remain valid.
_FORMAT, _SHARDED_FORMAT = 2, 3
_HASHED_TOGETHER = 1 << 12


@dataclass
class Part:
    """A source's survey and the division of its documents."""

    read: Survey
    heldout: np.ndarray  # bool [D]
    bounds: list[tuple[int, int]]  # sections, as ranges of the training documents

    def __post_init__(self) -> None:
        self.train_rows = np.flatnonzero(~self.heldout)

    @property
    def train_bytes(self) -> int:
        return int(self.read.entries["size"].sum() - self.heldout_bytes)

    @property
    def heldout_bytes(self) -> int:
        return int(self.read.entries["size"][self.heldout].sum())


def survey_all(config: DataConfig, kept: KeptText, section_bytes: int) -> list[Part]:
    """Return the parts of the training sources, then those of the evaluation sources."""
    # Evaluation sources are read first, so that their documents count as duplicates in training sources.
    surveys = [survey(source, kept) for source in config.evaluation_sources + config.sources]
    remove_duplicates(surveys)
    evaluation, training = surveys[: len(config.evaluation_sources)], surveys[len(config.evaluation_sources) :]
    heldout = [split(read.entries, config.holdout_fraction, read.source.name) for read in training]
    heldout += [np.ones(len(read.entries), bool) for read in evaluation]
    return [
        Part(read, mask, sections(read.entries["size"][~mask], section_bytes, SECTION_DOCUMENTS))
        for read, mask in zip(training + evaluation, heldout, strict=True)
    ]


def summary(part: Part) -> str:
    """Return a line about a source for the log."""
    read, skipped = part.read, part.read.skipped
    reasons = f"; skipped: {'; '.join(skipped.first)}" if skipped.count else ""
    return (
        f"source {read.source.name}: {len(part.train_rows)} training and {np.count_nonzero(part.heldout)} held-out "
        f"documents ({part.heldout_bytes:,} bytes held out), {read.duplicates} duplicates, {read.empty} empty, "
        f"{skipped.count} skipped{reasons}"
    )


def cached_tokenizer(
    config: DataConfig, parts: list[Part], kept: KeptText, cache: Folder, log: Callable[[str], None]
) -> Tokenizer:
    """Return the tokenizer of a config. One that is trained is stored in the cache."""
    if config.tokenizer.kind == "byte":
        return train_tokenizer(config.tokenizer, ())
    if config.tokenizer.kind == "saved":
        return saved_tokenizer(config.tokenizer)
    masks = lowest_digests([part.read.entries[part.train_rows] for part in parts], config.tokenizer.train_bytes)
    chosen = [part.train_rows[mask] for part, mask in zip(parts, masks, strict=True)]
    digests = sorted(digest for part, rows in zip(parts, chosen, strict=True) for digest in _digests(part.read, rows))
    settings = {"config": asdict(config.tokenizer), "specials": SPECIAL_PIECES, "by": sentencepiece.__version__}
    key = hashlib.sha256(
        json.dumps({"format": _FORMAT, **settings, "documents": digests}, sort_keys=True).encode()
    ).hexdigest()
    directory = cache / f"tokenizer-{key[:20]}"
    if (directory if isinstance(directory, Path) else directory / DESCRIPTION).exists():
        try:
            return load_tokenizer(directory)
        except DataError as error:
            log(f"cache damaged, making it again: {error}")
            discard(directory, DESCRIPTION)
    started = time.monotonic()
    tokenizer = train_tokenizer(config.tokenizer, _texts(parts, chosen, kept))
    with whole_folder(directory) as temporary, enough_space(temporary / "tokenizer"):
        tokenizer.save(temporary)
    log(f"trained a tokenizer of {tokenizer.vocab_size} pieces in {time.monotonic() - started:.1f} s")
    return tokenizer


def _texts(parts: list[Part], chosen: list[np.ndarray], kept: KeptText) -> Iterator[str]:
    for part, rows in zip(parts, chosen, strict=True):
        with Rereader(part.read.source, part.read.files, kept) as reader:
            for content in reader.texts(part.read.entries[rows]):
                yield content.decode("utf-8")


def _digests(read: Survey, rows: np.ndarray) -> Iterator[str]:
    for start in range(0, len(rows), _HASHED_TOGETHER):
        for digest in read.entries["digest"][rows[start : start + _HASHED_TOGETHER]]:
            yield digest.tobytes().hex()


def identity(config: DataConfig, parts: list[Part], tokenizer: Tokenizer, section_bytes: int) -> str:
    """Return the SHA-256 of the JSON of everything that determines the content, which is never whole in memory."""
    sharded = any(len(part.bounds) > 1 for part in parts)
    settings = {
        "format": _SHARDED_FORMAT if sharded else _FORMAT,
        "packing": config.packing,
        **({"section_bytes": section_bytes, "section_documents": SECTION_DOCUMENTS} if sharded else {}),
        "sequence_length": config.sequence_length,
    }
    found = hashlib.sha256()
    found.update((json.dumps(settings, sort_keys=True)[:-1] + ', "sources": [').encode())
    for number, part in enumerate(parts):
        found.update(f"{', ' if number else ''}[{json.dumps(part.read.source.name)}, [".encode())
        _update_joined(found, (json.dumps(digest) for digest in _digests(part.read, part.train_rows)))
        found.update(b"], [")
        _update_joined(found, map(json.dumps, _entries(part.read, np.flatnonzero(part.heldout))))
        found.update(b"]]")
    found.update(f'], "tokenizer": {json.dumps(tokenizer.identity)}}}'.encode())
    return found.hexdigest()


def _entries(read: Survey, rows: np.ndarray) -> Iterator[tuple[str, str, int]]:
    for row, digest in zip(rows, _digests(read, rows), strict=True):
        yield read.name(read.entries[row]), digest, int(read.entries["size"][row])


def _update_joined(found: hashlib._Hash, items: Iterator[str]) -> None:
    first = True
    while batch := list(itertools.islice(items, _HASHED_TOGETHER)):
        found.update((("" if first else ", ") + ", ".join(batch)).encode())
        first = False
