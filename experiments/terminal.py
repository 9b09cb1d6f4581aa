"""Tables for a terminal and for a pipe.

A terminal gets colours, and columns that fit its width. A pipe or a file gets one line for each row, unwrapped and
without box drawing, so that grep, cut and awk work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Column:
    """A column's title, whether its cells are numbers (right-aligned), and whether a narrow terminal may fold them."""

    title: str
    number: bool = False
    fold: bool = False
    style: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table. `short`: the first cell on a terminal, where a line above gives the context."""

    cells: tuple[str, ...]
    style: str = ""
    short: str = ""


def open_console() -> Console:
    """Return a console as wide as the terminal; elsewhere as wide as its longest line, without colours."""
    console = Console(highlight=False, emoji=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, emoji=False, markup=False, width=100_000)


def print_table(console: Console, columns: Sequence[Column], lines: Sequence[Line]) -> None:
    """Print the lines below the columns' titles."""
    if not console.is_terminal:
        rows = [tuple(column.title for column in columns), *(line.cells for line in lines)]
        for text in _plain(columns, rows):
            console.print(Text(text), soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(
            column.title, justify="right" if column.number else "left", no_wrap=not column.fold, overflow="fold",
            style=column.style,
        )  # fmt: skip
    for line in lines:
        first, *others = line.cells
        table.add_row(*(Text(cell) for cell in (line.short or first, *others)), style=line.style)
    console.print(table)


def _plain(columns: Sequence[Column], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines of aligned cells, two spaces apart."""
    rows = [tuple(" ".join(cell.split("\n")) for cell in row) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column.number else cell.ljust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in rows
    ]
