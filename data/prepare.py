"""From a DataConfig to a folder of tokenizer, packed windows and held-out sets, made once and memory-mapped after.

The folder's name is a hash of everything that decides its content: the documents, the tokenizer, the window and the
packing. It is written aside and renamed, so that a half-written one is never seen; a damaged one is named, removed and
made again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from data.config import SPECIAL_PIECES, DataConfig, DataError
from data.corpus import Entry, Survey, reread, split, survey
from data.packing import concatenate, packed_blocks, token_dtype
from data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer, train_tokenizer

_logger = logging.getLogger(__name__)
_FORMAT = 1  # of the folder: raise it when its files change meaning
_ENCODE_DOCUMENTS = 256


@dataclass(frozen=True)
class SourceCounts:
    """What became of one source."""

    name: str
    documents: int  # distinct and readable
    skipped: int
    first_skipped: tuple[str, ...]  # "name: reason", at most five
    empty: int
    duplicates: int
    train_documents: int
    train_bytes: int
    train_tokens: int  # with the two marks around each document
    windows: int
    heldout_documents: int
    heldout_bytes: int
    heldout_tokens: int
    max_id: int


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus on disk. `identity` is the SHA-256 in hex of all that decides its content."""

    directory: Path
    identity: str
    tokenizer: Tokenizer
    sequence_length: int
    packing: str
    sources: tuple[SourceCounts, ...]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def train_names(self) -> tuple[str, ...]:
        """Sources that have training windows."""
        return tuple(source.name for source in self.sources if source.windows)

    @property
    def heldout_names(self) -> tuple[str, ...]:
        """Sources that have held-out files."""
        return tuple(source.name for source in self.sources if source.heldout_documents)

    def counts(self, name: str) -> SourceCounts:
        """Counts of one source. Raises DataError for an unknown name."""
        for source in self.sources:
            if source.name == name:
                return source
        raise DataError(f"no source named {name!r}: there are {[source.name for source in self.sources]}")

    def array(self, name: str) -> np.ndarray:
        """A memory-mapped array of the folder, e.g. 'train.stdlib.tokens'."""
        return np.load(self.directory / f"{name}.npy", mmap_mode="r")


def prepare(config: DataConfig, log: Callable[[str], None] = _logger.info) -> Prepared:
    """Read, deduplicate, split, tokenize and pack the sources, or find them prepared in the cache.

    Raises DataError for a config or a corpus that cannot work, OSError when the cache cannot be written.
    """
    config.validate()
    started = time.monotonic()
    cache = Path(config.cache_dir or ".cache/data").absolute()
    cache.mkdir(parents=True, exist_ok=True)
    parts = _survey_all(config)
    for read, train, heldout in parts:
        skipped = f"; skipped: {'; '.join(read.skipped[:5])}" if read.skipped else ""
        log(
            f"source {read.source.name}: {len(train)} training and {len(heldout)} held-out documents "
            f"({sum(entry.size for entry in heldout):,} bytes held out), {read.duplicates} duplicates, {read.empty} "
            f"empty, "
            f"{len(read.skipped)} skipped{skipped}"
        )
    tokenizer = _cached_tokenizer(config, parts, cache, log)
    identity = _hash(
        {
            "format": _FORMAT,
            "tokenizer": tokenizer.identity,
            "sequence_length": config.sequence_length,
            "packing": config.packing,
            "sources": [[read.source.name, _digests(train), list(heldout)] for read, train, heldout in parts],
        }
    )
    directory = cache / f"packed-{identity[:20]}"
    if directory.exists():
        try:
            prepared = open_prepared(directory)
            log(f"packed windows found in the cache in {time.monotonic() - started:.1f} s")
            return prepared
        except DataError as error:
            log(f"cache damaged, making it again: {error}")
            shutil.rmtree(directory)
    with _atomic_directory(directory) as temporary:
        _write(temporary, config, parts, tokenizer, identity)
    prepared = open_prepared(directory)
    tokens, windows = sum(s.train_tokens for s in prepared.sources), sum(s.windows for s in prepared.sources)
    log(
        f"packed {tokens:,} training tokens into {windows:,} windows of {config.sequence_length} ({config.packing}); "
        f"{time.monotonic() - started:.1f} s in all"
    )
    return prepared


def open_prepared(directory: str | Path) -> Prepared:
    """Open a prepared folder. Raises DataError naming the file that is missing, truncated or altered, and where it
    ends."""
    directory = Path(directory)
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        sizes = manifest["files"]
        fields = {name: manifest[name] for name in ("identity", "sequence_length", "packing")}
        sources = tuple(
            SourceCounts(**{**counts, "first_skipped": tuple(counts["first_skipped"])})
            for counts in manifest["sources"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{directory / 'manifest.json'} cannot be read ({error}); remove the folder") from error
    for name, (size, checksum) in sizes.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise DataError(f"{path} is missing; remove the folder")
        if found != size:
            raise DataError(f"{path} ends at byte {found} of {size}; remove the folder")
        if _checksum(path) != checksum:
            raise DataError(f"{path} has the wrong checksum: its {size} bytes were altered; remove the folder")
    return Prepared(directory=directory, tokenizer=load_tokenizer(directory / "tokenizer"), sources=sources, **fields)


def heldout_files(prepared: Prepared, name: str) -> list[tuple[str, str]]:
    """The held-out documents of a source as (name, text), in the order they are evaluated."""
    if not prepared.counts(name).heldout_documents:
        raise DataError(
            f"source {name!r} holds nothing out: raise data.holdout_fraction, or use {prepared.heldout_names}"
        )
    with (prepared.directory / f"heldout.{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [(record["name"], record["text"]) for record in map(json.loads, lines)]


_Part = tuple[Survey, list[Entry], list[Entry]]  # a source, its training and its held-out documents


def _survey_all(config: DataConfig) -> list[_Part]:
    seen: set[str] = set()
    # Evaluation sources first, so that a document that is also in a training source counts there as the duplicate.
    evaluation = [survey(source, seen) for source in config.evaluation_sources]
    parts = []
    for source in config.sources:
        read = survey(source, seen)
        parts.append((read, *split(read.entries, config.holdout_fraction, source.name)))
    return parts + [(read, [], list(read.entries)) for read in evaluation]


def _cached_tokenizer(config: DataConfig, parts: list[_Part], cache: Path, log: Callable[[str], None]) -> Tokenizer:
    if config.tokenizer.kind == "byte":
        return train_tokenizer(config.tokenizer, ())
    if config.tokenizer.kind == "saved":
        return saved_tokenizer(config.tokenizer)
    # The order by digest is as good as random and does not depend on names or paths.
    ranked = sorted((entry.digest, entry.size) for _, train, _ in parts for entry in train)
    before = itertools.accumulate((size for _, size in ranked), initial=0)
    chosen = {
        digest for (digest, _), total in zip(ranked, before, strict=False) if total < config.tokenizer.train_bytes
    }
    settings = {"config": asdict(config.tokenizer), "specials": SPECIAL_PIECES, "by": sentencepiece.__version__}
    key = _hash({"format": _FORMAT, **settings, "documents": sorted(chosen)})
    directory = cache / f"tokenizer-{key[:20]}"
    if directory.exists():
        try:
            return load_tokenizer(directory)
        except DataError as error:
            log(f"cache damaged, making it again: {error}")
            shutil.rmtree(directory)
    started = time.monotonic()
    texts = (
        document.content.decode("utf-8")
        for read, train, _ in parts
        for document in reread(read.source, chosen.intersection(entry.digest for entry in train))
    )
    tokenizer = train_tokenizer(config.tokenizer, texts)
    with _atomic_directory(directory) as temporary:
        tokenizer.save(temporary)
    log(f"learned a vocabulary of {tokenizer.vocab_size} pieces in {time.monotonic() - started:.1f} s")
    return tokenizer


def _write(directory: Path, config: DataConfig, parts: list[_Part], tokenizer: Tokenizer, identity: str) -> None:
    dtype, length = token_dtype(tokenizer.vocab_size), config.sequence_length + 1
    counts = []
    for read, train, heldout in parts:
        name = read.source.name
        train_stream, train_starts = _encode(read, train, tokenizer, dtype)
        windows = 0
        if train:
            windows, blocks = packed_blocks(train_stream, train_starts, length, config.packing)
            _write_windows(directory / f"train.{name}", windows, length, dtype, blocks)
        with (directory / f"heldout.{name}.jsonl").open("w", encoding="utf-8", newline="\n") as copy:
            heldout_stream, heldout_starts = _encode(read, heldout, tokenizer, dtype, copy.write)
        np.save(directory / f"heldout.{name}.tokens.npy", heldout_stream)
        np.save(directory / f"heldout.{name}.starts.npy", heldout_starts)
        max_id = max(int(stream.max(initial=0)) for stream in (train_stream, heldout_stream))
        if max_id >= tokenizer.vocab_size:
            raise DataError(f"source {name!r}: token id {max_id} is outside the vocabulary of {tokenizer.vocab_size}")
        counts.append(
            SourceCounts(
                name=name,
                documents=len(read.entries),
                skipped=len(read.skipped),
                first_skipped=read.skipped[:5],
                empty=read.empty,
                duplicates=read.duplicates,
                train_documents=len(train),
                train_bytes=sum(entry.size for entry in train),
                train_tokens=len(train_stream),
                windows=windows,
                heldout_documents=len(heldout),
                heldout_bytes=sum(entry.size for entry in heldout),
                heldout_tokens=len(heldout_stream),
                max_id=max_id,
            )
        )
    tokenizer.save(directory / "tokenizer")
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    manifest = {
        "identity": identity,
        "sequence_length": config.sequence_length,
        "packing": config.packing,
        "sources": [asdict(source) for source in counts],
        "files": {path.relative_to(directory).as_posix(): [path.stat().st_size, _checksum(path)] for path in files},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _encode(
    read: Survey,
    entries: Sequence[Entry],
    tokenizer: Tokenizer,
    dtype: np.dtype,
    copy: Callable[[str], object] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The stream (tokens [M], starts [D + 1]) of some documents; `copy` is given each as a line of JSON."""
    documents = reread(read.source, {entry.digest for entry in entries}) if entries else iter(())

    def contents() -> Iterator[np.ndarray]:
        while batch := [(d.name, d.content.decode("utf-8")) for d in itertools.islice(documents, _ENCODE_DOCUMENTS)]:
            if copy is not None:
                for name, text in batch:
                    copy(json.dumps({"name": name, "text": text}) + "\n")
            yield from tokenizer.encode_many([text for _, text in batch])

    return concatenate(contents(), tokenizer.special.document_start, tokenizer.special.end, dtype)


def _write_windows(
    stem: Path, windows: int, length: int, dtype: np.dtype, blocks: Iterator[tuple[np.ndarray, np.ndarray]]
) -> None:
    shape, write = (windows, length), np.lib.format.open_memmap
    tokens = write(f"{stem}.tokens.npy", mode="w+", dtype=dtype, shape=shape)
    segment_ids = write(f"{stem}.segment_ids.npy", mode="w+", dtype=token_dtype(length + 1), shape=shape)
    at = 0
    for token_block, segment_block in blocks:
        tokens[at : at + len(token_block)] = token_block
        segment_ids[at : at + len(token_block)] = segment_block
        at += len(token_block)
    tokens.flush()
    segment_ids.flush()


@contextmanager
def _atomic_directory(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes `target` when the block succeeds, and vanishes when it fails."""
    with tempfile.TemporaryDirectory(prefix="writing-", dir=target.parent) as parent:
        temporary = Path(parent) / target.name
        temporary.mkdir()
        yield temporary
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():  # else another process made the same content first
                raise


def _digests(entries: Sequence[Entry]) -> list[str]:
    return [entry.digest for entry in entries]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            checksum = zlib.crc32(block, checksum)
    return checksum
