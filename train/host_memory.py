"""How the C allocator treats freed memory: for training on CPUs."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec

ACCELERATOR_RUNTIMES = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin")
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # <malloc.h> of glibc


def keep_freed_memory() -> bool:
    """Where training will run on the CPU, tells glibc to keep large freed blocks instead of giving them back to the
    kernel.

    To be called before jax's backend starts its threads. False, with nothing changed, where an accelerator may be used
    or the C library is another. XLA's CPU backend allocates a step's temporaries, hundreds of megabytes, anew each
    step; given back and mapped again they are paged in again: 190,000 page faults, a fifth of a small model's step. In
    return the process's memory stays at its peak.
    """
    cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(find_spec(name) for name in ACCELERATOR_RUNTIMES)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not cpu or mallopt is None:
        return False
    # One arena, the main one: the others cannot grow beyond 64 MB and would map large blocks. mallopt gives 1 for
    # success.
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_ARENA_MAX, 1)])
