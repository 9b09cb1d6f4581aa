"""The tile sizes of the TPU kernels: defaults by generation, and the vector memory (VMEM) that a choice needs."""

from __future__ import annotations

from dataclasses import dataclass

from pallas_kernels.flash_attention.spec import Spec
from pallas_kernels.target import target

LANES = 128
MIB = 1 << 20


@dataclass(frozen=True)
class Generation:
    """The properties of a TPU generation that the kernels use."""

    name: str
    mxu: int  # columns of a matrix unit
    # Bytes that a kernel may request: the compiler's limit, or about half of the VMEM, which leaves the rest to XLA.
    vmem: int


GENERATIONS = {
    "TPU v4": Generation("v4", 128, 15 * MIB),
    "TPU v5 lite": Generation("v5e", 128, 64 * MIB),
    "TPU v5": Generation("v5p", 128, 60 * MIB),
    "TPU v6 lite": Generation("v6e", 256, 64 * MIB),
    "TPU7x": Generation("7x", 256, 60 * MIB),
}


def generation() -> Generation:
    """Return the generation of the target device; v6e if the target is not a TPU, as in interpret mode."""
    platform, kind = target()
    if platform != "tpu":
        return GENERATIONS["TPU v6 lite"]
    found = [name for name in GENERATIONS if kind.startswith(name)]
    return GENERATIONS[max(found, key=len)] if found else GENERATIONS["TPU v4"]


@dataclass(frozen=True)
class Cut:
    """One kernel's tile sizes, and the pieces into which a tile is divided (see `tpu_pairs.steps`)."""

    q: int  # queries per tile
    k: int  # keys per tile
    sub_q: int  # queries per piece
    sub_k: int  # keys per piece
    edge: int  # queries per piece in tiles at the edge of causal and window
    ahead: bool  # whether a piece's first product is issued before the softmax of the previous piece
    vmem: int  # bytes, an upper estimate; passed to the compiler as the kernel's limit


def round_up(n: int, multiple: int = LANES) -> int:
    """Return `n` rounded up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple


def forward_cut(spec: Spec, T: int, S: int, H: int, V: int, bytes_each: int, q_ints: int, k_ints: int) -> Cut:
    """Return the tiles of the forward kernel.

    `bytes_each`: bytes per element of q, k and v. `q_ints`, `k_ints`: number of int32 arrays along the queries and
    along the keys. Raises ValueError if no tile fits."""
    device = generation()
    wide = device.mxu > LANES
    width = 2 * LANES if wide and round_up(V) % (2 * LANES) else round_up(V)
    q, k = _sizes(spec, T, S, spec.tiles.q, spec.tiles.k, "q", "k", 1024, 1024)
    while True:
        sub_q, sub_k, edge = (512, 1024, 256) if wide else (1024, 512, 256)
        sub_q, sub_k = _divisor(q, sub_q), _divisor(k, sub_k)
        blocks = bytes_each * (q * 2 * round_up(H) + k * (2 * round_up(H) + round_up(V)) + q * round_up(V)) + 4 * 8 * q
        blocks += 4 * (q_ints * q * LANES + k_ints * k * 8)
        live = 4 * (q * width + 2 * q * LANES)  # accumulator, running maximum and sum
        work = sub_q * sub_k * (4 * 3 + bytes_each) + 4 * sub_q * width
        work = work * (2 if bytes_each == 4 else 1)
        cut = Cut(q, k, sub_q, sub_k, min(edge, q), wide, 2 * blocks + live + work + MIB)
        if cut.vmem <= device.vmem:
            return cut
        q, k = _smaller(spec, device, cut, ("q", spec.tiles.q), ("k", spec.tiles.k))


def backward_cut(spec: Spec, T: int, S: int, H: int, V: int, bytes_each: int, q_ints: int, k_ints: int) -> Cut:
    """Return the tiles of the backward kernel. Arguments and errors as in `forward_cut`."""
    device = generation()
    q, k = _sizes(spec, T, S, spec.tiles.q_dkv, spec.tiles.k_dkv, "q_dkv", "k_dkv", 1024, 1024)
    while True:
        sub_q, sub_k, edge = _divisor(q, 1024), _divisor(k, 1024), 256
        widths = round_up(H) + round_up(V)
        blocks = bytes_each * (q + k) * widths + 2 * 4 * 8 * q + bytes_each * k * widths
        blocks += 4 * (k_ints * k * LANES + q_ints * q * 8)
        live = 4 * k * widths + 3 * 4 * q * round_up(H)  # dk, dv; dq of this tile and two buffers in flight
        work = sub_q * sub_k * (4 * 4 + 2 * bytes_each) * (2 if bytes_each == 4 else 1)
        cut = Cut(q, k, sub_q, sub_k, min(edge, q), False, 2 * blocks + live + work + MIB)
        if cut.vmem <= device.vmem:
            return cut
        q, k = _smaller(spec, device, cut, ("q_dkv", spec.tiles.q_dkv), ("k_dkv", spec.tiles.k_dkv))


def _smaller(
    spec: Spec, device: Generation, cut: Cut, q: tuple[str, int | None], k: tuple[str, int | None]
) -> tuple[int, int]:
    """Return the next smaller tiles, of the sizes that the caller did not set."""
    halves = {n: _divisor(n, n // 2) for n in (cut.q, cut.k)}
    if k[1] is None and cut.k > LANES and (cut.k >= cut.q or q[1] is not None) and halves[cut.k] < cut.k:
        return cut.q, halves[cut.k]
    if q[1] is None and cut.q > LANES and halves[cut.q] < cut.q:
        return halves[cut.q], cut.k
    raise ValueError(
        f"tiles.{q[0]} = {cut.q} and tiles.{k[0]} = {cut.k} need {cut.vmem / MIB:.1f} MiB of VMEM, more than the "
        f"{device.vmem / MIB:.0f} MiB of a TPU {device.name}; use smaller tiles, or None"
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
    """Return a multiple of 128 that divides the block, if there is one, and wastes little of the length."""
    if block is not None and block % LANES:
        raise ValueError(f"mask.block_shape of {block} {what}: must be a multiple of {LANES} on TPUs")
    if given is not None:
        if given % LANES:
            raise ValueError(f"tiles.{name} = {given}: must be a multiple of {LANES} on TPUs")
        if block is not None and block % given:
            raise ValueError(f"tiles.{name} = {given}: must divide mask.block_shape's {block} {what}")
        return min(given, round_up(length)) if block is None else given
    if block is not None:
        return _divisor(block, most)
    # The fewest tiles of at most `most`, as even as possible: 1100 becomes 2 x 640, not 2 x 1024.
    return round_up(-(-length // (-(-length // most))))


def _divisor(n: int, most: int) -> int:
    """Return the largest multiple of 128 that divides `n`, a multiple of 128, and is at most `most`."""
    return max(size for size in range(LANES, max(most, LANES) + 1, LANES) if n % size == 0)
