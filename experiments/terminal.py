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

FOLDED_WIDTH = 16
GAP = 2  # characters between columns


@dataclass(frozen=True)
class Column:
    """A column of a table, and how it adapts to a narrow terminal."""

    title: str
    number: bool = False  # aligned to the right
    fold: bool = False  # into lines of FOLDED_WIDTH or more characters
    drop: int = 0  # above 0: left out on a narrow terminal, the lowest first
    style: str = ""


@dataclass(frozen=True)
class Line:
    """A row of a table. `short`: the first cell on a terminal, where a line above gives the context."""

    cells: tuple[str, ...]
    style: str = ""
    short: str = ""


def open_console() -> Console:
    """Return a console that prints text unchanged, with colours on a terminal alone."""
    return Console(highlight=False, emoji=False, markup=False)


def print_table(console: Console, columns: Sequence[Column], lines: Sequence[Line]) -> None:
    """Print the lines below the columns' titles."""
    if not console.is_terminal:
        rows = [tuple(column.title for column in columns), *(line.cells for line in lines)]
        for text in _plain(columns, rows):
            console.print(Text(text), soft_wrap=True)
        return
    shown = _shown(columns, lines, console.width)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for column in (columns[i] for i in shown):
        table.add_column(
            column.title, justify="right" if column.number else "left", no_wrap=not column.fold, overflow="fold",
            style=column.style,
        )  # fmt: skip
    for line in lines:
        cells = (line.short or line.cells[0], *line.cells[1:])
        table.add_row(*(Text(cells[i]) for i in shown), style=line.style)
    console.print(table)
    dropped = " and ".join(column.title for i, column in enumerate(columns) if i not in shown)
    if dropped:
        console.print(Text(f"(a wider terminal, or a pipe, also shows {dropped})", style="dim"))


def _shown(columns: Sequence[Column], lines: Sequence[Line], width: int) -> list[int]:
    """Return the indices of the columns that fit."""

    def needed(i: int) -> int:
        cells = (line.short if i == 0 and line.short else line.cells[i] for line in lines)
        natural = max([len(columns[i].title), *map(len, cells)])
        return min(natural, FOLDED_WIDTH) if columns[i].fold else natural

    shown = list(range(len(columns)))
    for i in sorted((i for i in shown if columns[i].drop), key=lambda i: columns[i].drop):
        if sum(map(needed, shown)) + GAP * (len(shown) - 1) > width:
            shown.remove(i)
    return shown


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
