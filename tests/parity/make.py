"""Run transformers on the drawn weights and write the reference files: MoE layers (`cases.py`) and whole networks of
thirteen families (`families.py`).

    python -m tests.parity.make           write the files (needs torch and transformers, the extra `parity`)
    python -m tests.parity.make --check   recompute and compare them, and let transformers read models saved by
                                          interop/save.py; report differences (`make parity`)
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
import transformers

from tests.parity import cases, families, transformers_blocks, transformers_families

# Largest difference between builds of torch, relative to the largest entry of a file (at least 1).
TOLERANCE = {"block": 2e-6, "family": 1e-5}


def main() -> int:
    """Write or check every case. Return 1 if a file differs, else 0."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.make", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the files instead of writing them")
    parser.add_argument("names", nargs="*", help="only these cases and families")
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    wrong = 0
    jobs: list[tuple[str, Any, Any]] = [("block", case, transformers_blocks.reference) for case in cases.CASES]
    jobs += [("family", family, transformers_families.reference) for family in families.FAMILIES]
    for kind, case, reference in jobs:
        if given.names and case.name not in given.names:
            continue
        found = reference(case)
        if given.check:
            wrong += not same(kind, case, found)
        else:
            case.file.parent.mkdir(exist_ok=True)
            np.savez_compressed(case.file, **found)
            print(f"{case.file.name}: {len(found)} arrays, {case.file.stat().st_size:,} bytes")
    if given.check:
        wrong += exported(given.names)
    return 1 if wrong else 0


def same(kind: str, case: Any, found: dict[str, np.ndarray]) -> bool:
    """Print and return whether transformers reproduces the file."""
    with np.load(case.file) as file:
        kept = dict(file)
    exact = [name for name in found if found[name].dtype.kind in "iu"]
    good = found.keys() == kept.keys() and all(np.array_equal(found[name], kept[name]) for name in exact)
    rest = [name for name in kept if name in found and name not in exact]
    far = max((float(np.abs(found[n] - kept[n]).max() / max(1.0, np.abs(kept[n]).max())) for n in rest), default=0)
    good = good and far <= TOLERANCE[kind]
    print(
        f"{kind} {case.name}: {'same' if good else 'DIFFERS'} (largest difference {far:.1e}; transformers "
        f"{transformers.__version__})"
    )
    return good


def exported(names: list[str]) -> int:
    """Return the number of families whose exported folders give different logits in transformers."""
    from tests.parity.export import LIMIT, differences  # loads jax in addition to torch

    wrong = 0
    for family, far in differences(names):
        good = far <= LIMIT
        wrong += not good
        print(f"export {family.name}: {'same' if good else 'DIFFERS'} (difference {far:.1e} of the largest logit)")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
