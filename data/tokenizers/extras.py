"""Packages that some tokenizers need, imported when they are first used: rooms that only decode import without them."""

from __future__ import annotations

import importlib
from typing import Any

from data.config import DataError


def needed(package: str) -> Any:
    """Return the package. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = package if package == "sentencepiece" else "'meshwork[hf]'"
        raise DataError(
            f"this tokenizer needs the package {package}, which is not installed: pip install {extra}"
        ) from error
