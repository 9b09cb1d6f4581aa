"""Frozen weights of a run, which are never updated: layers of the network, or a second network in the loss.

They are written once, to RUN/frozen. Every checkpoint holds their digest and is restored together with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath

from model.config import scan_groups
from model.transformer import Transformer, split_layers, unstack, with_stacks
from model.weights import Weight, merge, repeats, split
from train.checkpoint import Checkpointer, CheckpointError
from train.checkpoint_reader import all_agree, process_zero
from train.leaves import checksums, named_leaves, to_storable


class Frozen(NamedTuple):
    """Weights that a step reads and never changes. They have no gradients, moments or averages."""

    model: Transformer | None = None  # the rest of the network, with None where a weight is trained
    teacher: Transformer | None = None  # the network whose predictions are distilled


def network(trainable: Transformer, frozen: Frozen | None) -> Transformer:
    """Return the whole network from its trainable part and its frozen rest."""
    return trainable if frozen is None or frozen.model is None else merge(trainable, frozen.model)


def train_last(model: Transformer, layers: int | None) -> tuple[Transformer, Frozen | None]:
    """Return (the last `layers` layers with the final norm and the head, the rest). None: everything is trained.

    The stacks are split so that each array belongs to one side. An embedding that is also the head stays frozen,
    because training it would require the gradient through every layer.
    """
    if layers is None:
        return model, None
    model = split_layers(model, layers)
    below, first = model.config.num_layers - layers, 0
    while below > 0:
        unit = model.stacks[first]
        below, first = below - len(unit) * repeats(unit), first + 1

    def trained(path: str, weight: Weight, part: str) -> bool:
        top, *inside = path.split(".")
        return int(inside[0]) >= first if top == "stacks" else top in ("final_norm", "head")

    trainable, rest = split(model, trained)
    return trainable, Frozen(model=rest)


def rejoin(model: Transformer) -> Transformer:
    """Return a network whose stacks `train_last` split with the stacks that its config defines."""
    layers = [pattern[0] for pattern in unstack(model).stacks]
    stacks, first = [], 0
    for group in scan_groups(model.config):
        period, last = len(group.pattern), first + len(group.pattern) * group.repeats
        blocks_of = (layers[first + i : last : period] for i in range(period))
        stacks.append([jax.tree.map(lambda *parts: jnp.concatenate(parts), *blocks) for blocks in blocks_of])
        first = last
    return with_stacks(model, stacks)


def digest(frozen: Frozen) -> str:
    """Return a hash of the names and all bits of the frozen weights. It is the same on every mesh."""
    sums = checksums({name: to_storable(leaf) for name, leaf in named_leaves(frozen).items()})
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:16]


def keep_frozen(folder: epath.PathLike, frozen: Frozen, log: Callable[[str], None]) -> str:
    """Write the frozen weights of a new run, and return their digest.

    Weights from an earlier start stay if they are the same. Otherwise they are set aside, because no checkpoint refers
    to them. Raises CheckpointError if the weights cannot be written.
    """
    name = digest(frozen)
    if epath.Path(folder).exists():
        if _holds(folder, frozen, name, log):
            return name
        if process_zero():
            aside = epath.Path(folder).with_name(f"{epath.Path(folder).name}.{secrets.token_hex(4)}")
            epath.Path(folder).rename(aside)
            log(f"{folder} held different frozen weights from an earlier start; they are now in {aside.name}")
        all_agree(True)  # wait until the folder is free for every process
    with Checkpointer(folder, keep_last=1, log=log) as checkpoints:
        if not checkpoints.save(0, frozen, metadata={"digest": name}, wait=True):
            raise CheckpointError(f"{folder}: the frozen weights were not written; free the disk and start again")
        checkpoints.verify(0, frozen)
    return name


def _holds(folder: epath.PathLike, frozen: Frozen, name: str, log: Callable[[str], None]) -> bool:
    """Return whether a folder holds these weights, whose digest is `name`, intact."""
    with Checkpointer(folder, read_only=True, log=log) as checkpoints, contextlib.suppress(CheckpointError):
        restored = checkpoints.restore({}, part=True)
        if restored is not None and restored.metadata["digest"] == name:
            checkpoints.verify(restored.step, frozen)
            return True
    return False


def read_frozen(folder: epath.PathLike, template: Any, expected: str, log: Callable[[str], None]) -> Any:
    """Return the frozen weights of a run, sharded like `template`.

    Raises CheckpointError if they are missing or if their digest is not `expected`, the one in the run's checkpoints.
    """
    if not epath.Path(folder).is_dir():
        raise CheckpointError(f"{folder} is missing: it holds the run's frozen weights; copy it with the run")
    with Checkpointer(folder, read_only=True, log=log) as checkpoints:
        restored = checkpoints.restore(template, part=True)
    if restored is None:
        raise CheckpointError(f"{folder} is empty: it must hold the run's frozen weights; copy it with the run")
    if restored.metadata["digest"] != expected:
        raise CheckpointError(_changed(folder, restored.metadata["digest"], expected))
    return restored.state


def _changed(folder: epath.PathLike, found: str, expected: str) -> str:
    return (
        f"{folder}: the frozen weights changed (their digest is {found}, the run expects {expected}); restore the "
        "folder, or start a new run with --run NEWNAME"
    )
