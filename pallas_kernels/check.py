"""Check the kernels against the reference on this device: python -m pallas_kernels.check [OPERATION ...]

Runs every case of each operation's shapes.py with every implementation for the device, gradients included where the
operation has them. The reference runs on the same machine's CPU with float32 arithmetic. Prints each largest error,
relative to the largest entry, and exits with status 1 if one exceeds its bound. A CPU has no kernels, so there the
command compares the implementations in plain JAX.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import decode_attention, flash_attention, grouped_matmul
from pallas_kernels.decode_attention.shapes import CASES as DECODE_CASES
from pallas_kernels.flash_attention.shapes import CASES as FLASH_CASES
from pallas_kernels.grouped_matmul.shapes import CASES as GROUPED_CASES
from pallas_kernels.target import target

OPERATIONS = ("flash_attention", "decode_attention", "grouped_matmul")
# Errors relative to the largest entry. bfloat16 and float16 round weights and results; a float32 product may run as
# three passes of a narrower type.
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}


def flash(case, implementation: str) -> list[np.ndarray]:
    """Return the output, log-sum-exp and gradients of a case, in float32."""
    (q, k, v), kwargs = case.arguments()
    kwargs = {
        name: jax.tree.map(jnp.asarray, x) if isinstance(x, np.ndarray | tuple) else x for name, x in kwargs.items()
    }
    r = np.random.default_rng(1)
    dout = jnp.asarray(r.normal(size=(*q.shape[:3], v.shape[3])), jnp.float32)

    def loss(q, k, v):
        out, lse = flash_attention.flash_attention(q, k, v, **kwargs, implementation=implementation, return_lse=True)
        return (out.astype(jnp.float32) * dout).sum(), (out, jnp.where(lse < -1e29, 0.0, lse))

    gradients, results = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(
        *(jnp.asarray(x, case.dtype) for x in (q, k, v))
    )
    return [np.asarray(x, np.float32) for x in (*results, *gradients)]


def decode(case, implementation: str) -> list[np.ndarray]:
    """Return the output and log-sum-exp of a case, in float32."""
    splits = None if implementation == "reference" else case.splits
    choices = case.choices() | {"splits": splits, "implementation": implementation}
    run = jax.jit(lambda arrays: decode_attention.decode_attention(**arrays, **choices, return_lse=True))
    out, lse = run(case.arguments())
    return [np.asarray(out, np.float32), np.where(np.asarray(lse) < -1e29, 0.0, np.asarray(lse))]


def grouped(case, implementation: str) -> list[np.ndarray]:
    """Return the output and gradients of a case, in float32. Unless `implementation` is the reference, the input rows
    after the last group hold NaN, which must not spread."""
    arrays = case.arguments()
    dout = jnp.asarray(np.random.default_rng(1).normal(size=(case.M, case.N)), case.dtype)
    if implementation != "reference":
        after = sum(case.sizes)
        arrays["lhs"], dout = arrays["lhs"].at[after:].set(jnp.nan), dout.at[after:].set(jnp.nan)
    learned = {name: arrays.pop(name) for name in (("lhs",) if case.weights else ("lhs", "rhs"))}

    def both_ways(learned, arrays, dout):
        out, pull = jax.vjp(lambda learned: case.call(**learned, **arrays, implementation=implementation), learned)
        return out, *pull(dout)[0].values()

    return [np.asarray(x, np.float32) for x in jax.jit(both_ways)(learned, arrays, dout)]


def errors(operation: str) -> Iterator[tuple[str, str, float | str, float]]:
    """Yield (case, implementation, error or reason for a refusal, bound)."""
    platform, kind = target()
    run: Callable[[Any, str], list[np.ndarray]]
    cases: tuple[Any, ...]
    if operation == "flash_attention":
        run, cases, names = flash, FLASH_CASES, [*flash_attention.best_implementation(platform, kind)]
        names += ["hopper"] if "H100" in kind or "H200" in kind else []
    elif operation == "grouped_matmul":
        run, cases, names = grouped, GROUPED_CASES, [*grouped_matmul.best_implementation(platform, kind)]
    else:
        run, cases = decode, DECODE_CASES
        names = [name for name in decode_attention.best_implementation(platform) if name != "reference"]
    for case in cases:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            exact = run(case, "reference")
        for name in names:
            try:
                found = run(case, name)
            except ValueError as refusal:
                if not str(refusal).startswith("implementation ="):
                    raise  # a bug, not a refusal
                yield case.name, name, str(refusal), 0.0
                continue
            error = max(
                float(abs(x - y).max() / max(abs(y).max(), 1e-6)) if np.isfinite(x).all() else float("inf")
                for x, y in zip(found, exact, strict=True)
            )
            yield case.name, name, error, BOUNDS[case.dtype]


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.check", description=__doc__.splitlines()[0])
    parser.add_argument("operation", nargs="*", help=f"any of {', '.join(OPERATIONS)}; default: all")
    operations = parser.parse_args().operation or OPERATIONS
    for name in operations:
        if name not in OPERATIONS:
            parser.error(f"operation = {name!r}: unknown; use {' or '.join(OPERATIONS)}")
    wrong = compared = 0
    print(f"{target()[1]}, jax {jax.__version__}")
    for operation in operations:
        before = compared
        for case, name, error, bound in errors(operation):
            if isinstance(error, str):
                print(f"{operation:16} {case:28} {name:10} refused: {error}", flush=True)
                continue
            bad = not error <= bound
            wrong, compared = wrong + bad, compared + 1
            print(f"{operation:16} {case:28} {name:10} {error:.1e}{f'  above {bound:.0e}' if bad else ''}", flush=True)
        if compared == before:
            print(f"{operation}: no kernel for {target()[0]}, nothing compared")
    print(f"{wrong} of {compared} errors exceed their bound" if wrong else f"all {compared} within bounds")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
