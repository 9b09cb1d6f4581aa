"""A setting of the C allocator that speeds up training on CPUs."""

from __future__ import annotations

import ctypes
import os
from importlib.util import find_spec

ACCELERATOR_RUNTIMES = ("libtpu", "jax_cuda13_plugin", "jax_cuda12_plugin")
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # <malloc.h> of glibc


def keep_freed_memory() -> bool:
    """Make glibc keep large freed blocks instead of returning them to the kernel, if training will run on the CPU.

    Call it before jax's backend starts its threads. Return False, with nothing changed, if an accelerator may be used
    or the C library is not glibc. XLA's CPU backend allocates a step's temporaries, hundreds of megabytes, in every
    step. If they are returned to the kernel and mapped again, the step takes 190,000 page faults, a fifth of its time
    for a small model. The price is that the process's memory use stays at its peak.
    """
    cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(find_spec(name) for name in ACCELERATOR_RUNTIMES)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if not cpu or mallopt is None:
        return False
    # Only the main arena: the others cannot grow beyond 64 MB and would map large blocks. mallopt returns 1 on success.
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_ARENA_MAX, 1)])
