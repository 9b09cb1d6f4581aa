"""SIGTERM outside the training loop: data preparation, compilation, the final evaluation.

The loop itself stops between steps (train/signals.py); everything else is left at once, as Ctrl-C leaves it.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

AGAIN_SECONDS = 0.01


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived. Raised in the main thread, and like KeyboardInterrupt no ordinary error."""

    code = 128 + signal.SIGTERM


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into `Stopped` while the context lasts. For the main thread.

    Python drops an exception that a handler raises while a finalizer or a callback of the garbage collector runs (JAX
    has one): it is then raised again a moment later, and so is that of Ctrl-C.
    """
    terminate, alarm, hook = signal.signal(signal.SIGTERM, _stop), signal.getsignal(signal.SIGALRM), sys.unraisablehook

    def raise_again(dropped: sys.UnraisableHookArgs) -> None:
        kind = dropped.exc_type
        if not issubclass(kind, KeyboardInterrupt):
            hook(dropped)
            return

        def late(number: int, frame: FrameType | None) -> None:
            raise kind

        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)

    sys.unraisablehook = raise_again
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in ((signal.SIGTERM, terminate), (signal.SIGALRM, alarm)):
            # None is a handler that was not set from Python (jax.distributed's), which Python cannot set back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
