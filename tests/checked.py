"""Checks of shapes and types while tests run: jaxtyping's import hook with beartype as the type checker.

The hook rewrites modules as they are imported, so that `install` runs before any of ours is. Arguments and
results of the rooms' functions are checked as annotated: `Float[Array, "B T D"]` is a float array of three dimensions,
and B is the same number wherever it occurs in one signature.
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
    """Return `function` with its arguments and its result checked. Constructors are left out: in a dataclass that is a
    pytree, transformations put shapes, shardings or axes where an array was."""
    if function.__name__ == "__init__":
        return function
    for hint in function.__annotations__.values():
        _allow_isinstance(hint)
    return beartype(function, conf=CONF)


def _allow_isinstance(hint) -> None:
    """Let beartype ask whether a value has the methods of the protocols in `hint`."""
    if isinstance(hint, type) and getattr(hint, "_is_protocol", False):
        runtime_checkable(hint)
    for part in get_args(hint):
        _allow_isinstance(part)


def modules() -> list[str]:
    """Return the checked modules. Configs are left out: `validate` refuses what users write there, and tests write
    wrong values on purpose."""
    names = []
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "config" in path.stem or parts[1:] == ("__init__",):
            continue
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def install() -> None:
    """Check every module of ROOMS that is imported from now on."""
    install_import_hook(modules(), f"{__name__}.check")


@contextmanager
def unchecked():
    """Switch the checks off, for values that annotations exclude and that must end in an error of ours."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
