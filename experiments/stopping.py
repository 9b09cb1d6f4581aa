"""SIGTERM outside the training loop: data preparation, compilation, the final evaluation.

The loop itself stops between steps (train/signals.py); everything else is left at once, as Ctrl-C leaves it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived. Raised in the main thread, and like KeyboardInterrupt no ordinary error."""

    code = 128 + signal.SIGTERM


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into `Stopped` while the context lasts. For the main thread."""
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        # None is a handler that was not set from Python (jax.distributed's), which Python cannot set back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
