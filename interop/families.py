"""Supported model families, and how to find the family of a config.json or a ModelConfig."""

from __future__ import annotations

import re
from types import ModuleType
from typing import Any

from interop import (
    deepseek_v3,
    gemma2,
    gemma3,
    gpt2,
    gpt_oss,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    qwen2,
    qwen3,
    qwen3_moe,
)
from interop.translate import Keys, UnsupportedModelError, architecture, differences
from model.config import ModelConfig

# A family is a module with ARCHITECTURES (in config.json), IGNORED (name patterns of tensors that are not needed),
# to_config(keys), to_json(config) and tensor_map(config). Optional: ignored(config, name), if the pattern is not
# enough; empty(config) -> {name: shape}, if transformers expects tensors without elements; rename(names) -> {name on
# disk: name in the tensor map}, if releases differ in names. The first family that can express every field of a
# config writes it.
FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "olmo2": olmo2,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
}  # fmt: skip


def supported() -> list[str]:
    """Return the supported values of `architectures` in config.json."""
    return sorted(name for family in FAMILIES.values() for name in family.ARCHITECTURES)


def family_of(values: dict[str, Any], where: str = "config.json") -> tuple[str, ModelConfig, list[str]]:
    """Return (family, config, unused keys) of a parsed config.json. Raises UnsupportedModelError."""
    named = values.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    if not named:
        raise UnsupportedModelError(
            f'{where}: architectures is missing. Add it, for example "architectures": ["LlamaForCausalLM"]. Supported: '
            f"{', '.join(supported())}"
        )
    for name, family in FAMILIES.items():
        if any(architecture in family.ARCHITECTURES for architecture in named):
            keys = Keys(values, where)
            config = family.to_config(keys)
            keys.ordinary()
            try:
                config.validate()
            except ValueError as error:
                raise UnsupportedModelError(f"{where}: describes a network that cannot be built: {error}") from None
            return name, config, keys.left()
    raise UnsupportedModelError(f"{where}: architectures = {named}: not supported. Supported: {', '.join(supported())}")


def to_json(config: ModelConfig, family: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return (family, config.json) for a config; reading it back must give the same network.

    Raises UnsupportedModelError with the fields that `family` (None: the closest one) cannot express.
    """
    if family is not None and family not in FAMILIES:
        raise UnsupportedModelError(f"family = {family!r}: unknown. Supported: {', '.join(FAMILIES)}")
    nearest: tuple[bool, int, str, list[str]] | None = None  # refused outright, number of lost fields, family, fields
    for name in FAMILIES if family is None else (family,):
        try:
            values = FAMILIES[name].to_json(config)
            lost, refused = (
                differences(architecture(config), architecture(FAMILIES[name].to_config(Keys(values)))),
                False,
            )
        except UnsupportedModelError as error:
            lost, refused = [str(error)], True
        if not lost:
            return name, values
        nearest = min(nearest or (True, len(lost), name, lost), (refused, len(lost), name, lost))
    assert nearest is not None
    raise UnsupportedModelError(
        f"the network cannot be written as "
        f"{'any published family; the closest is ' if family is None else ''}{nearest[2]}, which cannot express: "
        + "; ".join(nearest[3][:8])
    )


def ignored(family: str, name: str, config: ModelConfig) -> bool:
    """Return whether the network does not need this tensor on disk."""
    module = FAMILIES[family]
    more = getattr(module, "ignored", None)  # a check that needs the config
    return any(re.fullmatch(pattern, name) for pattern in module.IGNORED) or (more is not None and more(config, name))
