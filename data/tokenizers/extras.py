"""Import the packages that some tokenizers need on first use, so that decoding does not require them."""

from __future__ import annotations

import importlib
from typing import Any

from data.config import DataError


def needed(package: str) -> Any:
    """Return the package. Raises DataError with the install command if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = package if package == "sentencepiece" else "'meshwork[interop]'"
        raise DataError(
            f"this tokenizer requires the package {package}, which is not installed: pip install {extra}"
        ) from error
