"""Map parts of tensors on disk to parts of weights by reshape, index and transpose alone.

One table therefore serves reading and writing, no value changes, and reading gives a view of the file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from model.config import ModelConfig, scan_groups

Index = tuple[int | slice, ...]
ALL = slice(None)


class TensorEntry(NamedTuple):
    """One entry of the map: tensor.reshape(split)[take].transpose(order) == weight[at]."""

    name: str  # name of the tensor on disk
    shape: tuple[int, ...]  # shape of the tensor on disk
    leaf: str  # path of the weight in the Transformer: 'stacks/0/0/attention/q'
    at: Index = ()  # index into the weight: a layer of its stack, one of its gates
    split: tuple[int, ...] | None = None  # shape that the tensor is reshaped to; None: unchanged
    take: Index = ()  # index into the reshaped tensor
    order: tuple[int, ...] | None = None  # permutation of the indexed part's axes; None: unchanged

    def part(self, tensor: np.ndarray) -> np.ndarray:
        """Return this part of the tensor in the weight's layout, as a view."""
        reshaped = tensor.reshape(self.split or self.shape)[self.take]
        return reshaped if self.order is None else reshaped.transpose(self.order)


def layer_stacks(config: ModelConfig) -> list[tuple[str, int]]:
    """Return, for each layer in order, the path of the Block that holds it and its index in that stack."""
    found = []
    for s, group in enumerate(scan_groups(config)):
        for r in range(group.repeats):
            found += [(f"stacks/{s}/{u}", r) for u in range(len(group.pattern))]
    return found


class Layer(NamedTuple):
    """A factory for the entries of one layer."""

    theirs: str  # prefix of tensor names on disk: 'model.layers.3.'
    ours: str  # prefix of weight paths: 'stacks/0/0/'
    repeat: int  # index in its stack

    def vector(self, name: str, leaf: str, shape: tuple[int, ...], at: Index = ()) -> TensorEntry:
        """Return the entry of a vector on disk (a norm's scale, a bias); the weight has shape [*shape]."""
        size = int(np.prod(shape))
        return TensorEntry(self.theirs + name, (size,), self.ours + leaf, (self.repeat, *at), split=shape)

    def linear(
        self, name: str, leaf: str, outputs: tuple[int, ...], inputs: tuple[int, ...], at: Index = ()
    ) -> TensorEntry:
        """Return the entry of a PyTorch Linear [outputs, inputs]; the weight has shape [*inputs, *outputs].

        `at`: index after that of the layer.
        """
        shape = int(np.prod(outputs)), int(np.prod(inputs))
        order = (*range(len(outputs), len(outputs) + len(inputs)), *range(len(outputs)))
        return TensorEntry(
            self.theirs + name, shape, self.ours + leaf, (self.repeat, *at), split=(*outputs, *inputs), order=order
        )


def layers(config: ModelConfig, prefix: str) -> list[Layer]:
    """Return the layers in order; layer i has the prefix '{prefix}{i}.' on disk."""
    return [Layer(f"{prefix}{i}.", f"{path}/", r) for i, (path, r) in enumerate(layer_stacks(config))]
