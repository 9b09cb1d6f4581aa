"""Cloud TPU slices: accelerator types with chips and hosts, software versions, and zones.

Sizes, from https://cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, and from xpk 1.9 (core/system_characteristics.py):
the number in v4-N and v5p-N counts TensorCores, two on a chip; in v5litepod-N and v6e-N it counts chips. A host (TPU
VM) has four chips, except in the one-host slices of v5e and v6e, which have 1, 4 or 8.
Software versions: https://cloud.google.com/tpu/docs/runtimes. Zones: https://cloud.google.com/tpu/docs/regions-zones;
they change, so a zone that is not listed here is a warning. Those marked unverified are named by Google's examples, and
the table of zones could not be read for them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from experiments.launch.job import LaunchError


@dataclass(frozen=True)
class Family:
    """A generation of TPUs."""

    cores_per_chip: int  # by which the number of an accelerator type counts: 1 where it counts chips
    chips: tuple[int, ...]  # in the slices that exist
    one_host: int  # chips of the largest slice with one host
    runtime: str
    zones: tuple[str, ...]
    unverified: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()  # names that people write


FAMILIES = {
    "v4": Family(
        2, (4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 2048), 4, "tpu-ubuntu2204-base", ("us-central2-b",)
    ),
    "v5litepod": Family(
        1, (1, 4, 8, 16, 32, 64, 128, 256), 8, "v2-alpha-tpuv5-lite",
        ("us-central1-a", "us-south1-a", "us-west1-c", "us-west4-a"), ("europe-west4-b",),
        ("v5e", "v5lite", "v5litepod", "v5-lite"),
    ),
    "v5p": Family(
        2, (4, 8, 16, 32, *range(64, 6145, 64)), 4, "v2-alpha-tpuv5", ("us-central1-a", "us-east5-a"),
        ("europe-west4-b",),
    ),
    "v6e": Family(
        1, (1, 4, 8, 16, 32, 64, 128, 256), 8, "v2-alpha-tpuv6e",
        ("us-central1-b", "us-east1-d", "us-east5-a", "us-east5-b", "europe-west4-a"), ("asia-northeast1-b",),
        ("v6", "v6lite", "trillium"),
    ),
}  # fmt: skip
# https://cloud.google.com/compute/docs/regions-zones
REGIONS = """
    africa-south1 asia-east1 asia-east2 asia-northeast1 asia-northeast2 asia-northeast3 asia-south1 asia-south2
    asia-southeast1 asia-southeast2 australia-southeast1 australia-southeast2 europe-central2 europe-north1
    europe-north2 europe-southwest1 europe-west1 europe-west10 europe-west12 europe-west2 europe-west3
    europe-west4 europe-west6 europe-west8 europe-west9 me-central1 me-central2 me-west1 northamerica-northeast1
    northamerica-northeast2 northamerica-south1 southamerica-east1 southamerica-west1 us-central1 us-central2
    us-east1 us-east4 us-east5 us-south1 us-west1 us-west2 us-west3 us-west4
""".split()


@dataclass(frozen=True)
class Slice:
    """A slice of TPUs, such as v5litepod-16: 16 chips on 4 hosts."""

    name: str
    family: Family
    chips: int

    @property
    def hosts(self) -> int:
        """The number of TPU VMs, each of which runs one process."""
        return 1 if self.chips <= self.family.one_host else self.chips // 4

    @property
    def runtime(self) -> str:
        return self.family.runtime


def find_slice(name: str) -> Slice:
    """Return the slice of an accelerator type. Raises LaunchError with a near match."""
    prefix, _, number = name.rpartition("-")
    family = FAMILIES.get(prefix)
    if family is not None and number.isdigit() and int(number) in _numbers(family):
        return Slice(name, family, int(number) // family.cores_per_chip)
    if name.lower().startswith(("tpu7x", "v7", "7x", "ironwood")):
        raise LaunchError(
            f"--accelerator {name}: Google offers TPU7x on GKE alone; use launch gke --accelerator tpu7x-8"
        )
    near = _near(prefix or name, number)
    if family is None:
        hint = f"; did you mean {near}?" if near else "."
        types = ", ".join(f"{known}-N" for known in FAMILIES)
        raise LaunchError(f"--accelerator {name}: unknown accelerator{hint} The types are {types}")
    sizes = [str(n) for n in _numbers(family)]
    listed = ", ".join(sizes) if len(sizes) < 16 else f"{', '.join(sizes[:8])} and multiples of 128 up to {sizes[-1]}"
    raise LaunchError(f"--accelerator {name}: no slice has this size; did you mean {near}? N in {prefix}-N is {listed}")


def _numbers(family: Family) -> list[int]:
    return [chips * family.cores_per_chip for chips in family.chips]


def _near(prefix: str, number: str) -> str | None:
    names = {alias: known for known, family in FAMILIES.items() for alias in (known, *family.aliases)}
    close = get_close_matches(prefix.lower(), names, n=1, cutoff=0.6)
    if not close:
        return None
    known = names[close[0]]
    wanted = int(number) if number.isdigit() else 8
    return f"{known}-{min(_numbers(FAMILIES[known]), key=lambda n: (abs(n - wanted), n))}"


def check_zone(zone: str, family: Family | None) -> str | None:
    """Return a warning about a zone where a family is not known to exist, or None. Raises LaunchError for one that
    cannot exist. Without a family, only the name is checked."""
    region, _, letter = zone.rpartition("-")
    known = sorted({each for one in FAMILIES.values() for each in (*one.zones, *one.unverified)})
    if region not in REGIONS or not re.fullmatch(r"[a-z]|ai\d[a-z]?", letter):
        near = get_close_matches(zone, known, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise LaunchError(f"--zone {zone}: unknown zone{hint} A zone is a region and a letter, such as us-central1-a")
    if family is None or zone in family.zones:
        return None
    if zone in family.unverified:
        return f"--zone {zone}: Google's examples use it for this type, but its table of zones was not checked"
    return f"--zone {zone}: not among the known zones of this type, which are {', '.join(family.zones)}"
