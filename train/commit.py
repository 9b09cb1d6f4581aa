"""`commit.json`, the last file written for a checkpoint step: its content, and the checks that a step is intact.

    checkpoints/20/commit.json   {"crc32": ..., "body": {format, step, metadata, metric, leaves, files}}
                   ...           the arrays, as Orbax writes them

A step is intact if commit.json exists, belongs to this step, and every file that it lists has the recorded size (and,
up to SMALL_FILE, the recorded CRC-32). There are three outcomes: intact, proven damaged (DamagedError), and unreadable
(UnreadableError: a failing permission, network or disk proves nothing about the data).
"""

import contextlib
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from data.paths import file_size, list_files, list_names

COMMIT_FILE = "commit.json"
FORMAT = 1
# Bytes. Indices and metadata are smaller files, and their CRC-32 reveals damage before Orbax fails on it. Larger files
# hold arrays, which the checksums of the leaves guard without a second read.
SMALL_FILE = 1 << 20
ASIDE_FILE = "set_aside"  # marks an ignored step in a bucket, where a folder cannot be renamed


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or restored; the message says why."""


class DamagedError(Exception):
    """One step is proven damaged; the message names the leaf or the file."""


class UnreadableError(Exception):
    """One step could not be read, which proves nothing; the message names the file."""


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line of at most 400 characters."""
    return (" ".join(f"{error}".split()) or type(error).__name__)[:400]


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """Convert file-system errors in the block to DamagedError (if `name` is missing) or UnreadableError."""
    try:
        yield
    except (DamagedError, UnreadableError, CheckpointError, MemoryError):
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DamagedError(f"{name} is missing") from error
    except Exception as error:  # bucket clients raise their own exception classes
        raise UnreadableError(f"{name} cannot be read ({one_line(error)})") from error


# ---- steps ----


def step_of(name: str) -> int | None:
    """Return the step that a folder's name denotes, or None for any other name (007, non-ASCII digits)."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,9}", name, re.ASCII) and int(name) < 2**31 else None


def steps_on_disk(directory: epath.Path) -> list[int]:
    """Return every step that has a folder, intact or not, in ascending order. Raises OSError."""
    found = [step for name in list_names(directory) if (step := step_of(name)) is not None]
    return sorted(step for step in found if (directory / str(step)).is_dir() and not _is_aside(directory / str(step)))


def committed_steps(directory: epath.Path) -> list[int]:
    """Return the steps that have a commit.json, in ascending order. Raises OSError."""
    return [step for step in steps_on_disk(directory) if (directory / str(step) / COMMIT_FILE).exists()]


def _is_aside(step: epath.Path) -> bool:
    return (step / ASIDE_FILE).exists()


# ---- the file ----


def _file_facts(file: epath.Path) -> dict[str, int]:
    """Return the size of a file, and its CRC-32 if it is small."""
    size = file_size(file)
    return {"size": size, "crc32": zlib.crc32(file.read_bytes())} if size <= SMALL_FILE else {"size": size}


def write_commit(directory: epath.Path, body: dict[str, Any]) -> None:
    """Write commit.json with the sizes and checksums of all files now in the step's folder."""
    files = [name for name in list_files(directory) if name != COMMIT_FILE]
    body = body | {"files": {name: _file_facts(directory / name) for name in files}}
    text = json.dumps(body, sort_keys=True)
    (directory / COMMIT_FILE).write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}, indent=1))


def read_body(directory: epath.Path, step: int) -> dict[str, Any]:
    """Return the body of a step's commit.json after checking that file alone.

    Raises DamagedError or UnreadableError, and CheckpointError for a format that this code does not read.
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
    # ValueError: not JSON, or not UTF-8. RecursionError: brackets nested too deep.
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise DamagedError(f"{COMMIT_FILE} cannot be parsed ({one_line(error)})") from error
    if not intact:
        raise DamagedError(f"{COMMIT_FILE}: checksum mismatch")
    if isinstance(body, dict) and isinstance(body.get("format"), int) and body["format"] != FORMAT:
        raise CheckpointError(
            f"{directory} has checkpoint format {body['format']}; this code reads {FORMAT}. "
            f"Check out the code that wrote it"
        )
    if not _is_well_formed(body):
        raise DamagedError(f"{COMMIT_FILE} does not describe a checkpoint")
    if body["step"] != step:
        raise DamagedError(f"{COMMIT_FILE} belongs to step {body['step']}: the folder was copied or renamed")
    return body


def _is_well_formed(body: Any) -> bool:
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
    """Return the body of commit.json after checking it and every file that it lists."""
    body = read_body(directory, step)
    for name, facts in body["files"].items():
        with reading(name):
            found = _file_facts(directory / name)
        if found["size"] != facts["size"]:
            raise DamagedError(f"{name} holds {found['size']} bytes, but {facts['size']} were written")
        if found != facts:
            raise DamagedError(f"{name}: checksum mismatch")
    return body


def read_files(directory: epath.Path, step: int, part: slice) -> None:
    """Read a part of a step's files to their ends. Raises UnreadableError if a read fails, and DamagedError."""
    for name in sorted(read_commit(directory, step)["files"])[part]:
        with reading(name), (directory / name).open("rb") as file:
            while file.read(1 << 24):
                pass
