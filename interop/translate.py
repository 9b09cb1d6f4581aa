"""config.json of a published model to ModelConfig and back: what all families share.

Both spellings are read: `rope_theta` and `rope_scaling` of older files, `rope_parameters` of transformers 5.
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

# Of config.json: what says nothing of the function that the network computes.
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
# Of any family: keys that change the function, and the values at which they do not.
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
LARGEST = 2**31  # no integer of a config.json comes near
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "relu": "reglu"}


class UnsupportedModelError(ValueError):
    """A published model that the Transformer or this reader cannot express; the message names key, value and what can
    be."""


class Keys:
    """config.json, read key by key; remembers which were, so that those left over can be told."""

    def __init__(self, values: dict[str, Any], where: str = "config.json"):
        self.values, self.where, self._read = values, where, set[str]()
        self._assumed: dict[str, Any] = {}
        self._inside: dict[str, Keys] = {}

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def assume(self, values: dict[str, Any]) -> None:
        """What the family's class in transformers takes for keys that are missing (null is a value of its own)."""
        self._assumed = values

    def take(self, key: str, *default: Any) -> Any:
        """The value; where it is missing and nothing assumed, or null, the default, or UnsupportedModelError if there
        is none.

        It must be of the type of what is assumed or of the default: 2048 of an integer, 1.0 of any finite number.
        """
        self._read.add(key)
        assumed = self._assumed.get(key)
        value = self.values.get(key, assumed)
        if value is None:
            if not default:
                raise UnsupportedModelError(f"{self.where}: {key} is missing; it is needed to build the model")
            return default[0] if assumed is None or default[0] is None else assumed
        like = assumed if assumed is not None else default[0] if default else None
        wanted = _mistyped(value, like)
        if wanted:
            raise UnsupportedModelError(f"{self.where}: {key} = {_short(value)}: must be {wanted}")
        return float(value) if isinstance(like, float) else value

    def count(self, key: str, *default: int) -> int:
        """As `take`; an integer above 0 that an index could be."""
        value = self.take(key, *default)
        if type(value) is not int or not 0 < value < LARGEST:
            raise UnsupportedModelError(
                f"{self.where}: {key} = {_short(value)}: must be an integer above 0 and below {LARGEST}"
            )
        return value

    def number(self, key: str, *default: float | None) -> Any:
        """As `take`; a finite number, or the default."""
        absent = self.values.get(key, self._assumed.get(key)) is None
        return self.take(key, *default) if absent else self.take(key, 0.0)

    def must(self, key: str, *allowed: Any, default: Any = None) -> Any:
        """The value, which must be one of `allowed` (a missing one is `default`). Raises UnsupportedModelError."""
        self._read.add(key)
        value = self.values.get(key)
        value = self._assumed.get(key, default) if value is None else value
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise UnsupportedModelError(
                f"{self.where}: {key} = {_short(value)} cannot be expressed; supported: {', '.join(map(repr, allowed))}"
            )
        return value

    def inside(self, key: str) -> Keys | None:
        """The dict under a key, to be read in the same way; None where there is none."""
        values = self.take(key, {})
        if not values:
            return None
        return self._inside.setdefault(key, Keys(values, f"{self.where}: {key}"))

    def ordinary(self) -> None:
        """Refuses what no family here can express."""
        for key, allowed in ORDINARY.items():
            self.must(key, *allowed, default=allowed[0])

    def left(self) -> list[str]:
        """Keys that nothing read and that may mean something, in order."""
        own = [k for k, v in self.values.items() if k not in self._read | IRRELEVANT and v is not None]
        return sorted(own + [f"{name}.{key}" for name, keys in self._inside.items() for key in keys.left()])


def _mistyped(value: Any, like: Any) -> str:
    """What a value should have been, if it is not; any value is like None."""
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


# Keys of `rope_scaling` and `rope_parameters`; each kind reads those that it needs.
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
    """Base and scaling of RoPE. `layer_type`: where transformers 5 keeps parameters for each kind of layer. `theta`:
    the key of the base, where one kind has its own, which `rope_scaling` then leaves alone."""
    base, parameters = keys.take(theta, float(default_theta)), keys.inside("rope_parameters")
    if parameters is not None and layer_type is not None:
        parameters = parameters.inside(layer_type)
    scaling = keys.inside("rope_scaling")
    if scaling is not None and "rope_parameters" in keys and keys.values["rope_parameters"] != scaling.values:
        raise UnsupportedModelError(
            f"{keys.where}: rope_parameters and rope_scaling say different things; remove one of them"
        )
    if theta == "rope_theta":
        parameters = parameters or scaling
    if parameters is None:
        keys.take("original_max_position_embeddings", None)  # of a scaling that is not there
        return base, None
    base = parameters.take("rope_theta", base)
    return base, rope_scaling(keys, parameters)


def rope_scaling(keys: Keys, scaling: Keys) -> RopeScalingConfig | None:
    """The scaling of RoPE that `rope_scaling` or `rope_parameters` of config.json is. Raises UnsupportedModelError."""
    if scaling.values.get("attn_factor") is not None:
        raise UnsupportedModelError(
            f"{scaling.where}: attn_factor = {_short(scaling.values['attn_factor'])}: transformers leaves it out, "
            "other readers multiply by it; remove it to compute as transformers does, or say attention_factor"
        )
    unknown = sorted(k for k, v in scaling.values.items() if k not in ROPE_KEYS and v is not None)
    if unknown:
        raise UnsupportedModelError(
            f"{scaling.where}: {unknown[0]} = {_short(scaling.values[unknown[0]])} is not supported; there are "
            f"{', '.join(sorted(ROPE_KEYS))}"
        )
    for key in ROPE_KEYS:
        scaling.take(key, None)  # what another kind would read says nothing
    scaling.must("partial_rotary_factor", 1.0, default=1.0)
    kind = scaling.take("rope_type", scaling.take("type", "default"))
    length = keys.count("max_position_embeddings", 2048)
    inner, outer = (k.take("original_max_position_embeddings", None) for k in (scaling, keys))
    if None not in (inner, outer) and inner != outer and kind in ("llama3", "yarn"):
        raise UnsupportedModelError(
            f"{scaling.where}: original_max_position_embeddings = {_short(inner)}, but {keys.where} has "
            f"{_short(outer)} beside it; make them equal"
        )
    where = keys if inner is None else scaling
    original = where.count("original_max_position_embeddings", length)
    if kind == "default":
        return None
    factor = scaling.take("factor", length / original) if kind == "yarn" else scaling.number("factor")
    if kind == "linear":
        return RopeScalingConfig("linear", factor)
    if kind == "dynamic":  # transformers scales by the longest context, whatever the original one
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
        f"{scaling.where}: RoPE of type {_short(kind)} is not supported; there are default, linear, dynamic, llama3, "
        f"yarn"
    )


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies attention by for a stretch of `factor` (Peng et al. 2023, eq. 22)."""
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
    """Return `rope_theta` and `rope_scaling`, which every version of transformers reads, and of dynamic scaling the
    `max_position_embeddings` from which it acts: the original length, whatever model.max_length was raised to."""
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
    """Positions with 'ntk', which no config.json knows, as the larger base that it is."""
    p, dim = config.position, rotary_dim(config)
    if p.kind != "rope" or p.scaling is None or p.scaling.kind != "ntk":
        return p
    return replace(p, theta=p.theta * p.scaling.factor ** (dim / (dim - 2)), scaling=None)


def gated(keys: Keys, key: str = "hidden_act", default: str = "silu") -> Any:
    """`mlp.kind` of the activation of a gated MLP. Raises UnsupportedModelError."""
    return ACTIVATIONS[keys.must(key, *ACTIVATIONS, default=default)]


def gated_json(config: ModelConfig) -> str:
    """The name of that activation; silu where it has none, which reading back finds to be another."""
    return {kind: name for name, kind in reversed(ACTIVATIONS.items())}.get(config.mlp.kind, "silu")


def pattern(kinds: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest run of layers that, repeated, gives `kinds`."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds)):
            return tuple(kinds[:period])
    return tuple(kinds)


def attention_layers(keys: Keys, num_layers: int) -> tuple[str, ...] | None:
    """`layer_types` as a pattern of ours; None where there is none."""
    types = keys.take("layer_types", [])
    if not types:
        return None
    names = {"full_attention": "global", "sliding_attention": "sliding"}
    unknown = [t for t in types if not isinstance(t, str) or t not in names]
    if unknown or len(types) != num_layers:
        raise UnsupportedModelError(
            f"{keys.where}: layer_types has {len(types)} entries for {num_layers} layers"
            + (
                f", and {_short(unknown[0])} is not supported; there are {', '.join(names)}"
                if unknown
                else "; give each layer one"
            )
        )
    return pattern([names[t] for t in types])


def windowed(keys: Keys, num_layers: int, layers: tuple[str, ...]) -> dict[str, Any]:
    """Fields `layers` and `window` of AttentionConfig: of `layer_types`, else `layers`; and `sliding_window`."""
    layers, window = attention_layers(keys, num_layers) or layers, keys.take("sliding_window", None)
    if "sliding" not in pattern([layers[i % len(layers)] for i in range(num_layers)]):
        return {"layers": ("global",)}
    if window is None:
        raise UnsupportedModelError(
            f"{keys.where}: sliding_window = None, but there are layers of sliding attention; give its positions"
        )
    return {"layers": layers, "window": keys.count("sliding_window")}


def sliding_json(config: ModelConfig) -> dict[str, Any]:
    """Return `layer_types` and `sliding_window`, a number even where no layer slides: of Gemma and gpt-oss,
    transformers takes no null. Raises UnsupportedModelError for block-sparse layers."""
    return {"layer_types": layer_types(config), "sliding_window": config.attention.window}


def layer_types(config: ModelConfig) -> list[str]:
    """`layer_types` of config.json."""
    names = {"global": "full_attention", "sliding": "sliding_attention"}
    kinds = [spec.attention for spec in layer_specs(config)]
    if not set(kinds) <= set(names):
        raise UnsupportedModelError(
            f"model.attention.layers = {config.attention.layers}: config.json knows only {', '.join(names)}"
        )
    return [names[kind] for kind in kinds]


def architecture(config: ModelConfig) -> ModelConfig:
    """Return the config with every field that does not change what the trained network computes set to its default: if
    two of them are equal, the networks are the same function of the same weights. `max_length` counts only where
    positions are a learned table."""
    a, p, m = config.attention, _without_ntk(config), config.moe
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
            "exchange",
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
    """Dotted fields in which two configs differ, with both values."""
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        fields = (f.name for f in dataclasses.fields(one))
        return [
            line for name in fields for line in differences(getattr(one, name), getattr(other, name), f"{path}.{name}")
        ]
    same = (
        math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) and isinstance(other, float) else one == other
    )
    return [] if same else [f"{path} = {one!r} (there {other!r})"]
