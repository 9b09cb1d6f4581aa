"""Compile for TPUs you don't have, and read the compiler's static report on a kernel.

`pip install libtpu` installs the compiler, which needs no TPU. `compile_for` returns JAX's compiled object; if it
succeeds, the kernel lowers and fits in VMEM. `bundles` compiles in a separate process and returns, for each region of
each kernel, its length in VLIW bundles (the core issues one per cycle unless it waits for data), how full the bundles'
slots are, and the register spills. Bundles are a static estimate: they leave out transfers from HBM that the pipeline
does not hide.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

# The smallest topology of each generation.
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
NAMING = (
    f"name a generation and its chips along each axis, such as {', '.join(TOPOLOGIES.values())} (larger: v5e:16x16, "
    f"v5p:8x8x8)"
)
MAX_CHIPS = 32_768  # several times the largest pod
# libtpu reads these when JAX loads it, at the first request for a topology. The last lets several processes load it.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
SLOTS = ("MATMUL", "MATPUSH", "XLU", "VALU", "VPOP", "EUP", "VLOAD", "VLOAD:FILL", "VSTORE", "VSTORE:SPILL", "SALU")


def devices_of(topology: str) -> list[jax.Device]:
    """Return the devices of a TPU topology such as 'v5p:4x4x4', for meshes and shardings to compile for. The machine
    needs no TPU.

    Raises ValueError if the compiler does not know the name, RuntimeError if libtpu is not installed."""
    _check_sizes(topology)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        importlib.import_module("libtpu")
    except ImportError as error:
        raise RuntimeError("compiling for a TPU needs its compiler: pip install libtpu") from error
    _load()
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"topology {topology!r}: unknown to the TPU compiler ({str(error).splitlines()[0]}); {NAMING}"
        ) from error


def _check_sizes(topology: str) -> None:
    """Raise ValueError for a size of 0, which crashes the compiler, and for sizes beyond any pod."""
    found = re.fullmatch(r"[A-Za-z0-9]+:([0-9]+(?:x[0-9]+){1,2})(?:_[a-z]+)?", topology)
    if found is None:
        raise ValueError(f"topology {topology!r}: not a name such as {TOPOLOGIES['v5p']}; {NAMING}")
    sizes = [int(size[:9]) for size in found[1].split("x")]
    if not 1 <= math.prod(sizes) <= MAX_CHIPS:
        raise ValueError(
            f"topology {topology!r}: {' x '.join(map(str, sizes))} chips; each axis needs at least 1, and the product "
            f"must be at most {MAX_CHIPS}; {NAMING}"
        )


def mesh_of(target: str) -> jax.sharding.Mesh:
    """Return a mesh of one device of `target`, a key of TOPOLOGIES, for ahead-of-time compilation. Its only axis is
    'device'.

    Raises ValueError if the target is unknown, RuntimeError if libtpu is not installed."""
    if target not in TOPOLOGIES:
        raise ValueError(f"target = {target!r}: unknown; use one of {', '.join(TOPOLOGIES)}")
    devices = np.asarray(devices_of(TOPOLOGIES[target])[:1])
    return jax.sharding.Mesh(devices, ("device",), axis_types=(jax.sharding.AxisType.Auto,))


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Keep programs out of JAX's persistent compilation cache, which can store a program for an absent device but
    cannot read it back."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs  # type: ignore[attr-defined]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Error reading persistent compilation cache", UserWarning)
            yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@functools.cache
def _load() -> None:
    """Compile a tiny program with XLA_FLAGS unset. The TPU compiler reads XLA_FLAGS at its first program and aborts the
    process if a flag belongs to another backend."""
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES["v5e"])
        sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
        with uncached():
            jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), np.int32, sharding=sharding)).compile()
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def compile_for(target: str, function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    """Return `function` compiled for one device of `target`.

    `arguments` are pytrees of jax.ShapeDtypeStruct, or of anything with a shape and a dtype. During tracing,
    `pallas_kernels.target.target()` returns the target device. Raises jax.errors.JaxRuntimeError with the compiler's
    message if compilation fails, for example if the kernel needs more VMEM than the device has."""
    mesh = mesh_of(target)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), uncached():
        return jax.jit(function).lower(*placed).compile()


@dataclass(frozen=True)
class Region:
    """A contiguous range of a kernel's bundles: a loop, or the body of a `pl.when`. A child lies within its parent."""

    kernel: str
    number: int
    parent: int | None
    kind: str  # 'loop_body', 'pred_region', ...; '' for the whole kernel
    first: int  # index of its first bundle
    bundles: int  # number of bundles
    occupancy: dict[str, float]  # fraction of each kind of slot that is in use, 0 to 1
    fills: int  # loads of spilled vector registers
    spills: int  # stores of vector registers to VMEM
    vmem: int  # bytes of vector memory of the whole kernel: the end of its last allocation


def bundles(target: str, maker: str, *arguments: Any, timeout: float = 600.0) -> dict[str, list[Region]]:
    """Return the regions of each kernel of a program, by kernel name.

    `maker` is 'module:function'. A new process calls it with `arguments` (JSON values), and it returns (function,
    arguments) for `compile_for`. Raises RuntimeError if that process fails."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_pass_label_regex=.*(utiliz|post-bundle-packing-post-ra).*"
        given = os.environ.get("LIBTPU_INIT_ARGS", "")
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": f"{given} {flags}".strip(),
        }
        for name in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS"):  # the compiler does not dump a cached program
            environment.pop(name, None)
        command = [sys.executable, "-m", "pallas_kernels.ahead_of_time", target, maker, json.dumps(arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
        if done.returncode:
            raise RuntimeError(f"compiling {maker} for {target} failed:\n{done.stderr[-4000:]}")
        return read_dump(Path(folder))


def read_dump(folder: Path) -> dict[str, list[Region]]:
    """Return the regions of each kernel, by kernel name, from the compiler's dump in `folder`."""
    found: dict[str, list[Region]] = {}
    for path in sorted(folder.glob("*-post-bundle-packing-post-ra.txt")):
        stem = re.sub(r"-\d+-post-bundle-packing-post-ra\.txt$", "", path.name)
        used = next(iter(folder.glob(glob_escape(stem) + "-*-pre-delay_hlo-static-per-bundle-utilization.txt")), None)
        if used is None or "<" in stem or stem.endswith("-TLP"):
            continue
        kernel = re.sub(r"\.\d+$", "", stem.split("-", 1)[1])
        capacity, table = _utilization(used.read_text())
        found[kernel] = _regions(kernel, path.read_text(), capacity, table)
    return found


def body(regions: list[Region], least: float = 0.5) -> list[Region]:
    """Return the innermost regions that do matrix multiplications, longest first: the code that runs for each tile.

    Each has at least the fraction `least` of the multiplications of the region that has the most."""
    with_work = [r for r in regions if r.occupancy["MATMUL"] * r.bundles > 0 and r.kind in ("pred_region", "loop_body")]
    most = max((r.occupancy["MATMUL"] * r.bundles for r in with_work), default=0.0)
    leaves = [r for r in with_work if not any(o.parent == r.number and o in with_work for o in regions)]
    chosen = [r for r in leaves if r.occupancy["MATMUL"] * r.bundles >= least * most] or leaves
    return sorted(chosen, key=lambda r: -r.bundles)


def glob_escape(name: str) -> str:
    """Return `name` as a glob pattern that matches only itself."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _utilization(text: str) -> tuple[np.ndarray, np.ndarray]:
    head, rows = text.split("== UTILIZATION:\n", 1)
    lines = head.splitlines()
    names = tuple(name.strip() for name in lines[1].split(","))
    if names != SLOTS:
        raise RuntimeError(
            f"this libtpu's utilization table has columns {names}, not {SLOTS}. Update SLOTS in ahead_of_time.py"
        )
    return np.array(lines[2].split(), int), np.array([row.split() for row in rows.splitlines() if row.strip()], int)


def _regions(kernel: str, text: str, capacity: np.ndarray, table: np.ndarray) -> list[Region]:
    regions = []
    places = re.finditer(r"space=vmem, size = (0x[0-9a-f]+|0), offset = (0x[0-9a-f]+|0)", text)
    vmem = max((int(size, 16) + int(offset, 16) for size, offset in (place.groups() for place in places)), default=0)
    heads = re.finditer(
        r"\$region(\d+): #\{[^}]*\}(?: parent=(\d+))?(?: // (\w+))?\n(?:(?!\s*\$region).*\n)*?\s*// region range: "
        r"\[(\d+), (\d+)\)",
        text,
    )
    for number, parent, kind, first, last in (head.groups() for head in heads):
        a, b = int(first), int(last)
        sums = table[a:b].sum(0)
        share = {name: float(s / (c * max(b - a, 1))) for name, s, c in zip(SLOTS, sums, capacity, strict=True)}
        fills, spills = (int(sums[SLOTS.index(name)]) for name in ("VLOAD:FILL", "VSTORE:SPILL"))
        regions.append(
            Region(
                kernel, int(number), int(parent) if parent else None, kind or "", a, b - a, share, fills, spills, vmem
            )
        )
    return regions


def _main() -> None:
    target, maker, arguments = sys.argv[1:]
    module, name = maker.split(":")
    function, shapes = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    compile_for(target, function, *shapes)


if __name__ == "__main__":
    _main()
