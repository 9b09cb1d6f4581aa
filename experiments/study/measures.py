"""Measures: evaluations of a trial's trained weights beyond bits per byte on the held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from data.prepare import Prepared, prepare
from model.transformer import Transformer
from sharding.mesh import use_mesh
from train.config import Experiment
from train.config_io import replace_fields
from train.evaluate import evaluate
from train.program import Network, build_network


class Trained(NamedTuple):
    """What a measure looks at."""

    network: Network
    model: Transformer
    prepared: Prepared
    log: Callable[[str], None]


Measure = Callable[[Trained], Mapping[str, float]]  # returns figures by name


@dataclass(frozen=True)
class HeldOutUnder:
    """Bits per byte of the held-out text under changed fields, such as longer windows or a scaled RoPE.

    The weights stay as they are. The figure has the name of `name`.
    """

    name: str
    changes: Mapping[str, object]
    windows: int = 256

    def __call__(self, trained: Trained) -> Mapping[str, float]:
        experiment = replace_fields(trained.network.experiment, self.changes)
        return {self.name: held_out_bits(trained, experiment, self.windows)}


def held_out_bits(trained: Trained, experiment: Experiment, windows: int | None = None) -> float:
    """Return bits per byte of the first held-out set under `experiment`, with the trained weights."""
    network = build_network(experiment, trained.network.mesh)
    prepared = trained.prepared
    if experiment.data.sequence_length != prepared.sequence_length:
        prepared = prepare(experiment.data, trained.log)
    model = replace_config(trained.model, network.abstract_model)
    with use_mesh(network.mesh):
        found = evaluate(
            network.score, model, prepared, prepared.heldout_names[0], batch_size=experiment.data.batch_size,
            stride=experiment.train.eval_stride, max_windows=windows, mesh=network.mesh, spec=network.batch_spec,
        )  # fmt: skip
    return found.bits_per_byte


def replace_config(model: Transformer, like: Transformer) -> Transformer:
    """Return the weights of `model` in the network `like`, which differs in its config alone."""
    import jax

    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(model))
