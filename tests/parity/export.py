"""Compare transformers' logits for folders that interop/save.py writes with the reference, for every family."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from interop.load import load
from interop.published import open_published
from interop.save import save_published
from sharding.rules import ShardingRules
from tests.parity import transformers_families
from tests.parity.families import FAMILIES, Family, write_folder
from tests.parity.families import load as load_reference

LIMIT = 2e-5  # relative to the largest logit; twice the difference that make.py allows between builds of torch


def differences(names: Sequence[str] = ()) -> Iterator[tuple[Family, float]]:
    """Yield each family and the difference, relative to the largest logit, between the reference and transformers'
    logits for the network that was loaded and saved again."""
    for family in FAMILIES:
        if names and family.name not in names:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            published = open_published(write_folder(family, Path(temporary, "theirs")))
            model = load(published.source, published.tensor_map, published.config, ShardingRules())
            save_published(model, published.config, Path(temporary, "ours"), family=published.family)
            found = transformers_families.logits_of(Path(temporary, "ours"), family)
        wanted = load_reference(family)["logits"]
        yield family, float(np.abs(found - wanted).max() / np.abs(wanted).max())
