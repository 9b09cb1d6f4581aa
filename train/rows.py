"""Rows of metrics.jsonl for train steps, made from NumPy metrics without using a device."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import jax
import numpy as np

from data.pipeline import mixture
from data.prepare import Prepared
from model.cost import CONVENTION, count_parameters, train_flops_per_token
from sharding.peak import peak_flops
from train.config import Experiment
from train.evaluate import max_violation
from train.objectives import ROUTER_METRICS

CLOCK_STEPS = 10  # over which rates are averaged


class Clock:
    """Tokens per second and MFU over the last CLOCK_STEPS steps, without pauses.

    Rates are averaged because the time between two reads means nothing on a backend that runs a step during its
    dispatch: two steps may then be read at once.
    """

    def __init__(self, flops_per_token: float, peak: float | None):
        self._flops, self._peak = flops_per_token, peak
        self._reads: deque[tuple[int, float]] = deque(maxlen=CLOCK_STEPS + 1)

    def pause(self) -> None:
        """Do not count the time until the next step."""
        self._reads.clear()

    def rates(self, step: int, tokens: float) -> dict[str, float | None]:
        """Return the rates after `step`, of `tokens` tokens, was read. They are empty after the first step."""
        self._reads.append((step, time.monotonic()))
        (first, began), (last, now) = self._reads[0], self._reads[-1]
        if last == first or now <= began:
            return {}
        rate = tokens * (last - first) / (now - began)
        return {"tokens_per_second": rate, "mfu": self.mfu(rate)}

    def mfu(self, tokens_per_second: float) -> float | None:
        """Return the MFU at this rate, or None where the peak is unknown."""
        return tokens_per_second * self._flops / self._peak if self._peak else None


class Rows:
    """Makes the row of each train step. Holds the parameter counts, FLOPs per token and MFU convention of a run."""

    def __init__(self, experiment: Experiment, prepared: Prepared):
        self.counts = count_parameters(experiment.model)
        self.flops_per_token = train_flops_per_token(experiment.model, experiment.data.sequence_length)
        peak, source = peak_flops(jax.local_devices()[0])
        devices = jax.device_count()
        many = devices > 1 and jax.default_backend() != "cpu"  # a CPU's peak already covers the whole machine
        self.convention = f"FLOPs {CONVENTION}; of the {source}" + (f" on {devices} devices" if many else "")
        if experiment.train.trainable_layers is not None:
            peak = None  # the convention counts a backward pass through every layer
        self.peak_known = peak is not None
        self.clock = Clock(self.flops_per_token, None if peak is None else peak * devices)
        shares = [(share, prepared.counts(name)) for name, share in mixture(prepared, experiment.data).items()]
        self._bytes_per_token = sum(share * counts.train_bytes / counts.train_tokens for share, counts in shares)
        self._clip = experiment.optimizer.clip_norm

    def row(self, step: int, values: dict[str, np.ndarray]) -> dict[str, Any]:
        """Return the row of a step from its metrics as NumPy arrays and scalars."""
        row = train_row(step, values, self._bytes_per_token, self._clip)
        return row | self.clock.rates(step, float(values["tokens"]))


def train_row(step: int, values: dict[str, np.ndarray], bytes_per_token: float, clip: float | None) -> dict[str, Any]:
    """Return the row of a train step without its rates."""
    loss = float(values["loss"])
    row: dict[str, Any] = {
        "kind": "train", "step": step, "loss": loss, "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "learning_rate": float(values["learning_rate"]), "grad_norm": float(values["grad_norm"]),
    }  # fmt: skip
    if "distillation_loss" in values:
        row["distillation_loss"] = float(values["distillation_loss"])
    if clip is not None:
        row["clipped"] = bool(row["grad_norm"] > clip)
    if values["loss_scale"] != 1.0:
        row["loss_scale"] = float(values["loss_scale"])
    if "expert_load" in values:
        load_LE = np.asarray(values["expert_load"], np.float64)
        row |= {name: float(values[name]) for name in ROUTER_METRICS}
        row["max_violation"] = float(max_violation(load_LE).mean())
        row["expert_load"] = np.round(load_LE, 4).tolist()
        layers_LM = np.asarray(values["router_layers"], np.float64)  # the same metrics for each layer
        row["router_layers"] = {
            name: [float(f"{x:.4g}") for x in layers_LM[:, i]] for i, name in enumerate(ROUTER_METRICS)
        }
    return row
