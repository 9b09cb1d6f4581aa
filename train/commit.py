"""`commit.json`, the last file of a checkpoint: its steps' names, its content, and whether a step is whole.

    checkpoints/20/commit.json   {"crc32": ..., "body": {format, step, metadata, metric, leaves, files}}
                   ...           the arrays, as Orbax writes them

A step is whole if commit.json is there, belongs to this step, and every file that it lists has its size (and, up to
SMALL_FILE, its CRC-32). Three outcomes are kept apart: whole, damaged (proven: DamagedError), and not readable
(UnreadableError: a permission, a network or a disk that fails now says nothing about the data).
"""

import contextlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from data.paths import file_size, forget_listings, list_names

COMMIT_FILE = "commit.json"
FORMAT = 1
# Indices and metadata are files below this size: damage there is found before Orbax stumbles over it. The large ones
# hold arrays, which the leaves' own checksums guard without reading them twice.
SMALL_FILE = 1 << 20
ASIDE_FILE = "set_aside"  # in a bucket, where a folder cannot be renamed: marks a step that no longer counts


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written where it was asked, or cannot be restored; the message says why."""


class DamagedError(Exception):
    """One step is proven not to be whole; the message names the leaf or the file."""


class UnreadableError(Exception):
    """One step could not be read, which proves nothing; the message names the file."""


def one_line(error: BaseException) -> str:
    """Return an error's message as one line of at most 400 characters."""
    return (" ".join(f"{error}".split()) or type(error).__name__)[:400]


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn what a file system raises in the block into DamagedError (`name` is missing) or UnreadableError."""
    try:
        yield
    except (DamagedError, UnreadableError, CheckpointError, MemoryError):
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{name} is missing") from error
    except Exception as error:  # clients of buckets raise classes of their own
        raise UnreadableError(f"{name} cannot be read ({one_line(error)})") from error


# ---- steps ----


def step_of(name: str) -> int | None:
    """Return the step that a folder's name stands for, None for any other name (digits of other scripts, 007)."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,9}", name, re.ASCII) and int(name) < 2**31 else None


def steps_on_disk(directory: epath.Path) -> list[int]:
    """Return every step that has a folder, whole or not, in ascending order. Raises OSError."""
    found = [step for name in list_names(directory) if (step := step_of(name)) is not None]
    return sorted(step for step in found if (directory / str(step)).is_dir() and not _is_aside(directory / str(step)))


def committed_steps(directory: epath.Path) -> list[int]:
    """Return the steps that have a commit.json, in ascending order. Raises OSError."""
    return [step for step in steps_on_disk(directory) if (directory / str(step) / COMMIT_FILE).exists()]


def _is_aside(step: epath.Path) -> bool:
    return (step / ASIDE_FILE).exists()


# ---- the file ----


def _file_facts(file: epath.Path) -> dict[str, int]:
    """Return the size of a file, and the CRC-32 of a small one."""
    size = file_size(file)
    return {"size": size, "crc32": zlib.crc32(file.read_bytes())} if size <= SMALL_FILE else {"size": size}


def write_commit(directory: epath.Path, body: dict[str, Any]) -> None:
    """Write commit.json with the facts of all files that are in the step's folder now."""
    forget_listings(directory)  # the arrays were written by another library
    files = sorted(root / name for root, _, names in directory.walk() for name in names if name != COMMIT_FILE)
    body = body | {"files": {str(file.relative_to(directory)): _file_facts(file) for file in files}}
    text = json.dumps(body, sort_keys=True)
    (directory / COMMIT_FILE).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}, indent=1))


def read_body(directory: epath.Path, step: int) -> dict[str, Any]:
    """Return the body of a step's commit.json, checked by itself.

    Raises DamagedError, UnreadableError, and CheckpointError for a format of other code.
    """
    try:
        with reading(COMMIT_FILE):
            content = (directory / COMMIT_FILE).read_bytes()
    except DamagedError as error:
        raise DamagedError(f"{error}: the save or the copy of this step was cut short") from error
    try:
        document = json.loads(content)
        body = document["body"]
        intact = zlib.crc32(json.dumps(body, sort_keys=True).encode()) == document["crc32"]
    # ValueError: not JSON, or not UTF-8. RecursionError: brackets without end.
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DamagedError(f"{COMMIT_FILE} is garbage ({one_line(error)})") from error
    if not intact:
        raise DamagedError(f"{COMMIT_FILE}: checksum mismatch")
    if isinstance(body, dict) and isinstance(body.get("format"), int) and body["format"] != FORMAT:
        raise CheckpointError(f"{directory} has checkpoint format {body['format']}; this code reads {FORMAT}")
    if not _has_shape(body):
        raise DamagedError(f"{COMMIT_FILE} does not describe a checkpoint")
    if body["step"] != step:
        raise DamagedError(f"{COMMIT_FILE} belongs to step {body['step']}: the folder is a copy, or was renamed")
    return body


def _has_shape(body: Any) -> bool:
    def is_map(value: Any, is_entry: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(isinstance(entry, dict) and is_entry(entry) for entry in value.values())

    def is_leaf(entry: dict[str, Any]) -> bool:
        kinds = {"shape": list, "dtype": str, "checksum": int}
        return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())

    if not (isinstance(body, dict) and type(body.get("step")) is int and body.get("format") == FORMAT):
        return False
    if not isinstance(body.get("metadata"), dict) or not isinstance(body.get("metric"), (int, float, type(None))):
        return False
    if not is_map(body.get("files"), lambda facts: type(facts.get("size")) is int):
        return False
    outside = any(name.startswith("/") or ".." in name.split("/") for name in body["files"])
    return not outside and is_map(body.get("leaves"), is_leaf)


def read_commit(directory: epath.Path, step: int) -> dict[str, Any]:
    """Return the body of commit.json after checking it and the facts of every file that it lists."""
    body = read_body(directory, step)
    for name, facts in body["files"].items():
        with reading(name):
            found = _file_facts(directory / name)
        if found["size"] != facts["size"]:
            raise DamagedError(f"{name} holds {found['size']} bytes, {facts['size']} were written")
        if found != facts:
            raise DamagedError(f"{name}: checksum mismatch")
    return body


def read_files(directory: epath.Path, step: int, part: slice) -> None:
    """Read a part of a step's files to their ends. Raises UnreadableError where one cannot be, DamagedError."""
    for name in sorted(read_commit(directory, step)["files"])[part]:
        with reading(name), (directory / name).open("rb") as file:
            while file.read(1 << 24):
                pass
