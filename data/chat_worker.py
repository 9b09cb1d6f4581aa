"""Render one chat template in a separate process with limited access, time and memory. data/chat.py runs this file.

The argument is the caller's sys.path as JSON, used to import jinja2. Standard input and output carry lines of JSON:
first {"source", "seconds", "characters", "bytes"}, answered with {}, then variables, each answered with {"text"} or
{"error", "line"}. This file imports no other module of the project, so that the process starts fast and does not hold
the caller's secrets.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])  # isolated mode drops PYTHONPATH and the user site

import jinja2
import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


class Generation(jinja2.ext.Extension):
    """The {% generation %} blocks of transformers, which mark the assistant's text; rendered as plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """A namespace that refuses names with a leading underscore, such as Python's attributes."""

    def __init__(*args: Any, **kwargs: Any):
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a name in a namespace must not begin with an underscore: {name!r}")


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def compiled(source: str) -> jinja2.Template:
    """Compile the template in the same environment as transformers (utils/chat_template_utils.py)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "namespace": PlainNamespace,
    }
    return environment.from_string(source)


def rendered(template: jinja2.Template, variables: dict[str, Any], characters: int) -> str:
    """Return the rendered text. Raises TemplateError as soon as it has more than `characters` characters."""
    parts, size = [], 0
    for part in template.generate(**variables):
        size += len(part)
        if size > characters:
            raise jinja2.exceptions.TemplateError(f"it writes more than {characters} characters")
        parts.append(part)
    return "".join(parts)


def line_of(error: BaseException) -> int | None:
    """Return the line of the template that raised an error, or None."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    line, at = None, error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "<template>":
            line = at.tb_lineno
        at = at.tb_next
    return line


def limit_memory(size: int, platform: str = sys.platform) -> None:
    """Limit the address space of this process to `size` bytes. macOS may refuse the limit: there only the time and the
    length of the output bound a template."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ValueError, OSError):
        if platform != "darwin":
            raise


def main() -> None:
    start = json.loads(sys.stdin.readline())
    limit_memory(start["bytes"])
    print("{}", flush=True)
    template = None
    for line in sys.stdin:
        # Without a handler, SIGALRM ends the process even during one long operation.
        signal.setitimer(signal.ITIMER_REAL, start["seconds"])
        try:
            template = template or compiled(start["source"])
            answer: dict[str, Any] = {"text": rendered(template, json.loads(line), start["characters"])}
        except MemoryError:
            answer = {"error": f"it needs more than {start['bytes'] >> 20} MiB of memory", "line": None}
        except Exception as error:  # an untrusted template can raise anything; the caller reports it
            answer = {"error": f"{type(error).__name__}: {error}"[:2000], "line": line_of(error)}
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
