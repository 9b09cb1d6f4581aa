"""Progress display of a run: a live panel on a terminal, and plain lines elsewhere."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 5.0  # between plain lines
WINDOW_SECONDS = 30.0  # over which the step rate is averaged
BARS = "▁▂▃▄▅▆▇█"


def duration(seconds: float) -> str:
    """Return seconds as 42s, 3m07s, 2h05m or 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"


def count(number: float) -> str:
    """Return a count in three digits with k, M, G or T."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def load_bars(expert_load: list[list[float]]) -> str:
    """Return one bar per expert for its load, averaged over layers. A full bar is at least twice the fair share.

    `expert_load` is [L][E], with fractions that sum to one in each layer.
    """
    experts = len(expert_load[0])
    mean = [sum(layer[e] for layer in expert_load) / len(expert_load) for e in range(experts)]
    return "".join(BARS[min(len(BARS) - 1, int(share * experts / 2 * len(BARS)))] for share in mean)


class Progress:
    """Displays the `update`s of a run from `start_step` to `total_steps`.

    On a terminal, a thread redraws a panel four times a second, and `update` only stores the row. Elsewhere (a pipe, a
    log, CI), it prints plain lines without escape codes: for the first update, then every few seconds, and for the last
    one. The header states `mfu_convention` once. `enabled=False` (processes other than 0) shows nothing.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        title: str = "",
        mfu_convention: str = "",
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        self._total, self._step, self._start = total_steps, start_step, start_step
        self._title, self._mfu = title, mfu_convention
        self._enabled = enabled
        self._plain = not self._stream.isatty() or self._console.is_dumb_terminal
        self._clock = clock
        self._began = clock()
        self._marks: collections.deque[tuple[float, int]] = collections.deque()
        self._row: dict[str, Any] = {}
        self._held_out: dict[str, float] = {}
        self._printed = -PLAIN_SECONDS
        self._pending = False
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._began = self._clock()
        if self._enabled:
            self.message(f"{self._title}  {self._start}/{self._total} steps" + (self._mfu and f"  MFU: {self._mfu}"))
            if not self._plain:
                self._live = Live(
                    console=self._console, get_renderable=self._render, refresh_per_second=4, redirect_stderr=False
                )
                self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._enabled and self._pending:
            self._print_line()

    @property
    def rate(self) -> float | None:
        """Steps per second over the last half minute, or None before the second update.

        The time before the first update, which includes compilation, does not count.
        """
        if len(self._marks) < 2:
            return None
        (t0, s0), (t1, s1) = self._marks[0], self._marks[-1]
        return (s1 - s0) / (t1 - t0) if t1 > t0 else None

    def update(self, step: int, row: dict[str, Any]) -> None:
        """Show a train row of `step` (steps done so far), or remember the bits per byte of an eval row."""
        if not self._enabled:
            return
        if row.get("kind") == "eval":
            self._held_out[row["set"]] = row["bits_per_byte"]
            if self._plain:
                self.message(f"step {step}  held-out {row['set']}: {row['bits_per_byte']:.4f} bits per byte")
            return
        now = self._clock()
        self._marks.append((now, step))
        while len(self._marks) > 2 and self._marks[0][0] < now - WINDOW_SECONDS:
            self._marks.popleft()
        self._step, self._row = step, row
        if self._plain:
            self._pending = True
            if now - self._printed >= PLAIN_SECONDS:
                self._print_line()

    def message(self, text: str) -> None:
        """Print `text` above the panel, or as a line."""
        if self._enabled and self._plain:
            # A reader that closed the pipe (`| head`) must not end training.
            with contextlib.suppress(BrokenPipeError):
                encoding = self._stream.encoding or "utf-8"
                print(text.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)
        elif self._enabled:
            self._console.print(Text(text))

    def _print_line(self) -> None:
        self._printed, self._pending = self._clock(), False
        cells = [f"step {self._step}/{self._total}", *(f"{name} {value}" for name, value in self._cells())]
        self.message("  ".join(cells))

    def _cells(self) -> list[tuple[str, str]]:
        """Return the (name, value) pairs to show for the last row."""
        row, cells = self._row, []
        for key, name, form in (
            ("loss", "loss", "{:.4f}"),
            ("bits_per_byte", "bits/byte", "{:.4f}"),
            ("learning_rate", "lr", "{:.2e}"),
            ("grad_norm", "grad norm", "{:.3g}"),
        ):
            if key in row:
                cells.append((name, "not finite" if row[key] is None else form.format(float(row[key]))))
        if row.get("tokens_per_second") is not None:
            cells.append(("tokens/s", count(row["tokens_per_second"])))
        if row.get("mfu") is not None:
            cells.append(("MFU", f"{row['mfu']:.1%}"))
        if row.get("expert_load"):
            bars = load_bars(row["expert_load"])
            worst = row.get("max_violation")
            cells.append(("expert load", bars if worst is None else f"{bars} (max violation {float(worst):.2f})"))
        cells.append(("elapsed", duration(self._clock() - self._began)))
        if self.rate:
            cells.append(("left", duration((self._total - self._step) / self.rate)))
        return cells

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        done = Text(f"{self._step}/{self._total}", style="bold")
        share = f"{self._step / max(1, self._total):.1%}"
        head.add_row(done, ProgressBar(total=max(1, self._total), completed=self._step), share)
        cells = self._cells() if self._row else [("compiling the first step…", duration(self._clock() - self._began))]
        cells += [(f"held-out {name}", f"{value:.4f}") for name, value in self._held_out.items()]
        lines = [Text()]
        for name, value in cells:
            if lines[-1].cell_len + len(name) + len(value) + 1 > self._console.width:
                lines.append(Text())
            strong = "green" if name.startswith("held-out") else "bold" if name in ("loss", "bits/byte") else ""
            lines[-1].append(f"{name} ", style="dim").append(f"{value}   ", style=strong)
        for line in lines:
            line.rstrip()
        return Group(head, *lines)
