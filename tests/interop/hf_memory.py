"""Measure the memory use of loading a published model in a separate process.

`python -m tests.interop.hf_memory FOLDER DTYPE DEVICES` prints one JSON line. test_hf_memory.py writes the folder and
checks the figures.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident() -> dict[str, int]:
    """Return VmRSS, RssAnon, RssFile and VmHWM (the highest VmRSS since `forget_peak`) in bytes."""
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return {
        words[0][:-1]: int(words[1]) * 1024
        for words in lines
        if words[0] in ("VmRSS:", "RssAnon:", "RssFile:", "VmHWM:")
    }


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class Watch:
    """Peak of anonymous memory, sampled every millisecond."""

    def __enter__(self) -> "Watch":
        self.peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, resident()["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def main(folder: str, dtype: str, devices: int) -> None:
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    from interop.load import load
    from interop.published import open_published
    from sharding.mesh import MeshConfig, make_mesh
    from sharding.rules import ShardingRules

    mesh = make_mesh(MeshConfig(fsdp=devices // 2, tensor=2)) if devices > 1 else None
    rules = ShardingRules()
    # Compile a program first, so that the measurement excludes the memory of the compiler and its threads.
    jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros((64, 64)) @ jax.numpy.ones((64, 64)))())
    published = open_published(folder)
    before = resident()
    forget_peak()
    start = time.perf_counter()
    with Watch() as watch:
        model = jax.block_until_ready(
            load(published.source, published.tensor_map, published.config, rules, mesh, dtype=dtype)
        )
    seconds = time.perf_counter() - start
    after = resident()
    shards = sum(s.data.nbytes for leaf in jax.tree.leaves(model) for s in leaf.addressable_shards)
    largest = max(int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for t in published.source.tensors.values())
    print(json.dumps({
        "shards": shards, "largest": largest, "seconds": seconds, "peak": after["VmHWM"] - before["VmRSS"],
        "peak_anonymous": watch.peak - before["RssAnon"], "left": after["VmRSS"] - before["VmRSS"],
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
