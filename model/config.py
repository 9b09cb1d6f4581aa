"""Configuration of a network. Every field has a published meaning; all classes are frozen and JSON-serializable."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Literal

from model.moe_config import NONCAUSAL, MoEConfig

# Upper bounds on counts that checks and plans loop over, far above every published network.
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
    """Scaling of RoPE beyond the trained length."""

    kind: Literal["linear", "ntk", "dynamic_ntk", "yarn", "llama3"] = "linear"
    factor: float = 1.0
    original_length: int = 2048  # positions the unscaled model was trained on
    # yarn, llama3: frequencies with more than `beta_fast` rotations over the original length stay unchanged; those with
    # fewer than `beta_slow` are divided by the factor (Llama's high_freq_factor and low_freq_factor). None: 32 for
    # yarn, 4 for llama3.
    beta_fast: float | None = None
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: round the two ends of the ramp to whole pairs; gpt-oss: false
    attention_factor: float | None = None  # yarn: multiplies cos and sin; None: 0.1 ln(factor) + 1

    @property
    def fast(self) -> float:
        """`beta_fast`, or its default."""
        return self.beta_fast if self.beta_fast is not None else 32.0 if self.kind == "yarn" else 4.0

    def validate(self) -> None:
        """Raise ValueError with the field, its value and a fix if the config is invalid."""
        if not self.factor >= 1:
            raise ValueError(
                f"model.position.scaling.factor = {self.factor}: must be 1 or more; it is the new over the original "
                "length"
            )
        if self.original_length < 1:
            raise ValueError(
                f"model.position.scaling.original_length = {self.original_length}: must be 1 or more; it is the number "
                "of positions of the unscaled model"
            )
        # yarn accepts equal values: its ramp becomes a step.
        ordered = self.fast >= self.beta_slow if self.kind == "yarn" else self.fast > self.beta_slow
        if self.kind in ("yarn", "llama3") and not (ordered and self.beta_slow > 0):
            raise ValueError(
                f"model.position.scaling.beta_fast = {self.fast}: must be above beta_slow = {self.beta_slow}, which "
                "must be above 0"
            )


@dataclass(frozen=True)
class PositionConfig:
    kind: Literal["rope", "alibi", "learned", "sinusoidal", "none"] = "rope"
    theta: float = 10_000.0  # RoPE base (Su et al. 2021)
    # RoPE base of the sliding-window layers, which are then not scaled (Gemma 3). None: theta.
    local_theta: float | None = None
    rotary_fraction: float = 1.0  # fraction of the head dimension that RoPE rotates
    interleaved: bool = False  # rotate pairs (2i, 2i+1) instead of (i, i + half)
    scaling: RopeScalingConfig | None = None


@dataclass(frozen=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, sec. 2.1). Keys and values of all heads are projected from one small
    vector per token. The cache holds only that vector and one rotated key that all heads share."""

    q_rank: int | None = None  # size of the latent that queries are projected from; None: from the residual stream
    kv_rank: int = 512  # size of the latent that keys and values are projected from
    rope_dim: int = 64  # last dimensions of head_dim, which RoPE rotates; all heads share this part of the key
    value_dim: int = 128  # dimensions of a head's values

    def validate(self, a: AttentionConfig, p: PositionConfig) -> None:
        """Raise ValueError with the field, its value and a fix if the config is invalid."""
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"model.attention.latent.{name} = {size}: must be at least 1")
        if self.rope_dim % 2 or self.rope_dim >= a.head_dim:
            raise ValueError(
                f"model.attention.latent.rope_dim = {self.rope_dim}: must be even and below model.attention.head_dim "
                f"= {a.head_dim}, which includes it"
            )
        # Field, its value, and the values that latent attention supports.
        for name, value, allowed in (
            ("model.attention.num_kv_heads", a.num_kv_heads, (a.num_heads,)),
            ("model.attention.qk_norm", a.qk_norm, ("none",)),
            ("model.attention.clip_qkv", a.clip_qkv, (None,)),
            ("model.attention.context_parallel", a.context_parallel, ("gather",)),
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
                    f"{name} = {value!r}: not supported with model.attention.latent. Use "
                    f"{' or '.join(str(x) for x in allowed)}"
                )


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int = 8
    num_kv_heads: int = 8  # fewer: grouped-query attention (Ainslie et al. 2023); 1: multi-query
    head_dim: int = 32  # dimensions of a head's queries and keys; with `latent`, including the rotated part
    latent: LatentConfig | None = None  # multi-head latent attention; num_kv_heads is then num_heads
    bias: Literal["none", "qkv", "all"] = "none"  # q, k and v (Qwen2); all: the output projection too (GPT-2)
    clip_qkv: float | None = None  # clips queries, keys and values to this absolute value (MPT, OLMoE)
    qk_norm: Literal["none", "head", "full"] = "none"  # per head (Qwen3) or over the full width (OLMo 2), before RoPE
    softcap: float | None = None  # cap * tanh(logits / cap), Gemma 2
    query_scale: float | None = None  # multiplies q k^T; None: head_dim ** -0.5
    sinks: bool = False  # a learned logit per head that takes probability but has no value (gpt-oss)
    # prefix: bidirectional inside the prefix (Raffel 2020).
    mask: Literal["causal", "bidirectional", "prefix"] = "causal"
    # Attention kinds of the layers, as a repeated pattern: 'global', 'sliding' (the last `window` positions) or
    # 'block_sparse'. 'package.module:Class' names a user's variant (model/attention/__init__.py).
    layers: tuple[str, ...] = ("global",)
    window: int = 1024
    # block_sparse (Child 2019): (size, local, stride). A query attends to the last `local` blocks of `size` positions,
    # including its own, and to every block with index % stride == stride - 1.
    blocks: tuple[int, ...] = (64, 4, 8)
    # Kernel for whole rows. auto: the best for the device. A named kernel that cannot run raises an error ('hopper' and
    # 'triton' need GPUs).
    implementation: Literal["auto", "tpu", "hopper", "triton", "xla", "reference"] = "auto"
    # Kernel that attends from one or a few new tokens to a cache. auto: the best for the device; 'gpu' is Triton; off:
    # use `implementation` instead.
    decode_implementation: Literal["auto", "tpu", "gpu", "reference", "off"] = "auto"
    # Attention over rows sharded over the mesh axis 'sequence': gather the keys, pass them around a ring (Liu et al.
    # 2023), or exchange them for heads (Jacobs et al. 2023).
    context_parallel: Literal["gather", "ring", "ulysses"] = "gather"


@dataclass(frozen=True)
class MLPConfig:
    # Shazeer 2020; So et al. 2021. swiglu_clamped (gpt-oss): (up + 1) * gate * sigmoid(1.702 gate), with gate clipped
    # at 7 and up at +-7.
    kind: Literal["gelu", "relu", "relu2", "silu", "swiglu", "geglu", "reglu", "glu", "bilinear", "swiglu_clamped"] = (
        "swiglu"
    )
    hidden_dim: int = 1024
    bias: bool = False  # on every projection, including those of experts and their router


@dataclass(frozen=True)
class InitConfig:
    """Standard deviations of the weights; norms start at one, biases and sinks at zero."""

    scheme: Literal["fan_in", "normal"] = "fan_in"  # std = scale / sqrt(inputs), or std = scale
    scale: float = 1.0
    embedding_std: float = 0.02
    residual: Literal["none", "depth", "zero"] = "depth"  # output projections: unscaled, / sqrt(2 L) (GPT-2), or zero


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 0  # entries; 0: the size of the tokenizer, rounded up to a multiple of 128
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
    mup_base_dim: int | None = None  # muP (Yang et al. 2022): width at which the hyperparameters were tuned
    # Dtype of computation. auto: float32 on CPUs, bfloat16 elsewhere.
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    # Values kept for the backward pass: everything; nothing; matmul outputs; those named in `remat_names`; or the named
    # ones, offloaded to the host.
    remat: Literal["none", "full", "dots", "names", "offload"] = "none"
    remat_names: tuple[Literal["attention_out", "mlp_out", "qkv", "mlp_hidden", "expert_in", "expert_out"], ...] = (
        "attention_out",
        "mlp_out",
    )
    scan_unroll: int = 1  # repetitions per step of the scan over layers; 0: all (faster on CPU, slower to compile)

    @property
    def can_generate(self) -> bool:
        """Whether the prediction of a token depends on the tokens before it alone."""
        leaks = self.moe is not None and self.moe.router in NONCAUSAL
        return self.attention.mask != "bidirectional" and not leaks

    def validate(self) -> None:
        """Raise ValueError with the field, its value and a fix if the network cannot be built."""
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
                raise ValueError(f"model.{name} = {count}: far above every published network. Use at most {largest}")
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
                f"{a.num_heads}. Use one of {', '.join(divisors)}"
            )
        if len(a.blocks) != 3 or min(a.blocks) < 1:
            raise ValueError(
                f"model.attention.blocks = {a.blocks}: must be three numbers of at least 1: block size in positions, "
                "local blocks including the query's own, and stride between strided blocks. Try (64, 4, 8)"
            )
        unknown = [kind for kind in a.layers if kind not in ("global", "sliding", "block_sparse") and ":" not in kind]
        if unknown:
            raise ValueError(
                f"model.attention.layers = {unknown[0]!r}: unknown kind. Use global, sliding, block_sparse, or "
                "'package.module:Class' for your own variant"
            )
        if not a.layers:
            raise ValueError("model.attention.layers = (): is empty. Use at least one of global, sliding, block_sparse")
        if a.context_parallel != "gather" and ("block_sparse" in a.layers or a.mask == "prefix"):
            raise ValueError(
                f"model.attention.context_parallel = {a.context_parallel!r}: does not support block_sparse layers or "
                "prefix masks. Use 'gather'"
            )
        if a.context_parallel == "ring" and p.kind == "alibi":
            raise ValueError(
                "model.attention.context_parallel = 'ring': does not support model.position.kind = 'alibi'. Use "
                "'ulysses' or 'gather'"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"model.dropout = {self.dropout}: must be a probability in [0, 1)")
        if not 0.0 < p.rotary_fraction <= 1.0:
            raise ValueError(f"model.position.rotary_fraction = {p.rotary_fraction}: must be a fraction in (0, 1]")
        if p.kind == "rope" and rotary_dim(self) % 2:
            raise ValueError(
                f"model.position.rotary_fraction = {p.rotary_fraction}: rotates {rotary_dim(self)} of model.attention."
                f"head_dim = {a.head_dim} dimensions, but must rotate an even number above 0"
            )
        if p.scaling is not None:
            if p.kind != "rope":
                raise ValueError(
                    f"model.position.scaling = {p.scaling.kind!r}: only RoPE can be scaled, but model.position.kind = "
                    f"{p.kind!r}. Set scaling to none, or the kind to rope"
                )
            p.scaling.validate()
            if p.scaling.kind in ("ntk", "dynamic_ntk") and rotary_dim(self) < 4:
                raise ValueError(
                    f"model.position.scaling.kind = {p.scaling.kind!r}: needs 4 or more rotated dimensions, but model."
                    f"attention.head_dim = {a.head_dim} gives {rotary_dim(self)}"
                )
        if p.kind == "sinusoidal" and self.embed_dim % 2:
            raise ValueError(
                f"model.embed_dim = {self.embed_dim}: must be even for model.position.kind = 'sinusoidal'. Try "
                f"{self.embed_dim + 1}"
            )
        if self.scan_unroll < 0:
            raise ValueError(f"model.scan_unroll = {self.scan_unroll}: must be 1 or more, or 0 for all")
        if self.remat in ("names", "offload") and not self.remat_names:
            raise ValueError(
                f"model.remat_names = (): model.remat = {self.remat!r} keeps the values named here. Name at least one, "
                "or set remat to full"
            )
        if m is not None:
            m.validate(causal=a.mask != "bidirectional")
            if not any(spec.moe for spec in layer_specs(self)):
                raise ValueError(
                    f"model.moe.layers = {m.layers}: leaves no 'moe' layer among the first model.num_layers = "
                    f"{self.num_layers}. Put 'moe' earlier, add layers, or set model.moe to none"
                )


def _refuse_unknown_choices(config, path: str) -> None:
    """Check every Literal field below `config`, also inside tuples, so that a misspelt choice cannot pass for another
    one. Raises ValueError."""
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
                raise ValueError(f"{path}.{name} = {wrong[0]!r}: unknown. Use one of {', '.join(choices)}")


@dataclass(frozen=True)
class LayerSpec:
    """The properties in which layers of one network differ."""

    attention: str = "global"
    moe: bool = False


@dataclass(frozen=True)
class ScanGroup:
    """A run of layers, repeated `repeats` times. The repetitions are stacked and scanned."""

    pattern: tuple[LayerSpec, ...] = field(default_factory=tuple)
    repeats: int = 1


def rotary_dim(config: ModelConfig) -> int:
    """Return the number of dimensions of a head that RoPE rotates."""
    if config.attention.latent is not None:
        return config.attention.latent.rope_dim
    return int(config.attention.head_dim * config.position.rotary_fraction)


def layer_specs(config: ModelConfig) -> list[LayerSpec]:
    """Return the layers from first to last."""
    attention, kinds = config.attention.layers, ("dense",) if config.moe is None else config.moe.layers
    return [
        LayerSpec(attention=attention[i % len(attention)], moe=kinds[i % len(kinds)] == "moe")
        for i in range(config.num_layers)
    ]


def scan_groups(config: ModelConfig) -> tuple[ScanGroup, ...]:
    """Return the layers as few scans: a prefix of single layers, one repeated pattern, and a remainder of single
    layers."""
    specs = layer_specs(config)
    best, shortest = tuple(ScanGroup((spec,), 1) for spec in specs), len(specs)
    for start in range(len(specs)):
        for period in range(1, len(specs) - start + 1):
            if start + period >= shortest:
                break  # a longer pattern cannot make a shorter plan
            pattern = tuple(specs[start : start + period])
            repeats = 1
            while tuple(specs[start + repeats * period : start + (repeats + 1) * period]) == pattern:
                repeats += 1
            rest = specs[start + repeats * period :]
            plan = (
                *(ScanGroup((spec,), 1) for spec in specs[:start]),
                ScanGroup(pattern, repeats),
                *(ScanGroup((spec,), 1) for spec in rest),
            )
            if (length := sum(len(s.pattern) for s in plan)) < shortest:
                best, shortest = plan, length
    return best
