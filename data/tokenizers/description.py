"""The description of a saved tokenizer: `tokenizer.json` with kind, identity and special tokens; chat template."""

from __future__ import annotations

import json
import os
from typing import Any

from data.paths import parse_path
from data.tokenizers.protocol import Tokenizer

DESCRIPTION = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


def write_description(directory: str | os.PathLike[str], kind: str, tokenizer: Tokenizer, **more: Any) -> None:
    """Write the description and the chat template to a folder, creating it if needed."""
    folder = parse_path(directory, "tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    description = {"kind": kind, "identity": tokenizer.identity, **more}
    (folder / DESCRIPTION).write_bytes(json.dumps(description).encode() + b"\n")
    template = folder / CHAT_TEMPLATE
    if tokenizer.chat_template is not None:
        template.write_bytes(tokenizer.chat_template.encode("utf-8"))
    else:
        template.unlink(missing_ok=True)  # left by another tokenizer that was saved here
