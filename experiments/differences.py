"""How a config differs from the defaults, and how a value is written on a command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from train.config import Experiment
from train.config_io import ABSENT, ConfigError, diff, flatten, from_dict, to_dict


class Difference(NamedTuple):
    value: Any
    default: Any  # ABSENT where there is none


def differing(config: Any, default: Any = None, prefix: str = "") -> dict[str, Difference]:
    """Return by dotted name each field of a config that differs from `default` (None: its class without arguments). A
    part that the default lacks is compared with its own class's defaults, and named alone where it equals them."""
    found: dict[str, Difference] = {}
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{prefix}{field.name}"
        usual = getattr(default, field.name) if default is not None else _default_of(field)
        if dataclasses.is_dataclass(value):
            below = usual if dataclasses.is_dataclass(usual) else None
            found |= differing(value, below, f"{name}.") or ({} if value == usual else {name: Difference(value, usual)})
        elif value != usual:
            usuals = flatten(usual, name)
            leaves = {each: Difference(leaf, usuals.get(each, ABSENT)) for each, leaf in flatten(value, name).items()}
            changed = {each: leaf for each, leaf in leaves.items() if leaf.value != leaf.default}
            found |= changed or {name: Difference(value, usual)}  # fewer elements, each as in the default
    return found


def _default_of(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ABSENT if field.default is dataclasses.MISSING else field.default


def differing_json(config: Mapping[str, Any]) -> dict[str, Difference]:
    """Return `differing` of an experiment's JSON. JSON that this code cannot read, such as that of an older run, is
    compared name by name, and names that it lacks are left out."""
    try:
        return differing(from_dict(Experiment, {"name": "", **config}))
    except ConfigError:
        defaults = to_dict(Experiment(name=""))
        return {name: Difference(value, usual) for name, usual, value in diff(defaults, config) if value is not ABSENT}


def written(value: Any) -> str:
    """Return a value as `--set` takes it: none, true, 0.9,0.95. A whole part of a config is named by its class."""
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__} with its defaults"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(written, value)) or "()"
    return str(value) if value != "" else '""'
