"""Reads the commands that the documentation shows, and runs the blocks and tables that are marked for it.

A command is a line of a ```bash block, a line after `$ ` in a ```console block or an indented block (the lines below it
are its output), or a line of an indented block or `inline code` that starts as a command does. The comment
`<!-- run -->` before a block or table marks it: its `python -m experiments` commands run, in order, in an empty folder.
`<!-- run: notes -->` also writes the files that `FILES["notes"]` makes.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
START = re.compile(r"(\$ )?([A-Z_]+=\S+ )*(taskset -c \S+ )?(python -m|make) \S")
MARK = re.compile(r"<!-- run(?:: (\w+))? -->")
QUICK_COMPILATION = "--xla_backend_optimization_level=0"  # speed is not tested
NUMBER = re.compile(r"\d[\d.,]*(e[+-]?\d+)?|[▁-█]+")


@dataclass(frozen=True)
class Command:
    page: str
    line: int
    text: str
    output: tuple[str, ...] = ()  # lines that the page shows below it
    group: int | None = None  # line of the mark; None: not marked
    files: str | None = None  # name in FILES

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"

    @property
    def refused(self) -> bool:
        """Whether the page shows that the command is refused."""
        return bool(self.output) and self.output[0].startswith("error:")

    def words(self) -> tuple[dict[str, str], list[str]]:
        """Return the variables set before the command, and its words without comments."""
        words = shlex.split(self.text, comments=True)
        variables = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, variables[name] = words.pop(0).partition("=")
        return variables, words[3:] if words[:2] == ["taskset", "-c"] else words


def commands(page: Path) -> list[Command]:
    """Return the commands of a page, in order."""
    found: list[Command] = []
    name, lines = page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8").splitlines()
    prose: list[str] = []  # lines outside of blocks; others are empty
    mark: tuple[int | None, str | None] = (None, None)
    for start, kind, block in _blocks(lines):
        if kind in ("bash", "console", "indented"):
            found += [Command(name, start + at, text, output, *mark) for at, text, output in _in_block(kind, block)]
        if kind == "prose":
            match = MARK.fullmatch(block[0].strip())
            if match:
                mark = (start, match[1])
            table = block[0].startswith("|")
            found += _inline(name, start, block, mark if table else (None, None))
            if not match and block[0].strip():
                mark = (None, None)
        else:
            mark = (None, None)
        prose += block if kind == "prose" else []
    return found


def _blocks(lines: list[str]) -> Iterator[tuple[int, str, list[str]]]:
    """Give (first line, kind, lines) of each part of a page; a kind is a fence's language, "indented" or "prose"."""
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        if line.lstrip().startswith("```"):
            at += 1
            while not lines[at].lstrip().startswith("```"):
                at += 1
            yield start + 2, line.strip().strip("`"), lines[start + 1 : at]
            at += 1
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield start + 1, "indented", [line.removeprefix("    ") for line in lines[start:at]]
        else:  # a paragraph, a table, an empty line
            at += 1
            while line.strip() and at < len(lines) and lines[at].strip() and "```" not in lines[at]:
                at += 1
            yield start + 1, "prose", lines[start:at]


def _in_block(kind: str, block: list[str]) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    at = 0
    while at < len(block):
        start, text = at, block[at]
        at += 1
        prompted = text.startswith("$ ")
        shown = text.strip() and not text.startswith("#") if kind == "bash" else prompted or START.match(text)
        if not shown or (kind == "console" and not prompted):
            continue
        while text.endswith("\\"):
            text = f"{text[:-1].rstrip()} {block[at].strip()}"
            at += 1
        output: list[str] = []
        while prompted and at < len(block) and not block[at].startswith("$ "):
            output.append(block[at])
            at += 1
        yield start, text.removeprefix("$ "), tuple(output)


def _inline(name: str, start: int, block: list[str], mark: tuple[int | None, str | None]) -> Iterator[Command]:
    text = "\n".join(block)
    for match in re.finditer(r"`([^`]+)`", text):
        code = " ".join(match[1].split())
        if START.match(code):
            yield Command(name, start + text.count("\n", 0, match.start()), code, (), *mark)


def inline_code(page: Path) -> set[str]:
    """Return what a page writes as `inline code`."""
    blocks = _blocks(page.read_text(encoding="utf-8").splitlines())
    text = "\n\n".join("\n".join(block) for _, kind, block in blocks if kind == "prose")
    return {" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)}


# ---- running ----


def write_notes(folder: Path) -> None:
    """Write 60 short notes."""
    (folder / "notes").mkdir()
    for i in range(60):
        text = f"# Note {i}\n\nThis is note number {i}, about the subject {i * 7 % 13}. Its square is {i * i}.\n"
        (folder / "notes" / f"{i:02}.md").write_text(text)


FILES: dict[str, Callable[[Path], None]] = {"notes": write_notes}


def marked(page: Path) -> list[Command]:
    """Return the marked commands of a page that run on a laptop in minutes."""
    found = [command for command in commands(page) if command.group is not None]
    return [c for c in found if c.words()[1][:3] == ["python", "-m", "experiments"] and not _slow(set(c.words()[1]))]


def _slow(words: set[str]) -> bool:
    return bool({"compile", "--distributed"} & words) and "--dry-run" not in words


def run(command: Command, folder: Path) -> str:
    """Run a command in `folder` and return what it prints. Raises AssertionError unless it ends as its page shows."""
    variables, words = command.words()
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | variables
    environment["XLA_FLAGS"] = f"{QUICK_COMPILATION} {variables.get('XLA_FLAGS', '')}".strip()
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == int(command.refused), f"{command}\nended with {done.returncode}:\n{done.stdout}"
    missing = missing_line(command.output, done.stdout.splitlines())
    assert missing is None, f"{command}\nshows a line that was not printed: {missing!r}\n{done.stdout}"
    return done.stdout


def missing_line(shown: tuple[str, ...], printed: list[str]) -> str | None:
    """Return the first line of `shown` that `printed` lacks after the lines before it; None: it has all. Numbers may
    differ, except in lines that start with "error:"."""
    rest = iter(printed)
    for line in shown:
        if line.strip() in ("", "[...]"):
            continue
        if not any(_stable(line) == _stable(other) for other in rest):
            return line
    return None


def _stable(line: str) -> str:
    return line.rstrip() if line.startswith("error:") else NUMBER.sub("#", line.rstrip())


if __name__ == "__main__":  # what the pages show, and which of it runs
    for page in PAGES:
        for command in commands(page):
            print("run  " if command in marked(page) else "check", command)
