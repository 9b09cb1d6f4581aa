"""config.json of a published model to ModelConfig and back: what all families share.

Both spellings are read: `rope_theta` and `rope_scaling` of older files, `rope_parameters` of transformers 5.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from model.config import (
    AttentionConfig,
    InitConfig,
    MLPConfig,
    ModelConfig,
    PositionConfig,
    RopeScalingConfig,
    layer_specs,
)
from model.moe_config import MoEConfig

# Of config.json: what says nothing of the function that the network computes.
IRRELEVANT = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "cache_implementation", "dtype", "eos_token_id", "head_dim",
    "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "tie_encoder_decoder",
    "tokenizer_class", "torch_dtype", "transformers_version", "unsloth_fixed", "use_cache", "chunk_size_feed_forward",
    "add_cross_attention", "attention_dropout", "hidden_dropout", "router_jitter_noise", "output_router_logits", "quantization_config",
}  # fmt: skip


class UnsupportedModelError(ValueError):
    """A published model that the Transformer or this reader cannot express; the message names key, value and what can be."""


class Keys:
    """config.json, read key by key; remembers which were, so that those left over can be told."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where, self._read = values, where, set()

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def take(self, key: str, *default: Any) -> Any:
        """The value; where it is missing or null, the default, or UnsupportedModelError if there is none."""
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            if not default:
                raise UnsupportedModelError(f"{self.where}: {key} is missing; it is needed to build the model")
            return default[0]
        return value

    def must(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value, which must be one of `allowed` (a missing one is `default`). Raises UnsupportedModelError."""
        value = self.take(key, default)
        if value not in allowed:
            raise UnsupportedModelError(
                f"{self.where}: {key} = {value!r} cannot be expressed; supported: {', '.join(map(repr, allowed))}"
            )
        return value

    def left(self) -> list[str]:
        """Keys that nothing read and that may mean something, in order."""
        return sorted(k for k, v in self.values.items() if k not in self._read | IRRELEVANT and v is not None)


def rope(keys: Keys, default_theta: float = 10_000.0, layer_type: str | None = None) -> tuple[float, RopeScalingConfig | None]:
    """Base and scaling of RoPE. `layer_type`: where transformers 5 keeps parameters for each kind of layer."""
    parameters = keys.take("rope_parameters", None)
    theta, scaling = keys.take("rope_theta", default_theta), keys.take("rope_scaling", None)
    if parameters is not None:
        if layer_type is not None and layer_type in parameters:
            parameters = parameters[layer_type] or {}
        theta, scaling = parameters.get("rope_theta", theta), parameters
    original = keys.take("original_max_position_embeddings", keys.take("max_position_embeddings", 2048))
    return float(theta), rope_scaling(keys.where, scaling, original)


def rope_scaling(where: str, values: dict[str, Any] | None, max_length: int) -> RopeScalingConfig | None:
    """`rope_scaling` of config.json. Raises UnsupportedModelError for a kind that is not here."""
    values = values or {}
    kind = values.get("rope_type", values.get("type", "default"))
    original = int(values.get("original_max_position_embeddings") or max_length)
    if kind in ("default", "mrope"):
        return None
    if kind == "linear":
        return RopeScalingConfig("linear", float(values["factor"]), original)
    if kind == "dynamic":
        return RopeScalingConfig("dynamic_ntk", float(values["factor"]), original)
    if kind == "llama3":
        return RopeScalingConfig(
            "llama3", float(values["factor"]), original, beta_fast=float(values["high_freq_factor"]),
            beta_slow=float(values["low_freq_factor"]),
        )  # fmt: skip
    if kind == "yarn":
        factor = float(values["factor"])
        return RopeScalingConfig(
            "yarn", factor, original, beta_fast=float(values.get("beta_fast") or 32), beta_slow=float(values.get("beta_slow") or 1),
            truncate=bool(values.get("truncate", True)), attention_factor=_yarn_attention_factor(factor, values),
        )  # fmt: skip
    raise UnsupportedModelError(f"{where}: RoPE of type {kind!r} is not supported; there are default, linear, dynamic, llama3, yarn")


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies attention by for a stretch of `factor` (Peng et al. 2023, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(factor: float, values: dict[str, Any]) -> float | None:
    if values.get("attention_factor") is not None:
        return float(values["attention_factor"])
    if values.get("mscale") and values.get("mscale_all_dim"):  # DeepSeek
        return yarn_mscale(factor, values["mscale"]) / yarn_mscale(factor, values["mscale_all_dim"])
    return None


def rope_json(config: ModelConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every version of transformers reads."""
    theta, s = config.position.theta, config.position.scaling
    if s is None:
        return {"rope_theta": theta, "rope_scaling": None}
    kind = {"dynamic_ntk": "dynamic"}.get(s.kind, s.kind)
    scaling = {"rope_type": kind, "factor": s.factor, "original_max_position_embeddings": s.original_length}
    if s.kind == "llama3":
        scaling |= {"high_freq_factor": s.fast, "low_freq_factor": s.beta_slow}
    if s.kind == "yarn":
        scaling |= {"beta_fast": s.fast, "beta_slow": s.beta_slow, "truncate": s.truncate, "attention_factor": s.attention_factor}
    return {"rope_theta": theta, "rope_scaling": scaling}


def pattern(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest run of layers that, repeated, gives `kinds`."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return tuple(kinds)


def attention_layers(keys: Keys, num_layers: int) -> tuple[str, ...] | None:
    """`layer_types` as a pattern of ours; None where there is none."""
    types = keys.take("layer_types", None)
    if types is None:
        return None
    names = {"full_attention": "global", "sliding_attention": "sliding"}
    unknown = sorted(set(types) - set(names))
    if unknown or len(types) != num_layers:
        raise UnsupportedModelError(
            f"{keys.where}: layer_types has {len(types)} entries for {num_layers} layers" + (f", and {unknown[0]!r} is not supported" if unknown else "")
        )
    return pattern([names[t] for t in types])


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types` of config.json."""
    names = {"global": "full_attention", "sliding": "sliding_attention"}
    return [names[spec.attention] for spec in layer_specs(config)]


def architecture(config: ModelConfig) -> ModelConfig:
    """The config with all that does not change what the trained network computes set to its default: two that are equal so
    are the same function of the same weights."""
    a, p, m = config.attention, config.position, config.moe
    d = AttentionConfig()
    layers = pattern([spec.attention for spec in layer_specs(config)])
    a = replace(a, layers=layers, implementation=d.implementation, context=d.context)
    if "sliding" not in layers:
        a, p = replace(a, window=d.window), replace(p, local_theta=None)
    if "block_sparse" not in layers:
        a = replace(a, blocks=d.blocks)
    if a.query_scale is not None and math.isclose(a.query_scale, a.head_dim**-0.5):
        a = replace(a, query_scale=None)
    if p.kind != "rope":
        p = PositionConfig(kind=p.kind)
    if p.scaling is not None:
        s = p.scaling
        factor = None
        if s.kind == "yarn":
            factor = s.attention_factor or yarn_mscale(s.factor)
        fast, slow = (s.fast, s.beta_slow) if s.kind in ("yarn", "llama3") else (None, 1.0)
        p = replace(p, scaling=replace(s, beta_fast=fast, beta_slow=slow, attention_factor=factor))
    mlp = config.mlp
    if m is not None:
        kinds = pattern(["moe" if spec.moe else "dense" for spec in layer_specs(config)])
        e = MoEConfig()
        same = ("router_dtype", "load_balance", "balance_scope", "z_loss", "dispatch", "exchange", "jitter", "router_dropout")
        m = replace(m, layers=kinds, **{name: getattr(e, name) for name in same})
        if m.bias_rate is not None:
            m = replace(m, bias_rate=0.0)
        if "dense" not in kinds:
            mlp = replace(mlp, hidden_dim=MLPConfig().hidden_dim)
    plain = ModelConfig()
    return replace(
        config, attention=a, position=p, mlp=mlp, moe=m, init=InitConfig(), dropout=0.0, dtype=plain.dtype, remat=plain.remat,
        remat_names=plain.remat_names, scan_unroll=plain.scan_unroll,
    )  # fmt: skip


def differences(one: Any, other: Any, path: str = "model") -> list[str]:
    """Dotted fields in which two configs differ, with both values."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        fields = (f.name for f in dataclasses.fields(one))
        return [line for name in fields for line in differences(getattr(one, name), getattr(other, name), f"{path}.{name}")]
    same = math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) and isinstance(other, float) else one == other
    return [] if same else [f"{path} = {one!r} (there {other!r})"]
