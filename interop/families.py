"""The families, and which one a config.json or a ModelConfig belongs to."""

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

# A family is a module: ARCHITECTURES (of config.json), IGNORED (patterns of tensors that are not needed),
# to_config(keys), to_json(config), pieces(config); where a config is needed to tell, ignored(config, name); where
# transformers has tensors without elements, empty(config) -> {name: shape}; where releases name tensors in more than
# one way, rename(names) -> {on disk: in pieces}. A config is written by the first that can say all of it.
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
    """Architectures of config.json that can be read."""
    return sorted(name for family in FAMILIES.values() for name in family.ARCHITECTURES)


def family_of(values: dict[str, Any], where: str = "config.json") -> tuple[str, ModelConfig, list[str]]:
    """(family, config, keys of config.json that nothing read) of a parsed config.json. Raises UnsupportedModelError."""
    named = values.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    if not named:
        raise UnsupportedModelError(
            f'{where}: architectures is missing; add it, as "architectures": ["LlamaForCausalLM"]; there are '
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
                raise UnsupportedModelError(f"{where}: gives a network that cannot be built: {error}") from None
            return name, config, keys.left()
    raise UnsupportedModelError(f"{where}: architectures = {named}: not supported; there are {', '.join(supported())}")


def to_json(config: ModelConfig, family: str | None = None) -> tuple[str, dict[str, Any]]:
    """(family, config.json) of a config: read back it must be the same network. Raises UnsupportedModelError, which
    names the fields that the family (None: the one that comes nearest) cannot say."""
    if family is not None and family not in FAMILIES:
        raise UnsupportedModelError(f"family {family!r} is unknown; there are {', '.join(FAMILIES)}")
    nearest: tuple[bool, int, str, list[str]] | None = None  # refused outright, fields lost, family, which
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
        f"{'any published family; nearest is ' if family is None else ''}{nearest[2]}, which cannot say: "
        + "; ".join(nearest[3][:8])
    )


def ignored(family: str, name: str, config: ModelConfig) -> bool:
    """Whether a tensor on disk is known to say nothing of this network."""
    module = FAMILIES[family]
    more = getattr(module, "ignored", None)  # where it takes the config to tell
    return any(re.fullmatch(pattern, name) for pattern in module.IGNORED) or (more is not None and more(config, name))
