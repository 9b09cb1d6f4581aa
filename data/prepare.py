"""Prepare a DataConfig's tokenizer, packed windows and held-out sets in a cache folder, which is then memory-mapped.

The folder's name is a hash of everything that determines its content: documents, tokenizer, window and packing. The
folder is complete or absent (data/storage.py); a damaged one is reported, removed and made again. If several processes
share the cache, one prepares and the others open the result (data/processes.py).

A survey reads the text once. Documents that fit in `keep_bytes` of memory are not read again. The others are read once
more if the tokenizer is trained on them, and once more for encoding. A cache hit stops after the survey, because the
documents' digests are the cache key.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from data.config import SPECIAL_PIECES, DataConfig, DataError
from data.corpus import Entry, KeptText, Survey, reread, split, survey
from data.packing import concatenate, packed_blocks, token_dtype
from data.processes import ONE_PROCESS, Processes, Rounds, leader_of
from data.storage import checksum, discard, enough_space, open_array, remove_leftovers, whole_folder
from data.tokenizer import Tokenizer, load_tokenizer, saved_tokenizer, train_tokenizer

_logger = logging.getLogger(__name__)
_FORMAT = 2  # version of the folder's format: raise it when the meaning of files changes
_ENCODE_DOCUMENTS = 256


@dataclass(frozen=True)
class SourceCounts:
    """Document and token counts of one source."""

    name: str
    documents: int  # distinct and readable
    skipped: int
    first_skipped: tuple[str, ...]  # "name: reason", at most five
    empty: int
    duplicates: int
    train_documents: int
    train_bytes: int
    train_tokens: int  # including the opening and end tokens of each document
    windows: int
    heldout_documents: int
    heldout_bytes: int
    heldout_tokens: int
    max_id: int


@dataclass(frozen=True)
class Prepared:
    """A prepared corpus on disk. `identity` is the SHA-256 in hex of everything that determines its content."""

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
        """Return the names of the sources with training windows."""
        return tuple(source.name for source in self.sources if source.windows)

    @property
    def heldout_names(self) -> tuple[str, ...]:
        """Return the names of the sources with held-out documents."""
        return tuple(source.name for source in self.sources if source.heldout_documents)

    def counts(self, name: str) -> SourceCounts:
        """Return the counts of one source. Raises DataError for an unknown name."""
        for source in self.sources:
            if source.name == name:
                return source
        raise DataError(f"no source named {name!r}. Sources: {[source.name for source in self.sources]}")

    def array(self, name: str) -> np.ndarray:
        """Return a memory-mapped array in the folder, such as 'train.stdlib.tokens'."""
        return np.load(self.directory / f"{name}.npy", mmap_mode="r")


def prepare(
    config: DataConfig,
    log: Callable[[str], None] = _logger.info,
    *,
    processes: Processes = ONE_PROCESS,
    keep_bytes: int = 2**28,
) -> Prepared:
    """Read, deduplicate, split, tokenize and pack the sources, or find them prepared in the cache.

    Every process of `processes` must call it. The lowest one that shares a cache folder prepares the data, with at most
    `keep_bytes` of text in memory. Raises DataError in every process for an invalid config or corpus or a full disk,
    and OSError in a process that cannot write to the cache.
    """
    config.validate()
    cache = Path(config.cache_dir or ".cache/data").expanduser().absolute()
    rounds = Rounds(processes)
    leader = leader_of(rounds, cache)
    if leader != processes.index:
        log(f"process {leader} prepares the data in {cache}; waiting for it")

    def lead() -> str:
        return _prepare(config, cache, log, keep_bytes).name if leader == processes.index else ""

    names = rounds.together(lead)
    if len(different := sorted(set(names) - {""})) > 1:
        raise DataError(
            f"the hosts prepared different data ({', '.join(different)}). Use the same text and the same versions of "
            "Python and sentencepiece on every host"
        )
    opened: list[Prepared] = []

    def open_it() -> str:
        opened.append(open_prepared(cache / names[leader], verify=False))  # the leader has verified or written it
        return ""

    rounds.together(open_it)
    return opened[0]


def _prepare(config: DataConfig, cache: Path, log: Callable[[str], None], keep_bytes: int) -> Path:
    """Return the prepared folder in the cache, and make it if it is missing or damaged."""
    started = time.monotonic()
    if leftovers := remove_leftovers(cache):
        log(f"removed leftovers of interrupted preparations in {cache}: {', '.join(leftovers)}")
    kept = KeptText(keep_bytes)
    parts = _survey_all(config, kept)
    for read, train, heldout in parts:
        skipped = f"; skipped: {'; '.join(read.skipped[:5])}" if read.skipped else ""
        log(
            f"source {read.source.name}: {len(train)} training and {len(heldout)} held-out documents "
            f"({sum(entry.size for entry in heldout):,} bytes held out), {read.duplicates} duplicates, {read.empty} "
            f"empty, {len(read.skipped)} skipped{skipped}"
        )
    tokenizer = _cached_tokenizer(config, parts, kept, cache, log)
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
            open_prepared(directory)
            log(f"packed windows found in the cache in {time.monotonic() - started:.1f} s")
            return directory
        except DataError as error:
            log(f"cache damaged, making it again: {error}")
            discard(directory)
    with whole_folder(directory) as temporary:
        counts = _write(temporary, config, parts, kept, tokenizer, identity)
    tokens, windows = sum(s.train_tokens for s in counts), sum(s.windows for s in counts)
    log(
        f"packed {tokens:,} training tokens into {windows:,} windows of {config.sequence_length} ({config.packing}); "
        f"{time.monotonic() - started:.1f} s in total"
    )
    return directory


def open_prepared(directory: str | Path, *, verify: bool = True) -> Prepared:
    """Open a prepared folder. Raises DataError with the file that is missing, truncated or altered.

    `verify` reads every file and compares its checksum; otherwise only sizes are compared.
    """
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
        raise DataError(f"{directory / 'manifest.json'} cannot be read ({error}). Remove the folder") from error
    for name, (size, expected) in sizes.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise DataError(f"{path} is missing. Remove the folder")
        if found != size:
            raise DataError(f"{path} has {found} bytes instead of {size}. Remove the folder")
        if verify and checksum(path) != expected:
            raise DataError(f"{path} has the wrong checksum: its {size} bytes were altered. Remove the folder")
    return Prepared(directory=directory, tokenizer=load_tokenizer(directory / "tokenizer"), sources=sources, **fields)


def heldout_files(prepared: Prepared, name: str) -> list[tuple[str, str]]:
    """Return the held-out documents of a source as (name, text), in evaluation order."""
    if not prepared.counts(name).heldout_documents:
        raise DataError(
            f"source {name!r} has no held-out documents. Raise data.holdout_fraction, or use {prepared.heldout_names}"
        )
    with (prepared.directory / f"heldout.{name}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        return [(record["name"], record["text"]) for record in map(json.loads, lines)]


_Part = tuple[Survey, list[Entry], list[Entry]]  # a source, its training and its held-out documents


def _survey_all(config: DataConfig, kept: KeptText) -> list[_Part]:
    seen: set[str] = set()
    # Evaluation sources are read first, so that their documents count as duplicates in training sources.
    evaluation = [survey(source, seen, kept) for source in config.evaluation_sources]
    parts = []
    for source in config.sources:
        read = survey(source, seen, kept)
        parts.append((read, *split(read.entries, config.holdout_fraction, source.name)))
    return parts + [(read, [], list(read.entries)) for read in evaluation]


def _cached_tokenizer(
    config: DataConfig, parts: list[_Part], kept: KeptText, cache: Path, log: Callable[[str], None]
) -> Tokenizer:
    if config.tokenizer.kind == "byte":
        return train_tokenizer(config.tokenizer, ())
    if config.tokenizer.kind == "saved":
        return saved_tokenizer(config.tokenizer)
    # Digests give a random order that does not depend on names and paths.
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
            discard(directory)
    started = time.monotonic()
    texts = (
        document.content.decode("utf-8")
        for read, train, _ in parts
        for document in reread(read.source, [entry for entry in train if entry.digest in chosen], kept)
    )
    tokenizer = train_tokenizer(config.tokenizer, texts)
    with whole_folder(directory) as temporary, enough_space(temporary / "tokenizer"):
        tokenizer.save(temporary)
    log(f"trained a tokenizer of {tokenizer.vocab_size} pieces in {time.monotonic() - started:.1f} s")
    return tokenizer


def _write(
    directory: Path, config: DataConfig, parts: list[_Part], kept: KeptText, tokenizer: Tokenizer, identity: str
) -> list[SourceCounts]:
    """Encode and pack the parts into an empty folder. Return the counts of each source."""
    counts = [_write_source(directory, config, part, kept, tokenizer) for part in parts]
    with enough_space(directory / "tokenizer"):
        tokenizer.save(directory / "tokenizer")
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        manifest = {
            "identity": identity,
            "sequence_length": config.sequence_length,
            "packing": config.packing,
            "sources": [asdict(source) for source in counts],
            "files": {path.relative_to(directory).as_posix(): [path.stat().st_size, checksum(path)] for path in files},
        }
        (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return counts


def _write_source(
    directory: Path, config: DataConfig, part: _Part, kept: KeptText, tokenizer: Tokenizer
) -> SourceCounts:
    read, train, heldout = part
    name, dtype, length = read.source.name, token_dtype(tokenizer.vocab_size), config.sequence_length + 1
    heldout_bytes = sum(entry.size for entry in heldout)
    copy_path = directory / f"heldout.{name}.jsonl"
    with (
        enough_space(copy_path, heldout_bytes),
        copy_path.open("w", encoding="utf-8", newline="\n") as copy,
    ):
        train_stream, heldout_stream = _encode(read, {e.digest for e in heldout}, kept, tokenizer, dtype, copy.write)
    windows = 0
    if train:
        windows, blocks = packed_blocks(*train_stream, length, config.packing)
        _write_windows(directory / f"train.{name}", windows, length, dtype, blocks)
    for what, array in zip(("tokens", "starts"), heldout_stream, strict=True):
        path = directory / f"heldout.{name}.{what}.npy"
        with enough_space(path, array.nbytes), open_array(path, array.shape, array.dtype) as write:
            write(array)
    max_id = max(int(stream.max(initial=0)) for stream, _ in (train_stream, heldout_stream))
    if max_id >= tokenizer.vocab_size:
        raise DataError(f"source {name!r}: token id {max_id} is outside the vocabulary of {tokenizer.vocab_size}")
    return SourceCounts(
        name=name,
        documents=len(read.entries),
        skipped=len(read.skipped),
        first_skipped=read.skipped[:5],
        empty=read.empty,
        duplicates=read.duplicates,
        train_documents=len(train),
        train_bytes=sum(entry.size for entry in train),
        train_tokens=len(train_stream[0]),
        windows=windows,
        heldout_documents=len(heldout),
        heldout_bytes=heldout_bytes,
        heldout_tokens=len(heldout_stream[0]),
        max_id=max_id,
    )


_Stream = tuple[np.ndarray, np.ndarray]  # tokens [M], starts [D + 1]


def _encode(
    read: Survey,
    heldout: AbstractSet[str],
    kept: KeptText,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    copy: Callable[[str], object],
) -> tuple[_Stream, _Stream]:
    """Return the (training, held-out) streams of a source; `copy` receives held-out documents as lines of JSON."""
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    documents = zip(read.entries, reread(read.source, read.entries, kept), strict=True)
    while batch := list(itertools.islice(documents, _ENCODE_DOCUMENTS)):
        texts = [document.content.decode("utf-8") for _, document in batch]
        for (entry, _), text, ids in zip(batch, texts, tokenizer.encode_many(texts), strict=True):
            is_heldout = entry.digest in heldout
            sides[is_heldout].append(ids.astype(dtype))
            if is_heldout:
                copy(json.dumps({"name": entry.name, "text": text}) + "\n")
    start, end = tokenizer.special.document_start, tokenizer.special.end
    train_stream, heldout_stream = (concatenate(side, start, end, dtype) for side in sides)
    return train_stream, heldout_stream


def _write_windows(
    stem: Path, windows: int, length: int, dtype: np.dtype, blocks: Iterator[tuple[np.ndarray, np.ndarray]]
) -> None:
    segment_dtype = token_dtype(length + 1)
    with (
        enough_space(Path(f"{stem}.*"), windows * length * (dtype.itemsize + segment_dtype.itemsize)),
        open_array(Path(f"{stem}.tokens.npy"), (windows, length), dtype) as write_tokens,
        open_array(Path(f"{stem}.segment_ids.npy"), (windows, length), segment_dtype) as write_segment_ids,
    ):
        for tokens, segment_ids in blocks:
            write_tokens(tokens)
            write_segment_ids(segment_ids)


def _digests(entries: Sequence[Entry]) -> list[str]:
    return [entry.digest for entry in entries]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
