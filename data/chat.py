"""Chat templates: render messages to the text format of a published model with its Jinja2 template.

Templates come with models and are not trusted. They run in Jinja2's immutable sandbox (no attributes that begin with an
underscore, no changes to the arguments), receive only plain data, and run in a separate process (data/chat_worker.py),
which ends if it takes too long or too much memory.
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

MAX_SOURCE = 1 << 20  # characters in a template
MAX_TEXT = 1 << 24  # characters in a rendered chat
MAX_BYTES = 1 << 30  # memory of the rendering process
MAX_SECONDS = 10.0  # of one rendering
_TRUSTED = ("system", "developer", "assistant")  # roles whose text is of one's own making
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # keys of a message's reasoning; templates read the first two

Message = Mapping[str, Any]


class ChatTemplate:
    """A chat template and its names of the tokenizer's special tokens ({'bos_token': '<s>', ...}).

    The first `render` starts a process, which serves all later calls on this object and ends with it. Threads take
    turns.
    """

    def __init__(self, source: str, names: Mapping[str, str] | None = None, *, seconds: float = MAX_SECONDS):
        if importlib.util.find_spec("jinja2") is None:
            raise DataError(
                "chat templates require the package jinja2, which is not installed: pip install 'meshwork[interop]'"
            )
        if len(source) > MAX_SOURCE:
            raise DataError(
                f"the chat template has {len(source)} characters, more than the maximum of {MAX_SOURCE}. Check that "
                "the file is a chat template"
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
        """Return the text of messages ({'role', 'content', ...}), as transformers' apply_chat_template does.

        `add_generation_prompt`: append the start of the assistant's turn. `tools`: JSON schemas. `variables`: further
        variables of the template (enable_thinking=False). Raises DataError, with the template's line if known, if the
        template fails, refuses the messages or exceeds a limit.
        """
        if not all(isinstance(message, Mapping) for message in messages):
            raise DataError("every chat message must be an object such as {'role': 'user', 'content': 'Hello'}")
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
            raise DataError(f"chat messages, tools and variables must be plain JSON data: {error}") from error
        with self._lock:
            answer = self._ask(request)
        if "error" in answer:
            line = "" if answer["line"] is None else f", line {answer['line']}"
            raise DataError(f"chat template{line}: {answer['error']}. Fix the messages or the model's template")
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
        except BaseException:  # an interrupt leaves an unread answer, which the next chat must not receive
            self._process = None
            _stop(process)
            raise
        if code == -signal.SIGALRM:
            return {"error": f"it exceeded the limit of {self._seconds:g} s", "line": None}
        return {
            "error": f"its process ended with code {code} (memory limit {MAX_BYTES >> 20} MiB)",
            "line": None,
        }


def chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template of a published tokenizer. Raises DataError if it has none."""
    if tokenizer.chat_template is None:
        raise DataError(
            "the tokenizer has no chat template: the model was not tuned for chat, or chat_template.jinja is missing. "
            "Use plain prompts, or save the template in the tokenizer's folder"
        )
    return ChatTemplate(tokenizer.chat_template, tokenizer.names)


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message], **options: Any
) -> np.ndarray:
    """Return ids int32 [L] of messages, rendered with `options`, with the template's special tokens encoded as such.

    Names of special tokens stay text in the options `tools` and `documents` and in messages of all roles except system,
    developer and assistant, so that no message can end another one's turn.
    """
    separator = f"\ue000{secrets.token_hex(8)}\ue000"  # splits names in untrusted text; no message contains it
    names = sorted(tokenizer.special_names, key=len, reverse=True)
    found = re.compile("|".join(map(re.escape, names)) or "(?!)")
    part = partial(found.sub, lambda name: name[0][:1] + separator + name[0][1:])
    try:
        given = [_map_strings(message, part) if _is_untrusted(message) else message for message in messages]
        options = {
            name: _map_strings(value, part) if name in ("tools", "documents") else value
            for name, value in options.items()
        }
    except RecursionError as error:
        raise DataError("chat messages, tools and documents are nested too deeply") from error
    text = template.render(given, **options)
    return tokenizer.encode_marked(text, apart=separator if separator in text else "")


def _start(source: str, seconds: float) -> subprocess.Popen[str]:
    """Start the rendering process and return it when it is ready. It receives only this process's sys.path."""
    worker = Path(__file__).with_name("chat_worker.py")
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-I", str(worker), json.dumps(sys.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=errors, encoding="ascii", env={},
        )  # fmt: skip
        try:
            first = {"source": source, "seconds": seconds, "characters": MAX_TEXT, "bytes": MAX_BYTES}
            if _answer(process, json.dumps(first)):
                return process
            code = process.wait()
            errors.seek(0)
            lines = errors.read().decode("utf-8", "replace").strip().splitlines()
        except BaseException:
            _stop(process)
            raise
    _stop(process)
    raise DataError(
        f"the process that renders chat templates did not start: "
        f"{lines[-1] if lines else f'it ended with code {code}'}. It runs with "
        f"{sys.executable} and requires jinja2: pip install 'meshwork[interop]'"
    )


def _answer(process: subprocess.Popen[str], request: str) -> str:
    """Send a line and return the answer, or '' if the process has ended."""
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


def _is_untrusted(message: Any) -> bool:
    """Return whether a message's role is not trusted. `render` refuses anything that is not a message."""
    return isinstance(message, Mapping) and message.get("role") not in _TRUSTED


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Return the value with `change` applied to every string, including keys (such as a tool's parameters)."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(inner, change) for key, inner in value.items()}
    return [_map_strings(inner, change) for inner in value] if isinstance(value, list | tuple) else value


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Return the message with its reasoning under the keys that templates read, as transformers does."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return dict(message) if found is None else {"thinking": found, **message, "reasoning_content": found}
