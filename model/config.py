"""What a network is: every choice a field with a published meaning. Frozen, JSON-serializable, no mesh, no code."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Literal

from model.moe_config import MoEConfig

# Counts that checks and plans loop over: far above every published network.
MOST = {"num_layers": 4_096, "attention.num_heads": 1_000_000, "attention.num_kv_heads": 1_000_000}


@dataclass(frozen=True)
class NormConfig:
    kind: Literal["rmsnorm", "layernorm"] = "rmsnorm"  # Zhang & Sennrich 2019; Ba et al. 2016
    epsilon: float = 1e-6
    bias: bool = False
    unit_offset: bool = False  # the weight is stored as w and applied as (1 + w), as Gemma does
    placement: Literal["pre", "post", "sandwich"] = "pre"  # x+f(n(x)); x+n(f(x)) (OLMo 2); x+n(f(n(x))) (Gemma 2)


@dataclass(frozen=True)
class RopeScalingConfig:
    """Stretching RoPE beyond the trained length."""

    kind: Literal["linear", "ntk", "dynamic_ntk", "yarn", "llama3"] = "linear"
    factor: float = 1.0
    original_length: int = 2048  # positions the unscaled model was trained on
    # yarn, llama3: rotations over the original length above which a frequency is left as it is, and below which it is
    # divided by the factor (Llama's high_freq_factor and low_freq_factor). None: 32 for yarn, 4 for llama3.
    beta_fast: float | None = None
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: the two ends of the ramp are whole pairs; gpt-oss: false
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None: 0.1 ln(factor) + 1

    @property
    def fast(self) -> float:
        """`beta_fast`, or its default."""
        return self.beta_fast if self.beta_fast is not None else 32.0 if self.kind == "yarn" else 4.0

    def validate(self) -> None:
        """Raises ValueError that names field, value and fix."""
        if not self.factor >= 1:
            raise ValueError(
                f"model.position.scaling.factor = {self.factor}: must be 1 or more, new over original length"
            )
        if self.original_length < 1:
            raise ValueError(
                f"model.position.scaling.original_length = {self.original_length}: the positions of the unscaled "
                f"model, 1 or more"
            )
        ordered = (
            self.fast >= self.beta_slow if self.kind == "yarn" else self.fast > self.beta_slow
        )  # of yarn, a step is a ramp
        if self.kind in ("yarn", "llama3") and not (ordered and self.beta_slow > 0):
            raise ValueError(
                f"model.position.scaling.beta_fast = {self.fast}: must be above beta_slow = {self.beta_slow}, and that "
                f"above 0"
            )


@dataclass(frozen=True)
class PositionConfig:
    kind: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"
    theta: float = 10_000.0  # RoPE base (Su et al. 2021)
    local_theta: float | None = (
        None  # RoPE base of the sliding-window layers, which are then not scaled (Gemma 3); None: theta
    )
    rotary_fraction: float = 1.0  # part of the head dimension that is rotated
    interleaved: bool = False  # pairs (2i, 2i+1) instead of (i, i + half)
    scaling: RopeScalingConfig | None = None


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, sec. 2.1): keys and values of all heads are read out of one small
    vector a token, which is all that the cache holds, beside one rotated key that the heads share."""

    q_rank: int | None = None  # queries too are read out of a vector of this size; None: out of the residual stream
    kv_rank: int = 512  # of the vector that keys and values are read out of
    rope_dim: int = (
        64  # dimensions of a head, of its head_dim the last, that RoPE rotates; their key is shared by the heads
    )
    value_dim: int = 128  # of a head

    def validate(self, a: AttentionConfig, p: PositionConfig) -> None:
        """Raises ValueError that names field, value and fix."""
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"model.attention.latent.{name} = {size}: must be at least 1")
        if self.rope_dim % 2 or self.rope_dim >= a.head_dim:
            raise ValueError(
                f"model.attention.latent.rope_dim = {self.rope_dim}: must be even and below model.attention.head_dim "
                f"= {a.head_dim}, which counts it in"
            )
        # Field, value, and the values that go with it.
        for name, value, allowed in (
            ("model.attention.num_kv_heads", a.num_kv_heads, (a.num_heads,)),
            ("model.attention.qk_norm", a.qk_norm, ("none",)),
            ("model.attention.clip_qkv", a.clip_qkv, (None,)),
            ("model.attention.context", a.context, ("gather",)),
            ("model.position.kind", p.kind, ("rope", "none")),
            ("model.position.rotary_fraction", p.rotary_fraction, (1.0,)),
            (
                "model.position.scaling.kind",
                None if p.scaling is None else p.scaling.kind,
                (None, "linear", "ntk", "yarn", "llama3"),
            ),
        ):
            if value not in allowed:
                raise ValueError(
                    f"{name} = {value!r}: does not go with model.attention.latent; use "
                    f"{', '.join(str(x) for x in allowed)}"
                )


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int = 8
    num_kv_heads: int = 8  # fewer: grouped-query attention (Ainslie et al. 2023); 1: multi-query
    head_dim: int = 32  # of queries and keys; with `latent` the rotated part included
    latent: LatentConfig | None = None  # multi-head latent attention; num_kv_heads is then num_heads
    bias: Literal["none", "qkv", "all"] = "none"  # of the projections: of q, k and v (Qwen2), and of the output (GPT-2)
    clip_qkv: float | None = None  # queries, keys and values are cut to this absolute value (MPT, OLMoE)
    qk_norm: Literal["none", "head", "full"] = "none"  # per head (Qwen3) or over the full width (OLMo 2), before RoPE
    softcap: float | None = None  # cap * tanh(logits / cap), Gemma 2
    query_scale: float | None = None  # multiplies q k^T; None: head_dim ** -0.5
    sinks: bool = False  # a learned logit per head that takes probability and gives no value (gpt-oss)
    mask: Literal["causal", "bidirectional", "prefix"] = (
        "causal"  # prefix: bidirectional inside the prefix (Raffel 2020)
    )
    # Attention pattern by layer, repeated: 'global', 'sliding' (the last `window` positions) or 'block_sparse'.
    # 'package.module:Class' is a variant of the user's own (model/attention/__init__.py).
    layers: tuple[str, ...] = ("global",)
    window: int = 1024
    # block_sparse (Child 2019): positions a block; the last so many blocks a query sees, its own included; and every so
    # many-th block (its index % stride == stride - 1).
    blocks: tuple[int, ...] = (64, 4, 8)
    # What computes it: the best for the device, or one kernel by name, which must be able to ('hopper', 'triton':
    # GPUs).
    implementation: Literal["auto", "tpu", "hopper", "triton", "xla", "reference"] = "auto"
    # What attends from one or a few new tokens to a cache: the best for the device, one kernel by name ('gpu' is
    # Triton), or 'off': `implementation` does that too.
    decode_implementation: Literal["auto", "tpu", "gpu", "reference", "off"] = "auto"
    # Rows spread over the mesh axis 'sequence': keys are gathered, passed around (Liu et al. 2023), or exchanged for
    # heads (Jacobs et al. 2023).
    context: Literal["gather", "ring", "ulysses"] = "gather"


@dataclass(frozen=True)
class MLPConfig:
    # Shazeer 2020; So et al. 2021; gpt-oss: (up + 1) * gate * sigmoid(1.702 gate), gate cut at 7 and up at +-7.
    kind: Literal["gelu", "relu", "relu2", "swiglu", "geglu", "reglu", "swiglu_clamped"] = "swiglu"
    hidden_dim: int = 1024
    bias: bool = False  # of every projection, experts' and their router's too


@dataclass(frozen=True)
class InitConfig:
    """Standard deviations of the weights; norms start at one, biases and sinks at zero."""

    scheme: Literal["fan_in", "normal"] = "fan_in"  # std = scale / sqrt(inputs), or std = scale
    scale: float = 1.0
    embedding_std: float = 0.02
    residual: Literal["none", "depth", "zero"] = "depth"  # output projections: as is, / sqrt(2 L) (GPT-2), or zero


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 0  # 0: the tokenizer's, rounded up to a multiple of 128
    num_layers: int = 4
    embed_dim: int = 256
    max_length: int = 2048  # longest context, in positions
    attention: AttentionConfig = AttentionConfig()
    position: PositionConfig = PositionConfig()
    norm: NormConfig = NormConfig()
    mlp: MLPConfig = MLPConfig()
    moe: MoEConfig | None = None
    init: InitConfig = InitConfig()
    tied_embeddings: bool = False
    embedding_scale: float | None = None  # multiplies the embeddings; Gemma: sqrt(embed_dim)
    final_softcap: float | None = None  # cap * tanh(logits / cap)
    dropout: float = 0.0  # on the embeddings and on each residual branch
    mup_base_dim: int | None = None  # muP (Yang et al. 2022): the width whose hyperparameters are carried over
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of computation; auto: bfloat16 but on CPU
    # What the backward pass keeps: everything; nothing; matmul outputs; values named in `remat_names`; or those,
    # offloaded.
    remat: Literal["none", "full", "dots", "names", "offload"] = "none"
    remat_names: tuple[Literal["attention_out", "mlp_out", "qkv", "mlp_hidden", "expert_in", "expert_out"], ...] = (
        "attention_out",
        "mlp_out",
    )
    scan_unroll: int = 1  # layers a step of the scan over layers; 0: all (faster on CPU, compiles longer)

    def validate(self) -> None:
        """Refuses what cannot be built. Raises ValueError that names field, value and fix."""
        a, p, m = self.attention, self.position, self.moe
        _refuse_unknown_choices(self, "model")
        counts: dict[str, int | None] = {
            "num_layers": self.num_layers,
            "embed_dim": self.embed_dim,
            "max_length": self.max_length,
            "attention.num_heads": a.num_heads,
            "attention.num_kv_heads": a.num_kv_heads,
            "attention.head_dim": a.head_dim,
            "attention.window": a.window,
            "mlp.hidden_dim": self.mlp.hidden_dim,
            "mup_base_dim": self.mup_base_dim,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"model.{name} = {count}: must be at least 1")
            if count is not None and count > (largest := MOST.get(name, count)):
                raise ValueError(f"model.{name} = {count}: far above every published network; use at most {largest}")
        positive: dict[str, float | None] = {
            "attention.softcap": a.softcap,
            "attention.query_scale": a.query_scale,
            "final_softcap": self.final_softcap,
            "position.theta": p.theta,
            "position.local_theta": p.local_theta,
            "attention.clip_qkv": a.clip_qkv,
        }
        for name, number in positive.items():
            if number is not None and not number > 0:
                raise ValueError(f"model.{name} = {number}: must be a number above 0")
        nonnegative: dict[str, float] = {
            "vocab_size": self.vocab_size,
            "norm.epsilon": self.norm.epsilon,
            "init.scale": self.init.scale,
            "init.embedding_std": self.init.embedding_std,
        }
        for name, value in nonnegative.items():
            if not value >= 0:
                raise ValueError(f"model.{name} = {value}: must be 0 or more")
        if a.latent is not None:
            a.latent.validate(a, p)
        if a.num_heads % a.num_kv_heads:
            divisors = [str(d) for d in range(1, a.num_heads + 1) if a.num_heads % d == 0]
            raise ValueError(
                f"model.attention.num_kv_heads = {a.num_kv_heads}: must divide model.attention.num_heads = "
                f"{a.num_heads}; set it to {', '.join(divisors)}"
            )
        if len(a.blocks) != 3 or min(a.blocks) < 1:
            raise ValueError(
                f"model.attention.blocks = {a.blocks}: three numbers of at least 1: positions a block, the last "
                "blocks that a query sees (its own included), and every so many-th block; as in (64, 4, 8)"
            )
        unknown = [kind for kind in a.layers if kind not in ("global", "sliding", "block_sparse") and ":" not in kind]
        if unknown:
            raise ValueError(
                f"model.attention.layers = {unknown[0]!r}: unknown; use global, sliding, block_sparse, or "
                "'package.module:Class' for a variant of your own"
            )
        if not a.layers:
            raise ValueError("model.attention.layers = (): give at least one of global, sliding, block_sparse")
        if a.context != "gather" and ("block_sparse" in a.layers or a.mask == "prefix"):
            raise ValueError(
                f"model.attention.context = {a.context!r}: rows spread so take no block_sparse layers and no prefix; "
                f"use 'gather'"
            )
        if a.context == "ring" and p.kind == "alibi":
            raise ValueError(
                "model.attention.context = 'ring': takes no model.position.kind = 'alibi'; use 'ulysses' or 'gather'"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: a probability in [0, 1)")
        if not 0.0 < p.rotary_fraction <= 1.0:
            raise ValueError(f"model.position.rotary_fraction = {p.rotary_fraction}: a fraction in (0, 1]")
        if p.kind == "rope" and rotary_dim(self) % 2:
            raise ValueError(
                f"model.position.rotary_fraction = {p.rotary_fraction}: rotates {rotary_dim(self)} of model.attention."
                f"head_dim = {a.head_dim} dimensions, which must be an even number above 0"
            )
        if p.scaling is not None:
            if p.kind != "rope":
                raise ValueError(f"model.position.scaling: only RoPE is scaled, but model.position.kind = {p.kind!r}")
            p.scaling.validate()
            if p.scaling.kind in ("ntk", "dynamic_ntk") and rotary_dim(self) < 4:
                raise ValueError(
                    f"model.position.scaling.kind = {p.scaling.kind!r}: needs 4 or more rotated dimensions, but model."
                    f"attention.head_dim = {a.head_dim} gives {rotary_dim(self)}"
                )
        if p.kind == "sinusoidal" and self.embed_dim % 2:
            raise ValueError(
                f"model.embed_dim = {self.embed_dim}: must be even for model.position.kind = 'sinusoidal'; add or take "
                f"1"
            )
        if self.scan_unroll < 0:
            raise ValueError(f"model.scan_unroll = {self.scan_unroll}: 1 or more layers a step, or 0 for all")
        if self.remat in ("names", "offload") and not self.remat_names:
            raise ValueError(
                f"model.remat_names = (): model.remat = {self.remat!r} keeps what it names; name one, or set remat to "
                f"full"
            )
        if m is not None:
            m.validate(causal=a.mask != "bidirectional")
            if not any(spec.moe for spec in layer_specs(self)):
                raise ValueError(
                    f"model.moe.layers = {m.layers}: none of the model.num_layers = {self.num_layers} layers is a "
                    "'moe' one; name it earlier, add layers, or set model.moe to none"
                )


def _refuse_unknown_choices(config, path: str) -> None:
    """Checks every Literal below `config`, in tuples too: a misspelt choice in an experiment is not to be taken for
    another."""
    hints = typing.get_type_hints(type(config))
    for name, value in vars(config).items():
        if dataclasses.is_dataclass(value):
            _refuse_unknown_choices(value, f"{path}.{name}")
            continue
        hint = hints[name]
        hint = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if typing.get_origin(hint) is Literal:
            choices = typing.get_args(hint)
            wrong = [x for x in (value if isinstance(value, tuple) else (value,)) if x not in choices]
            if wrong:
                raise ValueError(f"{path}.{name} = {wrong[0]!r}: unknown; use one of {', '.join(choices)}")


@dataclass(frozen=True)
class LayerSpec:
    """What distinguishes one layer from another."""

    attention: str = "global"
    moe: bool = False


@dataclass(frozen=True)
class Segment:
    """`repeats` repetitions of a run of layers; the repetitions are stacked and scanned."""

    unit: tuple[LayerSpec, ...] = field(default_factory=tuple)
    repeats: int = 1


def rotary_dim(config: ModelConfig) -> int:
    """Dimensions of a head that RoPE rotates."""
    if config.attention.latent is not None:
        return config.attention.latent.rope_dim
    return int(config.attention.head_dim * config.position.rotary_fraction)


def layer_specs(config: ModelConfig) -> list[LayerSpec]:
    """The layers from first to last."""
    attention, kinds = config.attention.layers, ("dense",) if config.moe is None else config.moe.layers
    return [
        LayerSpec(attention=attention[i % len(attention)], moe=kinds[i % len(kinds)] == "moe")
        for i in range(config.num_layers)
    ]


def segments(config: ModelConfig) -> tuple[Segment, ...]:
    """The layers as few scans: a prefix of single layers, one repeated unit, a remainder."""
    specs = layer_specs(config)
    best, shortest = tuple(Segment((spec,), 1) for spec in specs), len(specs)
    for start in range(len(specs)):
        for period in range(1, len(specs) - start + 1):
            if start + period >= shortest:
                break  # a longer unit cannot make a shorter plan
            unit = tuple(specs[start : start + period])
            repeats = 1
            while tuple(specs[start + repeats * period : start + (repeats + 1) * period]) == unit:
                repeats += 1
            rest = specs[start + repeats * period :]
            plan = (
                *(Segment((spec,), 1) for spec in specs[:start]),
                Segment(unit, repeats),
                *(Segment((spec,), 1) for spec in rest),
            )
            if (length := sum(len(s.unit) for s in plan)) < shortest:
                best, shortest = plan, length
    return best
