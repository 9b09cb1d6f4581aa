"""The activations of the MLP (Shazeer 2020, eq. 5 and 6) against float64 formulas."""

from __future__ import annotations

import typing

import jax.numpy as jnp
import numpy as np
import pytest

from model.config import MLPConfig
from model.mlp import GATED, activate, gates
from tests.model.reference import feed_forward

KINDS = [kind for kind in typing.get_args(typing.get_type_hints(MLPConfig)["kind"]) if kind != "swiglu_clamped"]


@pytest.mark.parametrize("kind", KINDS)
def test_activations_match_their_formulas(kind):
    G = gates(kind)
    assert G == (2 if kind in GATED else 1)
    h_TGF = np.random.default_rng(0).standard_normal((64, G, 32)) * 3
    # Identity projections leave the activation alone.
    expected = feed_forward(h_TGF.reshape(64, -1), np.eye(G * 32).reshape(-1, G, 32), np.eye(32), kind)
    found = np.asarray(activate(kind, jnp.asarray(h_TGF, jnp.float32)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
