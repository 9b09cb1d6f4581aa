"""Compare these kernels with megablox by the TPU compiler's instruction counts, without a TPU: `python -m
pallas_kernels.grouped_matmul.static_tpu`.

Counts the bundles (instruction words, at best one per cycle) of the body that a visit runs, times the visits of
balanced, unaligned groups, and the bytes moved from and to memory. This is a *static estimate*: it leaves out code
around the bodies and transfers that are not hidden. A call takes at least the larger of its bundles and its bytes over
the published bandwidth, in cycles ("least cycles").

- mixtral: 8 experts of 4096 x 14336 and 8192 rows on a device: gate and up, down, and the gradient of down's weights.
- experts: 16384 rows, K 2048, one matrix of width 16384 * 8 / E for each of E experts. The total size of the weights,
  and so the memory traffic, is constant, while the work falls as 1 / E. Bundles per multiplication show the cost of
  small experts.
- ragged_dot: the FLOPs that XLA counts for jax.lax.ragged_dot, over those of the rows.

Writes results/tpu_static.json. Runs one process per kernel, tile and generation.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import ahead_of_time
from pallas_kernels.flash_attention.tpu_tiles import GENERATIONS
from pallas_kernels.grouped_matmul import tpu_tiles
from pallas_kernels.grouped_matmul.spec import Spec, Tiles
from pallas_kernels.grouped_matmul.tpu_tiles import Call, Cut

TARGETS = ("v5e", "v5p", "v6e", "7x")
RESULTS = Path(__file__).parent / "results" / "tpu_static.json"
EXPERTS = (8, 16, 64, 128, 256)
MEGABLOX = ((512, 1024, 1024), (128, 128, 128))  # (m, k, n): its best of a few, and its default
DEVICES = {device.name: device for device in GENERATIONS.values()}


def problems() -> dict[str, tuple[str, Call]]:
    """Return name -> ('forward' or 'gradient', shapes)."""
    made = {
        "mixtral up": ("forward", Call(8192, 8, 4096, 2 * 14336)),
        "mixtral down": ("forward", Call(8192, 8, 14336, 4096)),
        "mixtral gradient": ("gradient", Call(8192, 8, 14336, 4096)),
    }
    for E in EXPERTS:
        made[f"experts {E}"] = ("forward", Call(16384, E, 2048, 16384 * 8 // E))
        made[f"experts {E} gradient"] = ("gradient", Call(16384, E, 2048, 16384 * 8 // E))
    return made


def balanced(M: int, E: int) -> np.ndarray:
    """Return group sizes as equal as possible, such that only the first group starts at a multiple of 8."""
    ends = np.linspace(0, M, E + 1).round().astype(int)
    ends[1:-1] += 5 - ends[1:-1] % 8
    return np.diff(ends)


def ours(direction: str, m: int, n: int, k: int, pieces: bool):
    """Return one kernel with these tiles and two groups, and its arguments. `pieces`: whether K has two tiles."""
    from pallas_kernels.grouped_matmul import tpu

    M, K, N = 2 * m, k * (1 + pieces), 2 * n
    lhs, sizes = jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    name = f"{direction}_cut"
    make = tpu_tiles.forward_of if direction == "forward" else tpu_tiles.gradient_of
    setattr(tpu_tiles, name, lambda device, call, tiles: make(device, call, m, n, k))  # in this process only
    if direction == "gradient":
        dout = jax.ShapeDtypeStruct((M, N), jnp.bfloat16)
        return (lambda lhs, dout, sizes: tpu.weights_gradient(Spec(), lhs, dout, sizes)), (lhs, dout, sizes)
    rhs = jax.ShapeDtypeStruct((2, K, 1, N), jnp.bfloat16)
    return (lambda lhs, rhs, sizes: tpu.forward(Spec(), lhs, rhs, None, sizes, False)[0]), (lhs, rhs, sizes)


def megablox(direction: str, shape: dict[str, Any], tiling: list[int]):
    """Return jax's gmm or tgmm, and its arguments."""
    module = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")

    call = Call(**shape)
    lhs = jax.ShapeDtypeStruct((call.M, call.K), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((call.E,), jnp.int32)
    if direction == "gradient":
        dout = jax.ShapeDtypeStruct((call.M, call.N), jnp.bfloat16)
        run = lambda lhs, dout, sizes: module.tgmm(lhs.swapaxes(0, 1), dout, sizes, tiling=tuple(tiling))
        return run, (lhs, dout, sizes)
    rhs = jax.ShapeDtypeStruct((call.E, call.K, call.N), jnp.bfloat16)
    return (lambda *x: module.gmm(*x, preferred_element_type=jnp.bfloat16, tiling=tuple(tiling))), (lhs, rhs, sizes)


def visits(sizes: np.ndarray, tile: int) -> list[tuple[int, int]]:
    """Return (first row, row after the last) of each visit, within its tile."""
    found, start = [], 0
    for size in sizes:
        stop = start + int(size)
        found += [(max(start - t, 0), min(stop - t, tile)) for t in range(start // tile * tile, stop, tile)]
        start = stop
    return found


def parts_of(cut: Cut, start: int, stop: int) -> list[int]:
    """Return the indices in cut.parts() of the parts that a visit multiplies, as in `tpu_forward.for_parts`."""
    least = cut.parts()[0]
    count = -(-(stop - start // tpu_tiles.ROWS * tpu_tiles.ROWS) // least)
    return [i for i in range(len(cut.parts())) if count >> i & 1]


@functools.cache
def bodies(target: str, maker: str, kernel: str, arguments: str) -> tuple[list[int], list[int], int, int]:
    """Return counts of a kernel's innermost regions, in program order: bundles of the regions that multiply, bundles of
    the later regions of at least 32 bundles that only store, spills of the former, and VMEM in bytes."""
    found = ahead_of_time.bundles(target, f"pallas_kernels.grouped_matmul.static_tpu:{maker}", *json.loads(arguments))
    regions = next(regions for label, regions in found.items() if label.startswith(kernel))
    work = sorted(ahead_of_time.body(regions, least=0.0), key=lambda region: region.first)
    parents = {region.parent for region in regions}
    after = [
        r
        for r in regions
        if r.kind in ("pred_region", "loop_body") and r.number not in parents and r.first > work[-1].first
        and r.bundles >= 32 and r.occupancy["VSTORE"] > 0.1 and not r.occupancy["MATMUL"]
    ]  # fmt: skip
    after.sort(key=lambda region: region.first)
    return [r.bundles for r in work], [r.bundles for r in after], sum(r.spills for r in work), regions[0].vmem


def our_row(target: str, direction: str, call: Call) -> dict[str, Any]:
    """Return our kernel's cost. Its bodies depend only on the tiles, so they are compiled for two groups."""
    device, sizes = DEVICES[target], balanced(call.M, call.E)
    gradient = direction == "gradient"
    cut = (tpu_tiles.gradient_cut if gradient else tpu_tiles.forward_cut)(device, call, Tiles())
    pieces_n, pieces_k, parts = cut.n // cut.piece, call.K // cut.k, cut.parts()
    if cut.n % cut.piece or call.N % cut.n or call.K % cut.k:
        raise ValueError(f"{call}: {cut} leaves a remainder of columns, which this estimate does not count")
    work, after, spills, vmem = bodies(
        target, "ours", "grouped_matmul", json.dumps([direction, cut.m, cut.n, cut.k, pieces_k > 1 and not gradient])
    )
    expected = len(parts) + gradient
    if len(work) != expected:
        raise RuntimeError(f"{target} {direction} {cut}: {len(work)} bodies {work}, expected {expected}")
    # In the program the largest part comes first. In the gradient, the body for a whole tile precedes them all.
    finish = after if not gradient and pieces_k > 1 and len(after) == len(parts) else [0] * len(parts)
    total = 0
    for start, stop in visits(sizes, cut.m):
        if gradient and stop - start == cut.m:
            total += pieces_n * work[0]
            continue
        for i in parts_of(cut, start, stop):
            total += pieces_n * (work[-1 - i] * (1 if gradient else pieces_k) + finish[-1 - i])
    total *= call.N // cut.n * (pieces_k if gradient else 1)
    moved = (tpu_tiles.gradient_bytes if gradient else tpu_tiles.forward_bytes)(call, cut)
    return {
        "tiles": [cut.m, cut.n, cut.k],
        "bundles": total,
        "bytes": int(moved),
        "spills": spills,
        "vmem_mib": round(vmem / 2**20, 1),
    }


def megablox_row(target: str, direction: str, call: Call, tiling: tuple[int, int, int]) -> dict[str, Any]:
    """Return megablox's cost. Each visit multiplies a whole tile of rows and, if K is in pieces, reads the weights."""
    m, k, n = tiling[0], min(tiling[1], call.K), min(tiling[2], call.N)  # at most the size of the problem
    sizes = balanced(call.M, call.E)
    gradient = direction == "gradient"
    while True:
        small = asdict(Call(2 * m, 2, 2 * k, 2 * n))
        given = json.dumps([direction, small, [m, k, n]])
        try:
            work, _, spills, vmem = bodies(target, "megablox", "tgmm" if gradient else "gmm", given)
            break
        except RuntimeError as refusal:  # megablox keeps the compiler's VMEM limit: 16 MiB on v5e and v5p
            if "Vmem" not in str(refusal) or k <= 128:
                raise
            k //= 2
    count = len(visits(sizes, m))
    tiles_k, tiles_n = -(-call.K // k), -(-call.N // n)
    steps = count * tiles_k * tiles_n
    # gmm has a body for the last piece of K, which stores, and one for the others.
    total = steps * max(work) if gradient else count * tiles_n * (max(work) + (tiles_k - 1) * min(work))
    if gradient:
        moved = call.M * call.b * (tiles_n * call.K + tiles_k * call.N) + 4 * call.E * call.K * call.N
    else:
        moved = steps * (m * k + k * n) * 2 + call.M * call.N * 2
    return {
        "tiles": [m, n, k],
        "bundles": total,
        "bytes": int(moved),
        "spills": spills,
        "vmem_mib": round(vmem / 2**20, 1),
    }


def rows(targets: tuple[str, ...], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return one row for each generation, problem, kernel and tiles."""
    made = []
    for target in targets:
        device = DEVICES[target]
        for name in names:
            direction, call = problems()[name]
            ideal = call.M * call.K * call.N / tpu_tiles.macs_a_cycle(device)
            found = [("ours", our_row(target, direction, call))]
            found += [("megablox", megablox_row(target, direction, call, tiling)) for tiling in MEGABLOX]
            for kernel, row in found:
                # All bundles and one core's share of the bandwidth. If two cores share the work, both terms halve.
                least = max(row["bundles"], row["bytes"] / tpu_tiles.BYTES_A_CYCLE[target])
                made.append({
                    "target": target, "problem": name, "direction": direction, "M": call.M, "E": call.E, "K": call.K,
                    "N": call.N,
                    "kernel": kernel, **row, "bundles_of_ideal": round(row["bundles"] / ideal, 3),
                    "least_cycles_of_ideal": round(least / ideal, 3), "cores": tpu_tiles.CORES.get(target, 1),
                    "bound": "bundles" if row["bundles"] == least else "bytes",
                })  # fmt: skip
                print(json.dumps(made[-1]), flush=True)
    return made


def ragged_dot(target: str, E: int) -> dict[str, Any]:
    """Return the FLOPs that XLA counts for jax.lax.ragged_dot, over 2 M K N."""
    M, K, N = 1024, 256, 512
    lhs, rhs = jax.ShapeDtypeStruct((M, K), jnp.bfloat16), jax.ShapeDtypeStruct((E, K, N), jnp.bfloat16)
    compiled = ahead_of_time.compile_for(target, jax.lax.ragged_dot, lhs, rhs, jax.ShapeDtypeStruct((E,), jnp.int32))
    cost = compiled.cost_analysis() or {}
    return {
        "target": target,
        "kernel": "jax.lax.ragged_dot",
        "E": E,
        "flops_of_rows": round(cost["flops"] / (2 * M * K * N), 2),
    }


def main() -> None:
    """Update RESULTS; rows of other generations and problems stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--problems", default=",".join(problems()))
    given = parser.parse_args()
    targets, names = tuple(given.targets.split(",")), tuple(given.problems.split(","))
    fresh = [ragged_dot(target, E) for target in targets for E in (8, 64)], rows(targets, names)
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "ragged_dot": []}
    kept = [row for row in old["rows"] if row["target"] not in targets or row["problem"] not in names]
    dense = [row for row in old["ragged_dot"] if row["target"] not in targets]
    dense, found = dense + fresh[0], kept + fresh[1]
    head = {
        "what": "static estimate by the compiler, not measured: bundles of a visit's body x visits, bfloat16, balanced "
        "groups aligned to nothing; ideal: multiplications over those of a cycle of one core",
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")},
    }
    RESULTS.parent.mkdir(exist_ok=True)
    lines = lambda rows: ",\n  ".join(json.dumps(row) for row in rows)
    RESULTS.write_text(
        json.dumps(head)[:-1]
        + ',\n "ragged_dot": [\n  '
        + lines(dense)
        + '\n],\n "rows": [\n  '
        + lines(found)
        + "\n]}\n"
    )


if __name__ == "__main__":
    main()
