"""The tile sizes of the TPU kernels, and the vector memory (VMEM) that a choice needs.

The choice minimizes an estimate of cycles over all tiles that fit: the larger of the matrix units' and the memory's
cycles, plus a tenth of the smaller. The estimate includes these effects, which matter most for small experts. They come
from the compiler's bundles, not from measurements.

- The product of a piece costs 170 to 250 cycles in addition to its multiplications, regardless of its size, so few
  large pieces are best.
- A visit computes only the parts of the tile of rows that contain its group's rows, rounded up to `edge` rows. So large
  tiles of rows do not slow small groups down, as they would if each visit paid for a whole tile.
- If a tile holds all of K, a group's weights are read once, and the rows once per tile of columns. If K is in pieces,
  both are read at every visit.

Shapes: M rows, E groups, K contraction, N columns, G gates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from pallas_kernels.flash_attention.tpu_tiles import LANES, MIB, Generation, round_up
from pallas_kernels.grouped_matmul.spec import Tiles

ROWS = 16  # rows of a bfloat16 tile; a part of a tile may begin at each multiple
STEP, PIECE = 400, 250  # cycles of a grid step, and of the first and last rows of a product
MAX_BUNDLES = 8500  # per piece, since its code must be loaded into the core's instruction memory
# Bytes of memory per cycle of one core: published bandwidth over the clock that follows from the published peak.
BYTES_A_CYCLE = {"v4": 585, "v5e": 546, "v5p": 790, "v6e": 937, "7x": 1677}
CORES = {"v4": 2, "v5p": 2}  # cores that share one device's grid


@dataclass(frozen=True)
class Cut:
    """The tiles of one kernel. Forward: m rows, n columns, k elements of the contraction. Weights' gradient: m rows,
    which are summed over, and k by n elements of the result."""

    m: int
    n: int
    k: int
    piece: int  # columns of one product
    edge: int  # fewest rows of one product
    bundles: float  # per piece, a lower bound
    vmem: int  # bytes, an upper estimate; passed to the compiler as the kernel's limit

    def parts(self) -> list[int]:
        """Return the numbers of rows that a product may have, ascending: ..., half the tile, the tile."""
        sizes = [self.m]
        while sizes[0] % (2 * ROWS) == 0 and sizes[0] // 2 >= self.edge:
            sizes.insert(0, sizes[0] // 2)
        return sizes


@dataclass(frozen=True)
class Call:
    """The call that tiles are chosen for. `b`, `wb`: bytes per element of lhs and of the weights."""

    M: int
    E: int
    K: int
    N: int
    G: int = 1
    b: int = 2
    wb: int = 2
    keep: bool = False


def macs_a_cycle(device: Generation) -> int:
    """Return the bfloat16 multiplications per cycle of one core: four units of 128 x 128 or of 256 x 256."""
    return 4 * device.mxu**2


@functools.lru_cache(maxsize=4096)
def forward_cut(device: Generation, call: Call, tiles: Tiles) -> Cut:
    """Return the tiles of the forward kernel. Raises ValueError if none fits, or if a given size is not allowed."""
    made = [
        cut
        for m in _rows(call.M, tiles.m, (1024, 512, 256, 128))
        for n in _columns(call.N, tiles.n, "n", 4096)
        for k in _columns(call.K, tiles.k, "k", 1 << 20)
        for cut in [forward_of(device, call, m, n, k)]
    ]
    return _best(device, made, lambda cut: forward_cycles(device, call, cut))


@functools.lru_cache(maxsize=4096)
def gradient_cut(device: Generation, call: Call, tiles: Tiles) -> Cut:
    """Return the tiles of the weights' gradient. Errors as in `forward_cut`."""
    made = [
        cut
        for m in _rows(call.M, tiles.m, (512, 256, 128))
        for n in _columns(call.N, tiles.n, "n", 2048)
        for k in _columns(call.K, tiles.k, "k", 2048)
        for cut in [gradient_of(device, call, m, n, k)]
    ]
    return _best(device, made, lambda cut: gradient_cycles(device, call, cut))


def forward_cycles(device: Generation, call: Call, cut: Cut) -> float:
    """Return the estimated cycles of the forward kernel on one core, for equal, unaligned groups."""
    tiles_m, tiles_n, pieces = cdiv(call.M, cut.m), cdiv(call.N, cut.n), cdiv(call.K, cut.k)
    groups = min(call.E, call.M)
    visits = tiles_m + groups - 1
    all_of_k = pieces == 1
    width = tiles_n * (cut.n // cut.piece * round_up(cut.piece, device.mxu) + round_up(cut.n % cut.piece, device.mxu))
    work = call.G * (call.M + visits * cut.edge / 2) * round_up(call.K) * width * _passes(call) / macs_a_cycle(device)
    steps = tiles_n * visits * pieces * (STEP + 1.5 * call.G * cdiv(cut.n, cut.piece) * PIECE)
    sums = 0 if all_of_k else tiles_n * visits * pieces * call.G * cut.m * cut.n / 1024
    return _both((work + steps + sums) * _share(device, tiles_n), memory_cycles(device, forward_bytes(call, cut)))


def forward_bytes(call: Call, cut: Cut) -> float:
    """Return the bytes that the forward kernel moves from and to memory, for equal, unaligned groups."""
    tiles_m, tiles_n = cdiv(call.M, cut.m), cdiv(call.N, cut.n)
    groups = min(call.E, call.M)
    visits = tiles_m + groups - 1
    all_of_k = cdiv(call.K, cut.k) == 1
    lhs = tiles_n * (tiles_m if all_of_k else visits) * cut.m * call.K * call.b
    rhs = (groups if all_of_k else visits) * call.K * call.G * call.N * call.wb
    return lhs + rhs + call.M * call.N * call.b * (1 + call.G * call.keep)


def gradient_cycles(device: Generation, call: Call, cut: Cut) -> float:
    """Return the estimated cycles of the gradient kernel on one core, for equal, unaligned groups."""
    tiles_k, tiles_n = cdiv(call.K, cut.k), cdiv(call.N, cut.n)
    visits = cdiv(call.M, cut.m) + call.E - 1
    outputs = tiles_k * cut.k * tiles_n * round_up(cut.n, device.mxu)
    work = (call.M + visits * device.mxu / 2) * outputs * _passes(call) / macs_a_cycle(device)
    steps = tiles_k * tiles_n * visits * (STEP + 2 * PIECE + cut.k * cut.n / 1024)
    return _both((work + steps) * _share(device, tiles_k), memory_cycles(device, gradient_bytes(call, cut)))


def gradient_bytes(call: Call, cut: Cut) -> float:
    """Return the bytes that the gradient kernel moves from and to memory."""
    tiles_k, tiles_n = cdiv(call.K, cut.k), cdiv(call.N, cut.n)
    return call.M * call.b * (tiles_n * call.K + tiles_k * call.N) + 4 * call.E * call.K * call.N


def memory_cycles(device: Generation, moved: float) -> float:
    """Return the cycles that `moved` bytes take at the published bandwidth."""
    return moved / BYTES_A_CYCLE[device.name] / CORES.get(device.name, 1)


def _both(work: float, transfers: float) -> float:
    """Return the longer plus a tenth of the shorter, which is not hidden completely."""
    return max(work, transfers) + 0.1 * min(work, transfers)


def forward_of(device: Generation, call: Call, m: int, n: int, k: int) -> Cut:
    """Return the forward kernel's `Cut` for these tile sizes."""
    column = call.G * m * k * _passes(call) / macs_a_cycle(device)
    piece = _piece(device, n, column)
    blocks = m * k * call.b + call.G * k * n * call.wb + m * n * call.b * (1 + call.G * call.keep) + 8 * 4 * n * call.G
    sums = 4 * call.G * m * n if k < round_up(call.K) else 0
    # One product in flight: its sums by gate, the activation's results, and the weights widened or transposed.
    work = (
        4 * m * piece * (call.G + 2)
        + k * piece * call.G * (call.b + 4 * (call.wb != call.b))
        + 4 * m * k * (call.b == 4)
    )
    return Cut(m, n, k, piece, 64 if device.mxu == LANES else 128, column * piece, 2 * blocks + sums + work + 2 * MIB)


def gradient_of(device: Generation, call: Call, m: int, n: int, k: int) -> Cut:
    """Return the gradient kernel's `Cut` for these tile sizes."""
    column = m * k * _passes(call) / macs_a_cycle(device)
    piece = _piece(device, n, column)
    blocks = m * (k + n) * call.b + 4 * k * n
    work = 4 * k * piece + 2 * m * (k + piece) * (4 + call.b)
    return Cut(m, n, k, piece, device.mxu, column * piece, 2 * blocks + work + 2 * MIB)


def _piece(device: Generation, n: int, bundles_a_column: float) -> int:
    """Return the columns of a product: as many as keep its body within MAX_BUNDLES, in whole matrix units if
    possible."""
    fits = int(min(MAX_BUNDLES / bundles_a_column, 1024))
    most = min(n, max(fits // device.mxu * device.mxu, device.mxu if fits >= device.mxu // 2 else LANES))
    unit = min(device.mxu, most)
    even = [size for size in range(unit, most + 1, unit) if n % size == 0 and 2 * size >= most]
    return max(even, default=most)  # a divisor of n, unless that needs more than twice as many pieces


def _best(device: Generation, made: list[Cut], cycles) -> Cut:
    fit = [cut for cut in made if cut.vmem <= device.vmem]
    short = [cut for cut in fit if cut.bundles <= MAX_BUNDLES]
    if fit:
        return min(short or fit, key=lambda cut: (cycles(cut), cut.vmem))
    least = min(made, key=lambda cut: cut.vmem)
    raise ValueError(
        f"tiles of {least.m} x {least.n} x {least.k} need {least.vmem / MIB:.1f} MiB of VMEM, more than the "
        f"{device.vmem / MIB:.0f} MiB of a TPU {device.name}; use smaller tiles, or None"
    )


def _rows(M: int, given: int | None, choices: tuple[int, ...]) -> list[int]:
    if given is not None and given % ROWS:
        raise ValueError(f"tiles.m = {given}: must be a multiple of {ROWS} on TPUs")
    return sorted({min(m, round_up(M, ROWS)) for m in ([given] if given else choices)})


def _columns(N: int, given: int | None, name: str, most: int) -> Iterator[int]:
    """Return the multiples of 128 that divide N, after rounding N up to a multiple of 128."""
    if given is not None:
        if given % LANES:
            raise ValueError(f"tiles.{name} = {given}: must be a multiple of {LANES} on TPUs")
        return iter([min(given, round_up(N))])
    units = round_up(N) // LANES
    return (size * LANES for size in range(1, units + 1) if units % size == 0 and size * LANES <= most)


def _share(device: Generation, tiles: int) -> float:
    """Return the fraction of the work done by the busiest core."""
    return cdiv(tiles, CORES.get(device.name, 1)) / tiles


def _passes(call: Call) -> int:
    return 6 if call.b == 4 else 1  # a float32 product takes six of bfloat16


def cdiv(n: int, size: int) -> int:
    return -(-n // size)
