"""Prepare a DataConfig's tokenizer, packed windows and held-out sets in a cache folder, local or in a bucket.

The folder's name is a hash of everything that determines its content: documents, tokenizer, window and packing. The
folder is complete or absent (data/storage.py); a damaged one is reported, removed and made again. Of the processes that
share a cache, one leads: it surveys the text, trains the tokenizer and writes held-out sets. A corpus of one section
per source is encoded by the leader alone; the sections of a larger one are divided over those processes that see its
text (data/shards.py). The bytes written don't depend on the number of processes.

A survey reads the text once. If all of it fits in `keep_bytes` of memory, it is not read again. Otherwise it is read
once more if the tokenizer is trained on it, and once more for encoding. A cache hit stops after the survey, because the
documents' digests are the cache key. Memory is bounded by a section, by the largest document, and by about 100 bytes
per document while the survey sorts digests.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataConfig, DataError
from data.paths import Folder, is_local, list_names, parse_path, write_whole
from data.plan import Part, cached_tokenizer, identity, summary, survey_all
from data.prepared import (
    MANIFEST,
    Prepared,
    SourceCounts,
    heldout_documents,
    heldout_files,
    open_prepared,
    shard_stems,
)
from data.processes import ONE_PROCESS, Processes, Rounds, leaders_of
from data.shards import (
    SECTION_BYTES,
    Heldout,
    Section,
    bytes_per_text_byte,
    read_results,
    result_text,
    text_is_here,
    write_heldout,
    write_shards,
)
from data.storage import Checksums, discard, enough_space, remove_leftovers, require_space, whole_folder
from data.survey import KeptText
from data.tokenizer import load_tokenizer

__all__ = [
    "Prepared",
    "SourceCounts",
    "heldout_documents",
    "heldout_files",
    "open_prepared",
    "prepare",
]

_logger = logging.getLogger(__name__)
_RESULTS = "results"  # prefix of the files in which processes report their shards


def prepare(
    config: DataConfig,
    log: Callable[[str], None] = _logger.info,
    *,
    processes: Processes = ONE_PROCESS,
    keep_bytes: int = 2**28,
    section_bytes: int = SECTION_BYTES,
) -> Prepared:
    """Read, deduplicate, split, tokenize and pack the sources, or find them prepared in the cache.

    Every process of `processes` must call it. The processes that share a cache folder prepare the data together, each
    with at most `keep_bytes` of text in memory besides a section, which is `section_bytes` of text. Raises DataError in
    every process for an invalid config or corpus, a full disk or a bucket that cannot be reached, and OSError in a
    process that cannot write to the cache.
    """
    config.validate()
    cache = _cache_folder(config)
    rounds = Rounds(processes)
    if not isinstance(cache, Path):
        rounds.together(lambda: _require_reachable(cache))
    leaders = leaders_of(rounds, cache)
    leader = leaders[processes.index]
    leads = leader == processes.index
    if not leads:
        log(f"process {leader} prepares the data in {cache}; waiting for it")
    with contextlib.ExitStack() as stack:
        lead = _Leader(config, cache, log, keep_bytes, section_bytes, processes.count, stack) if leads else None
        plans = [json.loads(text or "{}") for text in rounds.together(lambda: lead.plan() if lead else "")]
        _require_equal({plan["name"] for plan in plans if plan})
        if any("work" in plan for plan in plans):  # otherwise every leader found its data in the cache
            _write_together(rounds, leaders, lead, plans[leader], partial(_Helper, config, cache, log))
    opened: list[Prepared] = []

    def open_it() -> str:
        # The leader has verified or written it.
        opened.append(open_prepared(cache / plans[leader]["name"], verify=False))
        return ""

    rounds.together(open_it)
    return opened[0]


def _require_equal(names: set[str]) -> None:
    if len(names) > 1:
        raise DataError(
            f"the hosts prepared different data ({', '.join(sorted(names))}). Use the same text and the same versions "
            "of Python and sentencepiece on every host"
        )


def _cache_folder(config: DataConfig) -> Folder:
    if is_local(config.cache_dir):
        return Path(config.cache_dir or ".cache/data").expanduser().absolute()
    return parse_path(config.cache_dir)


def _require_reachable(cache: Folder) -> str:
    """Raise DataError if the bucket of a cache cannot be reached."""
    try:
        list_names(cache)
    except Exception as error:  # gcsfs raises errors of several packages
        raise DataError(
            f"data.cache_dir = {str(cache)!r}: the bucket cannot be reached ({type(error).__name__}: {error}). "
            "Check its name, the credentials and the network, or set it to a local folder"
        ) from error
    return ""


def _write_together(
    rounds: Rounds, leaders: Sequence[int], lead: _Leader | None, plan: dict[str, Any], helper: Callable[..., _Helper]
) -> None:
    """Write the data in three rounds: who helps, everyone's shards, and the leaders' manifests."""
    index, working = rounds.processes.index, lead is not None and "work" in plan
    help_ = helper(plan) if lead is None and "sections" in plan else None
    offers = rounds.together(lambda: "helps" if help_ is not None and help_.can_help() else "")
    helpers = [i for i, leader in enumerate(leaders) if leader == leaders[index] and offers[i]]
    count = 1 + len(helpers)

    def write() -> str:
        if lead is not None and working:
            lead.write(count)
        elif help_ is not None and index in helpers:
            help_.write(1 + helpers.index(index), count)
        return ""

    def finish() -> str:
        if lead is not None and working:
            lead.finish(count)
        return ""

    rounds.together(write)
    rounds.together(finish)


def _share(rank: int, count: int, total: int) -> tuple[int, int]:
    """Return the sections [first, last) of one of `count` processes."""
    return -(-rank * total // count), -(-(rank + 1) * total // count)


class _Helper:
    """A process that encodes some sections for its leader."""

    def __init__(self, config: DataConfig, cache: Folder, log: Callable[[str], None], plan: dict[str, Any]):
        self._config, self._log, self._plan = config, log, plan
        self._work, self._folder = cache / plan["work"], cache / plan["plan"]

    def can_help(self) -> bool:
        """Return whether this process sees the leader's plan and the text."""
        try:
            missing = [number for number in self._plan["firsts"] if not text_is_here(self._load(number))]
        except (OSError, ValueError) as error:
            self._log(f"this process does not help to prepare the data, because it cannot read the plan: {error}")
            return False
        if missing:
            self._log("this process does not help to prepare the data, because it does not see the text")
        return not missing

    def write(self, rank: int, count: int) -> None:
        """Write this process's share of the shards, and report them in the plan's folder."""
        tokenizer = load_tokenizer(self._work / "tokenizer")
        mine = map(self._load, range(*_share(rank, count, self._plan["sections"])))
        shards = write_shards(self._work, self._config, tokenizer, mine, log=self._log)
        write_whole(self._folder / f"{_RESULTS}-{rank}.json", result_text(shards))

    def _load(self, number: int) -> Section:
        return Section.load(_section_file(self._folder, number), self._config.sources)


def _section_file(folder: Folder, number: int) -> Folder:
    return folder / f"{number:06}.npz"


class _Leader:
    """The process that surveys the text, plans the sections and completes the folder."""

    def __init__(
        self,
        config: DataConfig,
        cache: Folder,
        log: Callable[[str], None],
        keep_bytes: int,
        section_bytes: int,
        processes: int,
        stack: contextlib.ExitStack,
    ):
        self._config, self._cache, self._log, self._stack = config, cache, log, stack
        self._section_bytes, self._processes = section_bytes, processes
        self._kept = KeptText(keep_bytes)
        self._token = uuid.uuid4().hex[:12]
        self._started = time.monotonic()

    def plan(self) -> str:
        """Return JSON: the `name` of the folder and, if it is not in the cache, where `work` is done.

        If processes can share the work, it also has the number of `sections`, the `plan`'s folder with a file for each,
        and the numbers of the sources' first sections.
        """
        if leftovers := remove_leftovers(self._cache):
            self._log(f"removed leftovers of interrupted preparations in {self._cache}: {', '.join(leftovers)}")
        self._parts = survey_all(self._config, self._kept, self._section_bytes)
        for part in self._parts:
            self._log(summary(part))
        self._tokenizer = cached_tokenizer(self._config, self._parts, self._kept, self._cache, self._log)
        self._identity = identity(self._config, self._parts, self._tokenizer, self._section_bytes)
        target = self._cache / f"packed-{self._identity[:20]}"
        if self._is_cached(target):
            self._log(f"packed windows found in the cache in {time.monotonic() - self._started:.1f} s")
            return json.dumps({"name": target.name})
        self._require_space()
        self._work = self._stack.enter_context(whole_folder(target))
        with enough_space(self._work / "tokenizer"):
            self._tokenizer.save(self._work / "tokenizer")
        self._sections = list(self._divide())
        plan: dict[str, Any] = {"name": target.name, "work": str(self._work.relative_to(self._cache))}
        if self._processes > 1 and self._is_sharded():
            plan |= self._save_plan()
        return json.dumps(plan)

    def write(self, count: int) -> None:
        """Write the held-out sets and the leader's share of the shards, of `count` processes."""
        self._heldout = [
            write_heldout(self._work, part.read, part.read.entries[part.heldout], self._kept, self._tokenizer)
            for part in self._parts
        ]
        mine = self._sections[slice(*_share(0, count, len(self._sections)))]
        self._shards = write_shards(self._work, self._config, self._tokenizer, mine, self._kept, log=self._log)

    def finish(self, count: int) -> None:
        """Collect the shards of `count` processes, write the manifest and complete the folder."""
        for rank in range(1, count):
            self._shards |= read_results((self._plan_folder() / f"{_RESULTS}-{rank}.json").read_bytes())
        counts = [self._counts(part, heldout) for part, heldout in zip(self._parts, self._heldout, strict=True)]
        files: dict[str, tuple[int, list[int]]] = {}
        for found in [shard.files for shard in self._shards.values()] + [heldout.files for heldout in self._heldout]:
            files |= found
        with enough_space(self._work / "tokenizer"):
            for name in list_names(self._work / "tokenizer"):
                sums = Checksums.of(self._work / "tokenizer" / name)
                files[f"tokenizer/{name}"] = (sums.size, sums.sums)
            manifest = {
                "identity": self._identity,
                "sequence_length": self._config.sequence_length,
                "packing": self._config.packing,
                "sources": [asdict(source) for source in counts],
                "files": dict(sorted(files.items())),
            }
            (self._work / MANIFEST).write_bytes((json.dumps(manifest) + "\n").encode())
        self._remove_plan()
        self._stack.close()
        tokens, windows = sum(s.train_tokens for s in counts), sum(s.windows for s in counts)
        self._log(
            f"packed {tokens:,} training tokens into {windows:,} windows of {self._config.sequence_length} "
            f"({self._config.packing}); {time.monotonic() - self._started:.1f} s in total"
        )

    def _is_cached(self, target: Folder) -> bool:
        if not (target if isinstance(target, Path) else target / MANIFEST).exists():
            return False
        try:
            open_prepared(target)
        except DataError as error:
            self._log(f"cache damaged, making it again: {error}")
            discard(target, MANIFEST)
            return False
        return True

    def _is_sharded(self) -> bool:
        return any(len(part.bounds) > 1 for part in self._parts)

    def _require_space(self) -> None:
        """Refuse to begin a sharded corpus, whose shards are written one by one, if the disk is clearly too small."""
        if self._is_sharded() and isinstance(self._cache, Path):
            needed = 0.0
            for part in self._parts:
                ratio = bytes_per_text_byte(self._config, self._tokenizer, part.read, part.read.entries[:1024])
                needed += part.train_bytes * ratio + part.heldout_bytes
            require_space(self._cache, int(needed))

    def _divide(self) -> Iterator[Section]:
        for source, part in enumerate(self._parts):
            stems = shard_stems(part.read.source.name, len(part.bounds))
            for stem, (first, last) in zip(stems, part.bounds, strict=True):
                yield Section(source, stem, part.read.files, part.read.entries, part.train_rows[first:last])

    def _plan_folder(self) -> Folder:
        # On a local disk, inside the temporary folder, which is removed with everything in it.
        if isinstance(self._work, Path):
            return self._work.parent / "plan"
        return self._cache / f"plan-{self._work.name}-{self._token}"  # of this job: others may prepare the same data

    def _save_plan(self) -> dict[str, Any]:
        folder = self._plan_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with enough_space(folder / "sections"):
            for number, section in enumerate(self._sections):
                section.save(_section_file(folder, number))
        sources = [section.source for section in self._sections]
        return {
            "plan": str(folder.relative_to(self._cache)),
            "sections": len(self._sections),
            "firsts": [sources.index(source) for source in sorted(set(sources))],
        }

    def _remove_plan(self) -> None:
        folder = self._plan_folder()
        if isinstance(folder, Path):
            shutil.rmtree(folder, ignore_errors=True)
        elif list_names(folder):
            folder.rmtree()

    def _counts(self, part: Part, heldout: Heldout) -> SourceCounts:
        read = part.read
        shards = [self._shards[stem] for stem in shard_stems(read.source.name, len(part.bounds))]
        windows = [shard.windows for shard in shards]
        return SourceCounts(
            name=read.source.name,
            documents=len(read.entries),
            skipped=read.skipped.count,
            first_skipped=tuple(read.skipped.first),
            empty=read.empty,
            duplicates=read.duplicates,
            train_documents=len(part.train_rows),
            train_bytes=part.train_bytes,
            train_tokens=sum(shard.tokens for shard in shards),
            windows=sum(windows),
            heldout_documents=int(np.count_nonzero(part.heldout)),
            heldout_bytes=part.heldout_bytes,
            heldout_tokens=heldout.tokens,
            max_id=max([heldout.max_id, *(shard.max_id for shard in shards)]),
            shards=tuple(windows) if len(windows) > 1 else (),
        )
