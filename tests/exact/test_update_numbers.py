"""Updates of Muon and Lion, sizes of optimizer states and schedules equal the closed forms of their papers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.weights import Weight
from tests.closeness import assert_close
from tests.models import tiny_config
from train.config import OptimizerConfig
from train.optimizers import make_optimizer, schedule


def plain(name: str, **changes) -> OptimizerConfig:
    """Return a config with a rate of 1 and neither decay nor clipping."""
    fields = {"learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": None}
    return OptimizerConfig(name=name, **{**fields, **changes})


def matrix(value) -> dict[str, Weight]:
    """Return a network of one matrix."""
    return {"w": Weight(jnp.asarray(value, jnp.float32), name="mlp.up", axes=("embed", "mlp"), inputs=1)}


# ---------------------------------------------------------------------------------------------------- Muon

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024


def newton_schulz(s: np.ndarray) -> np.ndarray:
    """Return singular values after five iterations, in float64."""
    a, b, c = QUINTIC
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return s


def test_muon_maps_singular_values_by_the_published_polynomial():
    """A gradient U diag(s) V^T of Frobenius norm 1 gives U diag(f(s)) V^T. optax has other coefficients, too
    ('dion'), so this tests those that training uses."""
    rows, columns = 12, 20
    draw = np.random.default_rng(0)
    U, _ = np.linalg.qr(draw.standard_normal((rows, rows)))
    V, _ = np.linalg.qr(draw.standard_normal((columns, rows)))
    s = np.geomspace(0.02, 1, rows)
    s[0] = 1e-3 * math.sqrt((s[1:] ** 2).sum() / (1 - 1e-6))
    s /= np.linalg.norm(s)
    assert s[0] == pytest.approx(1e-3, rel=1e-9)
    optimizer = make_optimizer(plain("muon"), tiny_config(), steps=10)
    states = jax.tree.leaves(
        optimizer.init(matrix(np.zeros((rows, columns)))), is_leaf=lambda x: isinstance(x, optax.contrib.MuonState)
    )
    (state,) = [x for x in states if isinstance(x, optax.contrib.MuonState)]
    np.testing.assert_allclose(state.ns_coeffs, QUINTIC, rtol=1e-6)

    @jax.jit
    def update(w):
        return optimizer.update(w, optimizer.init(w), w)[0]["w"].value

    for G in ((U * s) @ V.T, V @ (U * s).T):
        found = np.asarray(update(matrix(G)), np.float64)
        found = -(found if G.shape[0] == rows else found.T) / (0.2 * math.sqrt(columns))  # Liu et al. 2025, sec. 2.2
        # A rounding error of s grows by at most f'(0) = 3.4445^5 = 485.
        assert_close(U.T @ found @ V, np.diag(newton_schulz(s)), 2e-4, what=f"{G.shape}")


def test_muon_lifts_singular_values_into_a_band():
    """From [0.05, 1] into [0.6818, 1.1343]; 0.001 reaches 0.4705. Computed from the polynomial in another program."""
    band = newton_schulz(np.linspace(0.05, 1, 100_001))
    assert band.min() == pytest.approx(0.6818, abs=1e-4) and band.max() == pytest.approx(1.1343, abs=1e-4)
    assert newton_schulz(np.array(1e-3)) == pytest.approx(0.4705, abs=1e-4)


# ---------------------------------------------------------------------------------------------------- Lion


def test_lion_follows_its_algorithm():
    """Chen et al. 2023, algorithm 2: the update is sign(b1 m + (1 - b1) g) + wd w, and m follows with b2."""
    rate, decay, (b1, b2) = 0.1, 0.3, (0.9, 0.5)
    optimizer = make_optimizer(
        plain("lion", learning_rate=rate, weight_decay=decay, betas=(b1, b2)), tiny_config(), steps=10
    )
    draw = np.random.default_rng(0)
    w, m = draw.standard_normal((5, 7)), np.zeros((5, 7))
    params = matrix(w)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(3):
        g = draw.standard_normal(w.shape)
        changes, state = update(matrix(g), state, params)
        expected = -rate * (np.sign(b1 * m + (1 - b1) * g) + decay * w)
        assert_close(changes["w"].value, expected, 1e-6)
        params, w, m = optax.apply_updates(params, changes), w + expected, b2 * m + (1 - b2) * g


# ---------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name, copies", [("adamw", 2), ("lion", 1), ("muon", 1), ("adafactor", 0)])
def test_optimizer_states_hold_this_many_copies_of_a_matrix(name, copies):
    """Adam keeps two averages, Lion and Muon one (Chen et al. 2023, sec. 3; Jordan et al. 2024). Adafactor keeps sums
    of rows and columns (Shazeer & Stern 2018, sec. 3)."""
    rows, columns = 256, 384
    shapes = jax.eval_shape(lambda: matrix(jnp.zeros((rows, columns))))
    state = jax.eval_shape(make_optimizer(plain(name), tiny_config(), steps=10).init, shapes)
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(state)]
    rest = sum(sizes) - copies * rows * columns
    assert rest < 10 if copies else rest == pytest.approx(rows + columns, abs=10)


# ---------------------------------------------------------------------------------------------------- schedules


def test_a_wsd_run_can_be_extended_from_any_step_before_its_decay():
    """Hu et al. 2024 (MiniCPM), sec. 4: the rates of a short and a long run are the same bits until the short one
    decays, so one stable run serves runs of all lengths. The rates of cosine differ right after the warm-up."""
    steps = np.arange(401)

    def rates(kind: str, total: int) -> np.ndarray:
        config = OptimizerConfig(learning_rate=0.3, schedule=kind, warmup_steps=20, decay_fraction=0.1)
        return np.asarray(schedule(config, total)(steps))

    short, long = rates("wsd", 220), rates("wsd", 420)
    decay = 220 - 20  # the last tenth of the 200 steps after the warm-up
    np.testing.assert_array_equal(short[: decay + 1], long[: decay + 1])
    assert (short[decay + 1 : 221] < long[decay + 1 : 221]).all() and long[380] == long[20] == np.float32(0.3)
    assert short[220] == pytest.approx(0.03, rel=1e-5)
    assert (rates("cosine", 220)[21:221] < rates("cosine", 420)[21:221]).all()
