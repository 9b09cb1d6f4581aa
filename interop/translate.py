"""Translation between config.json and ModelConfig that all families share.

Reads both spellings of RoPE: `rope_theta` and `rope_scaling` of older files, `rope_parameters` of transformers 5.
"""

from __future__ import annotations

import dataclasses
import math
import sys
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
    rotary_dim,
)
from model.moe_config import MoEConfig

# Keys of config.json that do not affect the function that the network computes.
IRRELEVANT = {
    "_name_or_path",
    "_attn_implementation_autoset",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "return_dict",
    "router_jitter_noise",
    "task_specific_params",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "use_bfloat16",
    "use_cache",
}
# Keys that no family supports, and their values that leave the function unchanged.
ORDINARY: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_chunk_size": (None,),
    "dual_chunk_attention_config": (None,),
    "is_causal": (True,),
    "partial_rotary_factor": (1.0,),
    "pruned_heads": ({},),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (False,),
}
LARGEST = 2**31  # exclusive upper bound on integers in config.json
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "relu": "reglu"}


class UnsupportedModelError(ValueError):
    """A published model that the Transformer or this reader cannot express.

    The message names the key, its value and the supported values.
    """


class Keys:
    """config.json, read key by key; `left` returns the keys that were not read."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where, self._read = values, where, set[str]()
        self._assumed: dict[str, Any] = {}
        self._inside: dict[str, Keys] = {}

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def assume(self, values: dict[str, Any]) -> None:
        """Set the defaults of the family's class in transformers for missing keys (null does not count as missing)."""
        self._assumed = values

    def take(self, key: str, *default: Any) -> Any:
        """Return the value of `key`, the assumed value if the key is missing, or the default if there is neither.

        For null, return the default, or the assumed value if both are set and the default is not None. The value must
        have the type of the assumed value or of the default; a float there admits any finite number. Raises
        UnsupportedModelError for another type, or if there is nothing to return.
        """
        self._read.add(key)
        assumed = self._assumed.get(key)
        value = self.values.get(key, assumed)
        if value is None:
            if not default:
                raise UnsupportedModelError(f"{self.where}: {key} is missing, and the model cannot be built without it")
            return default[0] if assumed is None or default[0] is None else assumed
        like = assumed if assumed is not None else default[0] if default else None
        wanted = _required_type(value, like)
        if wanted:
            raise UnsupportedModelError(f"{self.where}: {key} = {_short(value)}: must be {wanted}")
        return float(value) if isinstance(like, float) else value

    def count(self, key: str, *default: int) -> int:
        """Like `take`, for an integer above 0 and below 2**31."""
        value = self.take(key, *default)
        if type(value) is not int or not 0 < value < LARGEST:
            raise UnsupportedModelError(
                f"{self.where}: {key} = {_short(value)}: must be an integer above 0 and below {LARGEST}"
            )
        return value

    def number(self, key: str, *default: float | None) -> Any:
        """Like `take`, for a finite number."""
        absent = self.values.get(key, self._assumed.get(key)) is None
        return self.take(key, *default) if absent else self.take(key, 0.0)

    def must(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """Return the value (`default` if missing). Raises UnsupportedModelError unless it is one of `allowed`."""
        self._read.add(key)
        value = self.values.get(key)
        value = self._assumed.get(key, default) if value is None else value
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise UnsupportedModelError(
                f"{self.where}: {key} = {_short(value)}: not supported (supported: {', '.join(map(repr, allowed))})"
            )
        return value

    def inside(self, key: str) -> Keys | None:
        """Return the object under `key`, to be read in the same way, or None if there is none."""
        values = self.take(key, {})
        if not values:
            return None
        return self._inside.setdefault(key, Keys(values, f"{self.where}: {key}"))

    def ordinary(self) -> None:
        """Raise UnsupportedModelError if a key of ORDINARY has a value that no family supports."""
        for key, allowed in ORDINARY.items():
            self.must(key, *allowed, default=allowed[0])

    def left(self) -> list[str]:
        """Return the sorted keys that were not read and may matter."""
        own = [k for k, v in self.values.items() if k not in self._read | IRRELEVANT and v is not None]
        return sorted(own + [f"{name}.{key}" for name, keys in self._inside.items() for key in keys.left()])


def _required_type(value: Any, like: Any) -> str:
    """Return the required type in words if `value` does not have the type of `like`, else ''. None accepts any."""
    if isinstance(like, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(like, int):
        return "" if type(value) is int and abs(value) < LARGEST else "an integer"
    if isinstance(like, float):
        finite = type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
        return "" if finite else "a finite number"
    for kind, name in ((str, "a string"), (dict, "an object"), (list, "a list"), (tuple, "a list")):
        if isinstance(like, kind):
            return "" if isinstance(value, list if kind is tuple else kind) else name
    return ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Supported keys of `rope_scaling` and `rope_parameters`; each kind reads those that it needs.
ROPE_KEYS = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
}


def rope(
    keys: Keys, default_theta: float = 10_000.0, layer_type: str | None = None, theta: str = "rope_theta"
) -> tuple[float, RopeScalingConfig | None]:
    """Return the base and scaling of RoPE.

    `layer_type`: the kind of layer, if transformers 5 has separate parameters for each. `theta`: the key of the base;
    `rope_scaling` does not apply to a base other than `rope_theta`.
    """
    base, parameters = keys.take(theta, float(default_theta)), keys.inside("rope_parameters")
    if parameters is not None and layer_type is not None:
        parameters = parameters.inside(layer_type)
    scaling = keys.inside("rope_scaling")
    if scaling is not None and "rope_parameters" in keys and keys.values["rope_parameters"] != scaling.values:
        raise UnsupportedModelError(f"{keys.where}: rope_parameters and rope_scaling differ. Remove one of them")
    if theta == "rope_theta":
        parameters = parameters or scaling
    if parameters is None:
        keys.take("original_max_position_embeddings", None)  # unused without a scaling
        return base, None
    base = parameters.take("rope_theta", base)
    return base, rope_scaling(keys, parameters)


def rope_scaling(keys: Keys, scaling: Keys) -> RopeScalingConfig | None:
    """Return the RoPE scaling of `rope_scaling` or `rope_parameters` in config.json. Raises UnsupportedModelError."""
    if scaling.values.get("attn_factor") is not None:
        raise UnsupportedModelError(
            f"{scaling.where}: attn_factor = {_short(scaling.values['attn_factor'])}: transformers ignores this key, "
            "while other readers multiply by it. Remove it to match transformers, or use attention_factor"
        )
    unknown = sorted(k for k, v in scaling.values.items() if k not in ROPE_KEYS and v is not None)
    if unknown:
        raise UnsupportedModelError(
            f"{scaling.where}: {unknown[0]} = {_short(scaling.values[unknown[0]])}: not supported. Supported keys: "
            f"{', '.join(sorted(ROPE_KEYS))}"
        )
    for key in ROPE_KEYS:
        scaling.take(key, None)  # keys of other kinds don't matter
    scaling.must("partial_rotary_factor", 1.0, default=1.0)
    kind = scaling.take("rope_type", scaling.take("type", "default"))
    length = keys.count("max_position_embeddings", 2048)
    inner, outer = (k.take("original_max_position_embeddings", None) for k in (scaling, keys))
    if None not in (inner, outer) and inner != outer and kind in ("llama3", "yarn"):
        raise UnsupportedModelError(
            f"{scaling.where}: original_max_position_embeddings = {_short(inner)}, but {keys.where} has "
            f"{_short(outer)} at the top level. Make them equal"
        )
    where = keys if inner is None else scaling
    original = where.count("original_max_position_embeddings", length)
    if kind == "default":
        return None
    factor = scaling.take("factor", length / original) if kind == "yarn" else scaling.number("factor")
    if kind == "linear":
        return RopeScalingConfig("linear", factor)
    if kind == "dynamic":  # transformers uses max_position_embeddings and ignores the original length
        return RopeScalingConfig("dynamic_ntk", factor, length)
    if kind == "llama3":
        fast, slow = scaling.number("high_freq_factor"), scaling.number("low_freq_factor")
        return RopeScalingConfig("llama3", factor, original, beta_fast=fast, beta_slow=slow)
    if kind == "yarn":
        return RopeScalingConfig(
            "yarn",
            factor,
            original,
            beta_fast=scaling.take("beta_fast", 32.0) or 32.0,
            beta_slow=scaling.take("beta_slow", 1.0) or 1.0,
            truncate=scaling.take("truncate", True),
            attention_factor=_yarn_attention_factor(factor, scaling),
        )
    raise UnsupportedModelError(
        f"{scaling.where}: rope_type = {_short(kind)}: not supported. Supported: default, linear, dynamic, llama3, yarn"
    )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's attention factor for a context extended by `factor` (Peng et al. 2023, eq. 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(factor: float, scaling: Keys) -> float | None:
    if "attention_factor" in scaling:
        value = scaling.number("attention_factor")
        if value <= 0:
            raise UnsupportedModelError(f"{scaling.where}: attention_factor = {value}: must be above 0")
        return value
    one, all_dim = scaling.take("mscale", 0.0), scaling.take("mscale_all_dim", 0.0)
    return yarn_mscale(factor, one) / yarn_mscale(factor, all_dim) if one and all_dim else None  # DeepSeek


def rope_json(config: ModelConfig) -> dict[str, Any]:
    """Return `rope_theta` and `rope_scaling`, which every version of transformers reads.

    Dynamic scaling also needs `max_position_embeddings`, the original length from which it acts, even if
    model.max_length is larger.
    """
    position = _without_ntk(config)
    theta, s = position.theta, position.scaling
    if s is None:
        return {"rope_theta": theta, "rope_scaling": None}
    kind = {"dynamic_ntk": "dynamic"}.get(s.kind, s.kind)
    scaling: dict[str, Any] = {"rope_type": kind, "factor": s.factor}
    if s.kind == "llama3":
        scaling |= {
            "high_freq_factor": s.fast,
            "low_freq_factor": s.beta_slow,
            "original_max_position_embeddings": s.original_length,
        }
    if s.kind == "yarn":
        scaling |= {
            "beta_fast": s.fast,
            "beta_slow": s.beta_slow,
            "original_max_position_embeddings": s.original_length,
            "truncate": s.truncate,
        }
        if s.attention_factor is not None:
            scaling["attention_factor"] = s.attention_factor
    found = {"rope_theta": theta, "rope_scaling": scaling}
    return found | ({"max_position_embeddings": s.original_length} if s.kind == "dynamic_ntk" else {})


def _without_ntk(config: ModelConfig) -> PositionConfig:
    """Return the positions with 'ntk' scaling, which config.json cannot express, as the equivalent larger base."""
    p, dim = config.position, rotary_dim(config)
    if p.kind != "rope" or p.scaling is None or p.scaling.kind != "ntk":
        return p
    return replace(p, theta=p.theta * p.scaling.factor ** (dim / (dim - 2)), scaling=None)


def gated(keys: Keys, key: str = "hidden_act", default: str = "silu") -> Any:
    """Return `mlp.kind` for the activation of a gated MLP. Raises UnsupportedModelError."""
    return ACTIVATIONS[keys.must(key, *ACTIVATIONS, default=default)]


def gated_json(config: ModelConfig) -> str:
    """Return the name of the activation. Without a name it is 'silu', and reading back then finds the difference."""
    return {kind: name for name, kind in reversed(ACTIVATIONS.items())}.get(config.mlp.kind, "silu")


def pattern(kinds: Sequence[Any]) -> tuple[Any, ...]:
    """Return the shortest prefix that, repeated, gives `kinds`."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return tuple(kinds)


def attention_layers(keys: Keys, num_layers: int) -> tuple[str, ...] | None:
    """Return `layer_types` as a pattern for AttentionConfig.layers, or None if it is missing."""
    types = keys.take("layer_types", [])
    if not types:
        return None
    names = {"full_attention": "global", "sliding_attention": "sliding"}
    unknown = [t for t in types if not isinstance(t, str) or t not in names]
    if unknown or len(types) != num_layers:
        raise UnsupportedModelError(
            f"{keys.where}: layer_types has {len(types)} entries for {num_layers} layers"
            + (
                f", and {_short(unknown[0])} is not supported. Supported: {', '.join(names)}"
                if unknown
                else ". Give one entry for each layer"
            )
        )
    return pattern([names[t] for t in types])


def windowed(keys: Keys, num_layers: int, layers: tuple[str, ...]) -> dict[str, Any]:
    """Return `layers` and `window` of AttentionConfig from `layer_types` (default: `layers`) and `sliding_window`."""
    layers, window = attention_layers(keys, num_layers) or layers, keys.take("sliding_window", None)
    if "sliding" not in pattern([layers[i % len(layers)] for i in range(num_layers)]):
        return {"layers": ("global",)}
    if window is None:
        raise UnsupportedModelError(
            f"{keys.where}: sliding_window = None, but some layers use sliding attention. Set the window's length in "
            "tokens"
        )
    return {"layers": layers, "window": keys.count("sliding_window")}


def sliding_json(config: ModelConfig) -> dict[str, Any]:
    """Return `layer_types` and `sliding_window`. Raises UnsupportedModelError for block-sparse layers.

    The window is a number even if no layer uses it: for Gemma and gpt-oss, transformers does not accept null.
    """
    return {"layer_types": layer_types(config), "sliding_window": config.attention.window}


def layer_types(config: ModelConfig) -> list[str]:
    """Return `layer_types` of config.json. Raises UnsupportedModelError for block-sparse layers."""
    names = {"global": "full_attention", "sliding": "sliding_attention"}
    kinds = [spec.attention for spec in layer_specs(config)]
    if not set(kinds) <= set(names):
        raise UnsupportedModelError(
            f"model.attention.layers = {config.attention.layers}: config.json supports only {', '.join(names)}"
        )
    return [names[kind] for kind in kinds]


def architecture(config: ModelConfig) -> ModelConfig:
    """Return the config with every field that does not affect the trained network's output set to its default.

    If two results are equal, the networks are the same function of the same weights. `max_length` counts only if
    positions are a learned table.
    """
    a, p, m = config.attention, _without_ntk(config), config.moe
    d = AttentionConfig()
    layers = pattern([spec.attention for spec in layer_specs(config)])
    a = replace(a, layers=layers, implementation=d.implementation, context_parallel=d.context_parallel)
    if "sliding" not in layers:
        a, p = replace(a, window=d.window), replace(p, local_theta=None)
    if "block_sparse" not in layers:
        a = replace(a, blocks=d.blocks)
    if a.query_scale is not None and math.isclose(a.query_scale, a.head_dim**-0.5):
        a = replace(a, query_scale=None)
    if p.kind != "rope":
        p = PositionConfig(kind=p.kind)
    if set(layers) == {"sliding"} and p.local_theta is not None:
        p = replace(p, theta=p.local_theta, local_theta=None, scaling=None)
    if p.scaling is None and p.local_theta == p.theta:
        p = replace(p, local_theta=None)
    if p.scaling is not None:
        s = p.scaling
        factor = None
        if s.kind == "yarn":
            factor = s.attention_factor or yarn_mscale(s.factor)
        fast, slow = (s.fast, s.beta_slow) if s.kind in ("yarn", "llama3") else (None, 1.0)
        length = RopeScalingConfig().original_length if s.kind == "linear" else s.original_length
        truncate = s.truncate or s.kind != "yarn"
        s = replace(
            s, original_length=length, beta_fast=fast, beta_slow=slow, truncate=truncate, attention_factor=factor
        )
        p = replace(p, scaling=s)
    mlp = config.mlp
    if m is not None:
        kinds = pattern(["moe" if spec.moe else "dense" for spec in layer_specs(config)])
        e = MoEConfig()
        same = (
            "router_dtype",
            "load_balance",
            "balance_scope",
            "z_loss",
            "dispatch",
            "all_to_all_buffer_factor",
            "jitter",
            "router_dropout",
        )
        m = replace(m, layers=kinds, **{name: getattr(e, name) for name in same})
        if m.bias_rate is not None:
            m = replace(m, bias_rate=0.0)
        if "dense" not in kinds:
            mlp = replace(mlp, hidden_dim=MLPConfig().hidden_dim)
    plain = ModelConfig()
    return replace(
        config,
        attention=a,
        position=p,
        mlp=mlp,
        moe=m,
        max_length=config.max_length if p.kind == "learned" else plain.max_length,
        init=InitConfig(),
        dropout=0.0,
        dtype=plain.dtype,
        remat=plain.remat,
        remat_names=plain.remat_names,
        scan_unroll=plain.scan_unroll,
    )


def differences(one: Any, other: Any, path: str = "model") -> list[str]:
    """Return one line for each field in which two configs differ, with its dotted path and both values."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        fields = (f.name for f in dataclasses.fields(one))
        return [
            line for name in fields for line in differences(getattr(one, name), getattr(other, name), f"{path}.{name}")
        ]
    same = (
        math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) and isinstance(other, float) else one == other
    )
    return [] if same else [f"{path} = {one!r} (there {other!r})"]
