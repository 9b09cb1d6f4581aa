"""Shape and type checks during tests: jaxtyping's import hook with beartype as the type checker.

The hook rewrites modules while they are imported, so call `install` before any import of this project. It checks
arguments and results against their annotations: `Float[Array, "B T D"]` is a float array of three dimensions, and B has
one value throughout a signature.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, get_args, runtime_checkable

import jaxtyping
from beartype import BeartypeConf, FrozenDict, beartype
from jaxtyping import install_import_hook

ROOMS = ("sharding", "pallas_kernels", "data", "interop", "compression", "decode", "model", "train", "experiments")
ROOT = Path(__file__).resolve().parent.parent

# An int passes for a float, as in mypy. beartype knows `Self` in checked classes only, and the hook checks functions.
CONF = BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({Self: Any}))


def check(function):
    """Return `function` with its arguments and result checked. Constructors are left out, because transformations
    replace the arrays of pytree dataclasses with shapes, shardings or axes."""
    if function.__name__ == "__init__":
        return function
    for hint in function.__annotations__.values():
        _allow_isinstance(hint)
    return beartype(function, conf=CONF)


def _allow_isinstance(hint) -> None:
    """Let beartype check whether a value has the methods of the protocols in `hint`."""
    if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
        runtime_checkable(hint)
    for part in get_args(hint):
        _allow_isinstance(part)


def modules() -> list[str]:
    """Return the names of the modules to check. Configs are left out: their `validate` refuses wrong values, and tests
    pass such values on purpose."""
    names = []
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "config" in path.stem or parts[1:] == ("__init__",):
            continue
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def install() -> None:
    """Check every module of ROOMS that is imported after this call."""
    install_import_hook(modules(), f"{__name__}.check")


@contextmanager
def unchecked():
    """Disable the checks, for values that annotations exclude and that the project's own errors must catch."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
