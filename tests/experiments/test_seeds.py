"""Runs of `smoke` with several seeds under one vmap equal separate runs."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.bench.seeds import compare


@pytest.mark.slow
def test_eight_seeds_of_smoke_under_one_vmap_match_separate_runs():
    """Over 20 steps; later, a difference in the last bit may decide a router's near tie differently."""
    apart, _, _ = compare(seeds=8, steps=20)
    assert apart.shape == (20, 8)
    assert np.isfinite(apart).all() and apart.max() < 1e-5
