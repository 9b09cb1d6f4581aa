"""Packages of the extra `hf`, imported when they are first needed."""

from __future__ import annotations

import importlib
from typing import Any

from data.config import DataError


def needed(package: str) -> Any:
    """The package. Raises DataError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(
            f"this tokenizer needs the package {package}, which is not installed: pip install 'meshwork[hf]'"
        ) from error
