"""Which part of which tensor on disk is which part of which weight: reshape, index, transpose, nothing else.

So that one table serves both directions, no number is changed on the way, and what is read is a view of the file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.config import ModelConfig, segments

Index = tuple[int | slice, ...]
ALL = slice(None)


class Piece(NamedTuple):
    """tensor.reshape(split)[take].transpose(order) is weight[at]."""

    name: str  # of the tensor on disk
    shape: tuple[int, ...]  # of the tensor on disk
    leaf: str  # path of the weight in the Transformer: 'stacks/0/0/attention/q'
    at: Index = ()  # part of the weight: a layer of its stack, one of its gates
    split: tuple[int, ...] | None = None  # dimensions that the tensor is seen with; None: its own
    take: Index = ()  # part of the tensor, so seen
    order: tuple[int, ...] | None = None  # axes of that part in the weight's order; None: as they are

    def part(self, tensor: np.ndarray) -> np.ndarray:
        """The part of the tensor, as the weight has it: a view."""
        seen = tensor.reshape(self.split or self.shape)[self.take]
        return seen if self.order is None else seen.transpose(self.order)


def layer_stacks(config: ModelConfig) -> list[tuple[str, int]]:
    """Of each layer, first to last: the path of the Block that holds it and its index in that stack."""
    found = []
    for s, segment in enumerate(segments(config)):
        for r in range(segment.repeats):
            found += [(f"stacks/{s}/{u}", r) for u in range(len(segment.unit))]
    return found


class Layer(NamedTuple):
    """Writes the pieces of one layer: names below `theirs`, paths below `ours`."""

    theirs: str  # 'model.layers.3.'
    ours: str  # 'stacks/0/0/'
    repeat: int  # in its stack

    def vector(self, name: str, leaf: str, shape: tuple[int, ...], at: Index = ()) -> Piece:
        """A vector on disk (a norm's scale, a bias) that is [*shape] of ours."""
        size = int(np.prod(shape))
        return Piece(self.theirs + name, (size,), self.ours + leaf, (self.repeat, *at), split=shape)

    def linear(self, name: str, leaf: str, outputs: tuple[int, ...], inputs: tuple[int, ...], at: Index = ()) -> Piece:
        """A PyTorch Linear [outputs, inputs] that is [*inputs, *outputs] of ours. `at`: behind the index of the
        layer."""
        shape = int(np.prod(outputs)), int(np.prod(inputs))
        order = (*range(len(outputs), len(outputs) + len(inputs)), *range(len(outputs)))
        return Piece(
            self.theirs + name, shape, self.ours + leaf, (self.repeat, *at), split=(*outputs, *inputs), order=order
        )


def layers(config: ModelConfig, prefix: str) -> list[Layer]:
    """The layers from first to last, named '{prefix}{i}.' on disk."""
    return [Layer(f"{prefix}{i}.", f"{path}/", r) for i, (path, r) in enumerate(layer_stacks(config))]
