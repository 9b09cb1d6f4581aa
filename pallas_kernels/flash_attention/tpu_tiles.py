"""How the TPU kernels cut a call into tiles: defaults by generation, and the vector memory (VMEM) that a choice
needs."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.flash_attention.spec import Spec
from pallas_kernels.target import target

LANES = 128
MIB = 1 << 20


@dataclass(frozen=True)
class Generation:
    """What the kernels need to know of a TPU."""

    name: str
    mxu: int  # columns of a matrix unit
    # bytes a kernel may ask for: what the compiler grants, or half of what there is, so that XLA keeps the rest
    vmem: int


GENERATIONS = {
    "TPU v4": Generation("v4", 128, 15 * MIB),
    "TPU v5 lite": Generation("v5e", 128, 64 * MIB),
    "TPU v5": Generation("v5p", 128, 60 * MIB),
    "TPU v6 lite": Generation("v6e", 256, 64 * MIB),
    "TPU7x": Generation("7x", 256, 60 * MIB),
}


def generation() -> Generation:
    """Of the device that is compiled for; in interpret mode, where there is none, that of v6e."""
    platform, kind = target()
    if platform != "tpu":
        return GENERATIONS["TPU v6 lite"]
    found = [name for name in GENERATIONS if kind.startswith(name)]
    return GENERATIONS[max(found, key=len)] if found else GENERATIONS["TPU v4"]


@dataclass(frozen=True)
class Cut:
    """One kernel's tiles, and the pieces in which a tile is worked on (see `tpu_pairs.steps`)."""

    q: int
    k: int
    sub_q: int
    sub_k: int
    edge: int  # queries a row of pieces, in tiles at the edge of causal and window
    ahead: bool  # whether a piece's first product is stated before the softmax of the piece before it
    vmem: int  # bytes, an upper estimate; given to the compiler as the kernel's limit


def up(n: int, multiple: int = LANES) -> int:
    """`n` rounded up."""
    return -(-n // multiple) * multiple


def forward_cut(spec: Spec, T: int, S: int, H: int, V: int, bytes_each: int, q_ints: int, k_ints: int) -> Cut:
    """Tiles of the forward kernel. `bytes_each`: of an element of q, k and v; `q_ints`, `k_ints`: int32 arrays beside
    the queries and the keys. Raises ValueError where no tile fits."""
    device = generation()
    wide = device.mxu > LANES
    width = 2 * LANES if wide and up(V) % (2 * LANES) else up(V)
    q, k = _sizes(spec, T, S, spec.tiles.q, spec.tiles.k, "q", "k", 1024, 1024)
    while True:
        sub_q, sub_k, edge = (512, 1024, 256) if wide else (1024, 512, 256)
        sub_q, sub_k = _divisor(q, sub_q), _divisor(k, sub_k)
        blocks = bytes_each * (q * 2 * up(H) + k * (2 * up(H) + up(V)) + q * up(V)) + 4 * 8 * q
        blocks += 4 * (q_ints * q * LANES + k_ints * k * 8)
        live = 4 * (q * width + 2 * q * LANES)  # accumulator, running maximum and sum
        work = sub_q * sub_k * (4 * 3 + bytes_each) + 4 * sub_q * width
        work = work * (2 if bytes_each == 4 else 1)
        cut = Cut(q, k, sub_q, sub_k, min(edge, q), wide, 2 * blocks + live + work + MIB)
        if cut.vmem <= device.vmem:
            return cut
        q, k = _smaller(spec, device, cut, ("q", spec.tiles.q), ("k", spec.tiles.k))


def backward_cut(spec: Spec, T: int, S: int, H: int, V: int, bytes_each: int, q_ints: int, k_ints: int) -> Cut:
    """Tiles of the backward kernel; as `forward_cut`."""
    device = generation()
    q, k = _sizes(spec, T, S, spec.tiles.q_dkv, spec.tiles.k_dkv, "q_dkv", "k_dkv", 1024, 1024)
    while True:
        sub_q, sub_k, edge = _divisor(q, 1024), _divisor(k, 1024), 256
        blocks = bytes_each * (q + k) * (up(H) + up(V)) + 2 * 4 * 8 * q + bytes_each * k * (up(H) + up(V))
        blocks += 4 * (k_ints * k * LANES + q_ints * q * 8)
        live = 4 * k * (up(H) + up(V)) + 3 * 4 * q * up(H)  # dk, dv; dq of this tile and of two visits in flight
        work = sub_q * sub_k * (4 * 4 + 2 * bytes_each) * (2 if bytes_each == 4 else 1)
        cut = Cut(q, k, sub_q, sub_k, min(edge, q), False, 2 * blocks + live + work + MIB)
        if cut.vmem <= device.vmem:
            return cut
        q, k = _smaller(spec, device, cut, ("q_dkv", spec.tiles.q_dkv), ("k_dkv", spec.tiles.k_dkv))


def _smaller(
    spec: Spec, device: Generation, cut: Cut, q: tuple[str, int | None], k: tuple[str, int | None]
) -> tuple[int, int]:
    """The next smaller tiles, where the caller left the choice to us."""
    halves = {n: _divisor(n, n // 2) for n in (cut.q, cut.k)}
    if k[1] is None and cut.k > LANES and (cut.k >= cut.q or q[1] is not None) and halves[cut.k] < cut.k:
        return cut.q, halves[cut.k]
    if q[1] is None and cut.q > LANES and halves[cut.q] < cut.q:
        return halves[cut.q], cut.k
    raise ValueError(
        f"tiles.{q[0]} = {cut.q} and tiles.{k[0]} = {cut.k} need {cut.vmem / MIB:.1f} MiB of VMEM, more than the "
        f"{device.vmem / MIB:.0f} MiB of a TPU {device.name}: give smaller ones, or None"
    )


def _sizes(
    spec: Spec, T: int, S: int, q: int | None, k: int | None, q_name: str, k_name: str, most_q: int, most_k: int
):
    shape = spec.mask.block_shape or (None, None)
    return (
        _size(T, q, q_name, most_q, shape[0], "queries"),
        _size(S, k, k_name, most_k, shape[1], "keys"),
    )


def _size(length: int, given: int | None, name: str, most: int, block: int | None, what: str) -> int:
    """A multiple of 128 that divides the block, if there is one, and wastes little of the length."""
    if block is not None and block % LANES:
        raise ValueError(f"mask.block_shape of {block} {what}: the tiles of a TPU are multiples of {LANES}")
    if given is not None:
        if given % LANES:
            raise ValueError(f"tiles.{name} = {given}: the tiles of a TPU are multiples of {LANES}")
        if block is not None and block % given:
            raise ValueError(f"tiles.{name} = {given}: must divide mask.block_shape's {block} {what}")
        return min(given, up(length)) if block is None else given
    if block is not None:
        return _divisor(block, most)
    # The fewest tiles of at most `most`, as even as may be: 1100 is 2 x 640, not 2 x 1024.
    return up(-(-length // (-(-length // most))))


def _divisor(n: int, most: int) -> int:
    """The largest multiple of 128 that divides `n`, itself one, and is no larger than `most`."""
    return max(size for size in range(LANES, max(most, LANES) + 1, LANES) if n % size == 0)
