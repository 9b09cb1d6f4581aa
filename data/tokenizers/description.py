"""What a saved tokenizer's folder says of itself: `tokenizer.json` with kind, identity and specials, and the chat
template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.tokenizers.protocol import Tokenizer

DESCRIPTION = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"


def write_description(directory: str | Path, kind: str, tokenizer: Tokenizer, **more: Any) -> None:
    """Writes the description and the chat template into a folder, which is made."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    description = {"kind": kind, "identity": tokenizer.identity, **more}
    Path(directory, DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
    template = Path(directory, CHAT_TEMPLATE)
    if tokenizer.chat_template is not None:
        template.write_text(tokenizer.chat_template, encoding="utf-8", newline="")
    else:
        template.unlink(missing_ok=True)  # of another tokenizer that was saved here
