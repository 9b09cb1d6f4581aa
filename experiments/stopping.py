"""SIGTERM handling outside the training loop: in data preparation, compilation and the final evaluation.

The loop stops between steps (train/signals.py). Everything else ends at once, as with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

AGAIN_SECONDS = 0.01


class Stopped(KeyboardInterrupt):
    """SIGTERM arrived. It is raised in the main thread and, like KeyboardInterrupt, is not an Exception."""

    code = 128 + signal.SIGTERM


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM while the context lasts. Use it in the main thread.

    Python drops an exception that a signal handler raises during a finalizer or a callback of the garbage collector
    (JAX has one). A dropped `Stopped` or KeyboardInterrupt is therefore raised again a moment later.
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
            # None is a handler that was not set from Python (that of jax.distributed) and that Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
