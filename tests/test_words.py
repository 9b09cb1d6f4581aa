"""Texts avoid words that no native engineer would write there (the list grows with reviews)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AVOIDED = (
    r"\btold\b",
    r"\btells?\b(?! apart)(?! it from)(?!\()",
    r"\bas seen\b",
    r"\bat hand\b",
    r"\b(it|that|which|what|code|work|text|file|row|list|they|there|here) stands?\b(?! for)",
    r"\bso many\b",
    r"\bwhat there is\b",
    r"\bby itself\b",
    r"\b(goes|go|going) on\b",
    r"\banew\b",
    r"\bof (its|their) own\b",
    r"(?<!there )(?<!There )\b(is|are|was|were) no\b(?! (more|longer|less|later|larger|smaller))",
    r"\bwithout a word\b",
    r"\bbeside (transformers|PyTorch)",
    r"\bthe way out\b",
    r"\bpassed over\b",
    r"\ball the same\b",
    r"\bis left of\b",
    r"^\s*(#|\"\"\"|\*|-)? ?Of (a|an|the|these|those|each|all)\b[^.]*, ",
)
FOLDERS = ("model", "sharding", "pallas_kernels", "interop", "data", "compression", "train", "decode", "experiments",
           "tests", "docs")  # fmt: skip
SKIPPED = ("tests/test_words.py",)


def texts() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md")]
    found += sorted(ROOT.glob("*.md")) + [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / ".ci/run"]
    return [path for path in sorted(found) if path.relative_to(ROOT).as_posix() not in SKIPPED]


def findings() -> list[str]:
    pattern = re.compile("|".join(f"(?:{word})" for word in AVOIDED))
    found = []
    for path in texts():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group().strip()!r}: {line.strip()[:120]}")
    return found


def test_texts_avoid_the_list():
    found = findings()
    assert not found, "\n".join(found)


if __name__ == "__main__":
    print("\n".join(findings()))
