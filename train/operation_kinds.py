"""Kinds of XLA operations: from the text of a compiled program, from the category in a trace, or from a name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

KINDS = ("matmul", "custom call", "collective", "copy", "fusion", "control flow", "other", "idle")

# The first pattern that an opcode, a category or a name begins with, or contains, gives its kind.
_PATTERNS = (
    ("collective", r"all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective|^(send|recv)\b|nccl"),
    ("matmul", r"\bdots?\b|_dot\b|dot_|dot-|convolution|\bconv|gemm|matmul|\bmxu"),
    ("custom call", r"custom[- ]call|custom_call|pallas|mosaic|triton"),
    ("copy", r"^(input_|loop_|wrapped_)?(copy|transpose|bitcast|reshape|slice|dynamic[-_](update[-_])?slice|"
             r"concatenate|pad|broadcast)([-_. ]|$)|data formatting|memcpy|memset|^infeed|^outfeed"),
    ("fusion", r"fusion|^wrapped_|^loop_|^input_"),
    ("control flow", r"^(while|conditional|call|async|tuple)([-_. ]|$)"),
)  # fmt: skip
_COMPILED = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _PATTERNS)

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([\w\-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"calls=%?([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Instruction(NamedTuple):
    """What a compiled program says of an operation."""

    kind: str  # one of KINDS
    source: str  # path of the JAX operation that it computes, such as jit(step)/while/body/dot_general, or ""


def kind_of(text: str) -> str:
    """Return the kind of an operation from its name, its opcode, or the category that a trace gives it."""
    return next((kind for kind, pattern in _COMPILED if pattern.search(text)), "other")


def read_program(text: str) -> tuple[str, Mapping[str, Instruction]]:
    """Return (name of the module, its instructions by name) of a compiled program as HLO text.

    A fusion that contains a matrix product or a convolution is a "matmul", since those take its time.
    """
    name = text.partition("\n")[0].removeprefix("HloModule ").partition(",")[0].strip()
    found: dict[str, tuple[str, str, str]] = {}  # (opcode or kind, called computation, source) by name
    inside: dict[str, set[str]] = {}  # kinds by computation
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            kind = kind_of(match[2])
            if kind == "custom call" and (target := _TARGET.search(line)) and kind_of(target[1]) == "matmul":
                kind = "matmul"
            called, source = _CALLED.search(line), _SOURCE.search(line)
            found[match[1]] = (kind, called[1] if called else "", source[1] if source else "")
            inside.setdefault(computation, set()).add(kind)
    instructions = {}
    for each, (kind, called_name, source_name) in found.items():
        within = inside.get(called_name, set())
        if kind in ("fusion", "control flow"):
            kind = next((better for better in ("collective", "matmul", "custom call") if better in within), kind)
        instructions[each] = Instruction(kind, source_name)
    return name, instructions
