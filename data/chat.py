"""Chat templates: messages to the text that a published model was tuned on, by its Jinja2 template.

A template comes with a model, from strangers. It runs in Jinja2's immutable sandbox (no attribute that begins with an
underscore, no change of what it was given), sees plain data alone, and does so in a process of its own
(data/chat_worker.py), which ends when it takes too long or too much memory.
"""

from __future__ import annotations

import importlib.util
import json
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.config import DataError
from data.tokenizers.protocol import Tokenizer

MAX_SOURCE = 1 << 20  # characters of a template
MAX_TEXT = 1 << 24  # characters of a rendered chat
MAX_BYTES = 1 << 30  # of the process that renders
MAX_SECONDS = 10.0  # of one rendering
_TRUSTED = ("system", "developer", "assistant")  # roles whose text is of one's own making
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of a message's reasoning; templates read the first two

Message = Mapping[str, Any]


class ChatTemplate:
    """A template's source and what it calls the tokenizer's specials ({'bos_token': '<s>', ...}).

    The first `render` starts a process, which serves all later ones of this object and ends with it. Threads take
    turns.
    """

    def __init__(self, source: str, names: Mapping[str, str] | None = None, *, seconds: float = MAX_SECONDS):
        if importlib.util.find_spec("jinja2") is None:
            raise DataError(
                "chat templates need the package jinja2, which is not installed: pip install 'meshwork[hf]'"
            )
        if len(source) > MAX_SOURCE:
            raise DataError(
                f"the chat template has {len(source)} characters: at most {MAX_SOURCE} are read; it is no chat template"
            )
        self.source, self.names = source, dict(names or {})
        self._seconds, self._lock = seconds, threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of messages ({'role', 'content', ...}), as transformers' apply_chat_template gives it.

        `add_generation_prompt`: what makes the assistant speak follows. `tools`: JSON schemas. Further variables are
        the template's own (enable_thinking=False). Raises DataError naming the template's line, for what it refuses,
        cannot do, or takes too long for.
        """
        if not all(isinstance(message, Mapping) for message in messages):
            raise DataError("chat messages are objects such as {'role': 'user', 'content': 'Hello'}: one is not")
        given = {
            **self.names,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
        }
        try:
            request = json.dumps(given)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"chat messages, tools and variables are plain data, as JSON is: {error}") from error
        with self._lock:
            answer = self._ask(request)
        if "error" in answer:
            line = "" if answer["line"] is None else f", line {answer['line']}"
            raise DataError(
                f"chat template{line}: {answer['error']}; mend the messages, or the template that came with the model"
            )
        return answer["text"]

    def _ask(self, request: str) -> dict[str, Any]:
        process = self._process or _start(self.source, self._seconds)
        try:
            if self._process is None:
                self._end = weakref.finalize(self, _stop, process)
                self._process = process
            line = _answer(process, request)
            if line:
                return json.loads(line)
            self._process = None
            code = process.wait()
            self._end()
        except BaseException:  # an interrupt leaves an answer unread, which the next chat must not get
            self._process = None
            _stop(process)
            raise
        if code == -signal.SIGALRM:
            return {"error": f"it was stopped after {self._seconds:g} s", "line": None}
        return {
            "error": f"its process ended with code {code} (it may take at most {MAX_BYTES >> 20} MiB)",
            "line": None,
        }


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template that a tokenizer was published with. Raises DataError when it has none."""
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template: the model was not tuned for chats, or its chat_template.jinja is "
            "missing; give plain prompts, or save the template in the tokenizer's folder"
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.names)


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], **options: Any
) -> np.ndarray:
    """Ids int32 [L] of messages: `render` with these options, then the specials that the template wrote become
    specials.

    Names of specials stay text in what anyone but system, developer and assistant says, and in the options `tools` and
    `documents`, so that nobody's message ends another's turn.
    """
    mark = f"\ue000{secrets.token_hex(8)}\ue000"  # no message holds it: it parts the names until the specials are found
    names = sorted(tokenizer.special_names, key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, names)) or "(?!)")
    part = partial(found.sub, lambda name: name[0][:1] + mark + name[0][1:])
    try:
        given = [_changed(message, part) if _is_strange(message) else message for message in messages]
        options = {
            name: _changed(value, part) if name in ("tools", "documents") else value for name, value in options.items()
        }
    except RecursionError as error:
        raise DataError("chat messages, tools and documents are plain data: these are nested too deeply") from error
    text = template.render(given, **options)
    return tokenizer.encode_marked(text, apart=mark if mark in text else "")


def _start(source: str, seconds: float) -> subprocess.Popen[str]:
    """The process, when it is ready. It sees nothing of ours but where packages are found (sys.path)."""
    worker = Path(__file__).with_name("chat_worker.py")
    with tempfile.TemporaryFile() as told:
        process = subprocess.Popen(
            [sys.executable, "-I", str(worker), json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=told, encoding="ascii", env={},
        )  # fmt: skip
        try:
            first = {"source": source, "seconds": seconds, "characters": MAX_TEXT, "bytes": MAX_BYTES}
            if _answer(process, json.dumps(first)):
                return process
            code = process.wait()
            told.seek(0)
            lines = told.read().decode("utf-8", "replace").strip().splitlines()
        except BaseException:
            _stop(process)
            raise
    _stop(process)
    raise DataError(
        f"the process that renders chat templates did not start: "
        f"{lines[-1] if lines else f'it ended with code {code}'}; it is run by "
        f"{sys.executable} and needs jinja2: pip install 'meshwork[hf]'"
    )


def _answer(process: subprocess.Popen[str], request: str) -> str:
    """The line that answers a line; '' from a process that ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(request + "\n")
        process.stdin.flush()
        return process.stdout.readline()
    except BrokenPipeError:
        return ""


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except BrokenPipeError:
            pass


def _is_strange(message: Any) -> bool:
    """Whether others may have written a message; what is no message is refused by `render`."""
    return isinstance(message, Mapping) and message.get("role") not in _TRUSTED


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, keys too (a tool's parameters are keys)."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_changed(key, change): _changed(inner, change) for key, inner in value.items()}
    return [_changed(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _with_reasoning(message: Message) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read, as transformers does."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}
