"""Check that a checkpoint holds exactly the tensors its config requires, and report differences in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np

from interop.load import ModelFilesError, Source, TensorInfo
from interop.tensor_map import TensorEntry
from model.config import ModelConfig

ROWS = 20  # rows of the table that are shown
CANDIDATES = 500  # names that are searched for similar ones
FLOATS = ("float64", "float32", "float16", "bfloat16")
SLAB_ROWS = 1 << 12  # embedding rows compared at once

Shape = tuple[int, ...]


class Mismatch(NamedTuple):
    """Differences between the required tensors and those found."""

    missing: dict[str, Shape]
    unexpected: dict[str, Shape]
    misshaped: dict[str, tuple[Shape, Shape]]  # required, found
    undecoded: dict[str, str]  # name: dtype, which is not a floating-point type

    def __bool__(self) -> bool:
        return any(self)


def compare(tensor_map: list[TensorEntry], tensors: dict[str, TensorInfo], ignored: Callable[[str], bool]) -> Mismatch:
    """Compare required tensors with those found; `ignored(name)` is true for a tensor that the network doesn't need."""
    wanted = {entry.name: entry.shape for entry in tensor_map}
    return Mismatch(
        {n: shape for n, shape in wanted.items() if n not in tensors},
        {n: t.shape for n, t in tensors.items() if n not in wanted and not ignored(n)},
        {n: (s, tensors[n].shape) for n, s in wanted.items() if n in tensors and tensors[n].shape != s},
        {n: tensors[n].dtype for n in wanted if n in tensors and tensors[n].dtype not in FLOATS},
    )


def check(
    tensor_map: list[TensorEntry],
    source: Source,
    config: ModelConfig,
    head: str,
    ignored: Callable[[str], bool],
    where: str,
) -> None:
    """Raise ModelFilesError, with a table, unless the files hold exactly the tensors of `tensor_map` and their shapes.

    `head`: the name on disk of a separate output matrix. If the config ties the output to the embedding but the files
    hold this matrix anyway, it must equal the embedding. Only this comparison reads more than headers.
    """
    found = compare(tensor_map, source.tensors, ignored)
    embedding = next(entry for entry in tensor_map if entry.leaf == "embedding")
    if config.tied_embeddings and head in found.unexpected and embedding.name in source.tensors:
        if found.unexpected[head] == embedding.shape == source.tensors[embedding.name].shape:
            _check_equal(source, head, embedding.name, where)
            del found.unexpected[head]
    if found:
        raise ModelFilesError("\n".join([*_advice(found, embedding, config, head, where), *_table(found)]))


def head_name(tensor_map_of: Callable[[ModelConfig], list[TensorEntry]], config: ModelConfig) -> str:
    """Return a family's name on disk for a separate output matrix."""
    untied = tensor_map_of(replace(config, tied_embeddings=False))
    return next((entry.name for entry in untied if entry.leaf == "head"), "lm_head.weight")


def _check_equal(source: Source, head: str, embedding: str, where: str) -> None:
    one, other = source.read(head), source.read(embedding)
    for i in range(0, len(one), SLAB_ROWS):
        a, b = (x[i : i + SLAB_ROWS].astype(np.float32) for x in (one, other))
        rows = (a != b).any(axis=1)
        if rows.any():
            raise ModelFilesError(
                f"{where}: tie_word_embeddings is true, but {head} is not equal to {embedding} (the first difference "
                f"is in row {i + int(np.argmax(rows))}), so one of them would be lost. If the model was trained with a "
                f"separate output matrix, set tie_word_embeddings to false in config.json; otherwise remove {head} "
                "from the files"
            )
        source.release()


def _advice(found: Mismatch, embedding: TensorEntry, config: ModelConfig, head: str, where: str) -> list[str]:
    """Return the paragraph above the table: counts, and the cause if it is clear."""
    sizes = len(found.missing), len(found.unexpected), len(found.misshaped), len(found.undecoded)
    kinds = "missing", "unexpected", "of another shape", "not floating-point"
    counts = ", ".join(f"{size} {kind}" for kind, size in zip(kinds, sizes, strict=True) if size)
    lines = [f"{where}: the tensors do not match config.json: {counts}."]
    for name in (embedding.name, head):
        wanted, shape = found.misshaped.get(name, ((), ()))
        if wanted and len(shape) == len(wanted) and shape[1:] == wanted[1:]:
            lines.append(
                f"vocab_size is {config.vocab_size} in config.json, but {name} has {shape[0]} rows. Set vocab_size to "
                f"{shape[0]} if that is the tokenizer's size, or use the matching config.json."
            )
    if head in found.missing and not config.tied_embeddings:
        lines.append(
            f"{head} is missing, but config.json (or its default) has tie_word_embeddings = false. Set it to true if "
            f"the model uses {embedding.name} for its output; otherwise a file is incomplete."
        )
    if found.undecoded:
        name, dtype = next(iter(found.undecoded.items()))
        lines.append(
            f"{name} is {dtype}: quantized in a way that config.json does not describe. Use the model's bfloat16 files."
        )
    prefix = _common_prefix(found)
    if prefix:
        lines.append(
            f"The missing tensors exist with the prefix {prefix!r}: the model was saved as part of another. Rename "
            f"them."
        )
    return lines


def _common_prefix(found: Mismatch) -> str:
    """Return the prefix that every missing name has in the files, or ''."""
    name = next(iter(found.missing), None)
    if name is None:
        return ""
    for other in found.unexpected:
        prefix = other.removesuffix(name)
        if prefix != other and all(prefix + n in found.unexpected for n in found.missing):
            return prefix
    return ""


def _table(found: Mismatch) -> list[str]:
    rows = [
        ("missing", name, f"{list(shape)}", _similar_name(name, found.unexpected))
        for name, shape in found.missing.items()
    ]
    rows += [
        ("shape", n, f"{list(wanted)} required, {list(shape)} found", "")
        for n, (wanted, shape) in found.misshaped.items()
    ]
    rows += [("dtype", name, dtype, "") for name, dtype in found.undecoded.items()]
    rows += [("unexpected", name, f"{list(shape)}", "") for name, shape in found.unexpected.items()]
    if len(rows) > ROWS:  # show some of each kind
        kinds = dict.fromkeys(row[0] for row in rows)
        each = ROWS // len(kinds)
        shown = [row for kind in kinds for row in [r for r in rows if r[0] == kind][:each]]
        rows, left = shown, len(rows) - len(shown)
    else:
        left = 0
    width = max(len(row[1]) for row in rows)
    lines = [f"  {kind:10}  {name:{width}}  {what}{near}" for kind, name, what, near in rows]
    return [*lines, f"  ... and {left} more"] if left else lines


def _similar_name(name: str, others: dict[str, Shape]) -> str:
    near = get_close_matches(name, list(others)[:CANDIDATES], 1, 0.8)
    return f"  (found {near[0]})" if near else ""
