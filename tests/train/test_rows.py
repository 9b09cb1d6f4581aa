"""Rows of metrics.jsonl are made on the host, without a device."""

from __future__ import annotations

import jax
import numpy as np

from train.objectives import ROUTER_METRICS
from train.rows import train_row


def test_a_row_is_made_without_a_device(monkeypatch):
    """An operation on the device would wait for the step that was just dispatched."""
    draw = np.random.default_rng(0)
    values = {
        name: np.asarray(0.5, np.float32)
        for name in ("loss", "learning_rate", "grad_norm", "loss_scale", *ROUTER_METRICS)
    }
    load = draw.random((2, 4)).astype(np.float32)
    values |= {"expert_load": load / load.sum(1, keepdims=True), "router_layers": draw.random((2, 5))}

    def refuse(*args, **kwargs):
        raise AssertionError("an operation ran on the device")

    monkeypatch.setattr("jax._src.dispatch.apply_primitive", refuse)
    monkeypatch.setattr("jax._src.interpreters.pxla.batched_device_put", refuse)
    with jax.transfer_guard("disallow_explicit"):
        row = train_row(3, values, 2.0, 1.0)
    load = np.asarray(values["expert_load"], np.float64)
    assert row["max_violation"] == (load.max(1) / load.mean(1) - 1).mean()
    assert row["step"] == 3 and row["clipped"] is False and row["expert_load"] == np.round(load, 4).tolist()
