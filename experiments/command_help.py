"""The help of the command line: commands in groups, one line for each, and an example for each command."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PROGRAM = "python -m experiments"
WIDTHS = 60, 100  # columns of the help, at least and at most


@dataclass(frozen=True)
class Command:
    """A command: what it takes, what it does, how it is called, and its options."""

    group: str
    arguments: str  # as in the usage line
    summary: str  # one line
    examples: tuple[str, ...]  # of arguments, without the program
    add_arguments: Callable[[argparse.ArgumentParser], None]
    details: str = ""


def _width() -> int:
    low, high = WIDTHS
    return max(low, min(high, shutil.get_terminal_size().columns - 2))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help of one command: options in one column of at most 32 characters, each with its default."""

    def __init__(self, prog: str, **more: object):
        super().__init__(prog, max_help_position=32, width=_width())

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.option_strings and action.default != argparse.SUPPRESS and _says_something(action.default):
            text += " [default: %(default)s]"
        return text


def _says_something(default: object) -> bool:
    """Return whether a default is a value, rather than the absence of one."""
    return isinstance(default, int | float | str) and not isinstance(default, bool)


class _Overview(argparse.ArgumentParser):
    """The parser of the whole program, whose help shows the commands by group."""

    commands: dict[str, Command]
    epilogue = ""

    def format_help(self) -> str:
        width = max(map(len, self.commands)) + 3
        groups: dict[str, list[str]] = {}
        for name, command in self.commands.items():
            groups.setdefault(command.group, []).append(f"  {name:<{width}}{command.summary}")
        paragraphs = [f"{self.description}\n", f"Usage: {PROGRAM} COMMAND [OPTIONS]\n"]
        paragraphs += [f"{group}:\n" + "\n".join(lines) + "\n" for group, lines in groups.items()]
        return "\n".join([*paragraphs, self.epilogue])


def make_parser(commands: dict[str, Command], description: str, epilogue: str) -> argparse.ArgumentParser:
    """Return the parser of the program. `epilogue` ends its help."""
    parser = _Overview(
        prog=PROGRAM, description=description, usage=f"{PROGRAM} COMMAND [OPTIONS]", formatter_class=_Formatter
    )
    parser.commands, parser.epilogue = commands, epilogue
    made = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=argparse.ArgumentParser)
    for name, command in commands.items():
        each = made.add_parser(
            name,
            prog=f"{PROGRAM} {name}",
            usage=" ".join(part for part in (PROGRAM, name, command.arguments, "[OPTIONS]") if part),
            **parser_options(command),
        )
        each._positionals.title = "arguments"
        command.add_arguments(each)
        each.add_argument("-h", "--help", action="help", help="print this help")
    return parser


def parser_options(command: Command) -> dict[str, Any]:
    """Return the keyword arguments of the parser of a command."""
    return {
        "description": _described(command),
        "epilog": _examples(command.examples),
        "formatter_class": _Formatter,
        "add_help": False,
        "allow_abbrev": False,
    }


def _described(command: Command) -> str:
    paragraphs = [f"{command.summary}.", *command.details.split("\n\n")]
    return "\n\n".join(textwrap.fill(text, _width()) for text in paragraphs if text)


def _examples(examples: Sequence[str]) -> str:
    title = "example:" if len(examples) == 1 else "examples:"
    return "\n".join([title, *(f"  {PROGRAM} {example}" for example in examples)])
