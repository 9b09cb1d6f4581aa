"""Tiny networks of thirteen published families (Llama with two kinds of RoPE): config.json as published, random weights.

The configs were written from published ones and the papers, independently of interop. Weights come from NumPy's
RandomState, whose stream is frozen. Values that a reader could hard-code (an epsilon, a base, a cap) differ from the
usual ones where possible. Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

B, T, V, WINDOW = 2, 24, 96, 7  # a sequence is longer than three windows
FOLDER = Path(__file__).parent / "families"


@dataclass(frozen=True, eq=False)
class Family:
    """A family's test network.

    `config`: config.json. `wrong`: changes of ModelConfig fields (by dotted name) that must change the logits; the
    first ones are in the default tests, the others in slow tests. `gradients`: the reference has every tensor's
    gradient.
    """

    name: str
    config: dict[str, Any]
    wrong: tuple[dict[str, Any], ...] = ()
    gradients: bool = False
    embedding_std: float = 0.05  # small, so that an epsilon matters; larger for tied embeddings, which also predict
    seed: int = field(default=1, kw_only=True)

    @property
    def file(self) -> Path:
        """Return the path of the reference file."""
        return FOLDER / f"{self.name}.npz"


def _llama(name: str, kind: str, **more: Any) -> dict[str, Any]:
    """Return a config.json with the keys that most families share, and `more`."""
    return {
        "architectures": [name], "model_type": kind, "vocab_size": V, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": 1, "eos_token_id": 2, "attention_dropout": 0.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    } | more  # fmt: skip


FAMILIES = (
    Family(
        "gpt2",
        {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": V, "n_positions": 40, "n_ctx": 40,
            "n_embd": 32, "n_layer": 2, "n_head": 4, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-3,
            "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "initializer_range": 0.02, "bos_token_id": 1,
            "eos_token_id": 1, "summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None,
            "summary_proj_to_labels": True, "summary_first_dropout": 0.1,
        },
        ({"norm.epsilon": 1e-5}, {"mlp.kind": "relu"}, {"norm.kind": "rmsnorm"}, {"norm.bias": False}, {"attention.bias": "qkv"},
         {"attention.bias": "none"}, {"mlp.bias": False}, {"position.kind": "none"}),
        embedding_std=0.1,
    ),
    Family(
        "llama",
        _llama("LlamaForCausalLM", "llama", rope_theta=2000.0, rope_scaling=None, attention_bias=False, pretraining_tp=1),
        ({"position.theta": 10_000.0}, {"norm.epsilon": 1e-6}, {"position.interleaved": True}, {"mlp.kind": "geglu"},
         {"attention.query_scale": 0.25}, {"position.rotary_fraction": 0.5}),
        gradients=True,
    ),
    Family(
        "llama3",
        _llama(
            "LlamaForCausalLM", "llama", head_dim=16, rope_theta=5000.0, attention_bias=True, mlp_bias=True,
            tie_word_embeddings=True, rope_scaling={
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
                "rope_type": "llama3",
            },
        ),
        ({"position.scaling": None}, {"position.scaling.beta_fast": 8.0}, {"position.scaling.factor": 4.0},
         {"position.scaling.original_length": 64}, {"position.scaling.beta_slow": 0.5}, {"position.scaling.kind": "linear"},
         {"attention.bias": "qkv"}, {"mlp.bias": False}),
        embedding_std=0.2,
    ),
    Family(
        "mistral",
        _llama(
            "MistralForCausalLM", "mistral", head_dim=16, sliding_window=WINDOW, max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 3000.0},
        ),
        ({"attention.layers": ("global",)}, {"attention.window": WINDOW + 1}, {"attention.window": WINDOW - 1},
         {"position.theta": 10_000.0}, {"norm.epsilon": 1e-6}),
    ),
    Family(
        "qwen2",
        _llama(
            "Qwen2ForCausalLM", "qwen2", num_hidden_layers=3, rope_theta=1e6, use_sliding_window=True,
            sliding_window=WINDOW, max_window_layers=2, tie_word_embeddings=True, rms_norm_eps=1e-4,
        ),
        ({"attention.bias": "none"}, {"attention.layers": ("global",)}, {"attention.layers": ("sliding",)},
         {"position.theta": 10_000.0}, {"norm.epsilon": 1e-6}),
        embedding_std=0.2,
    ),
    Family(
        "qwen3",
        _llama(
            "Qwen3ForCausalLM", "qwen3", head_dim=16, rms_norm_eps=1e-4, attention_bias=False, max_window_layers=2, sliding_window=None,
            use_sliding_window=False, max_position_embeddings=4096,
            rope_parameters={"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 1024},
        ),
        ({"attention.qk_norm": "none"}, {"position.scaling": None}, {"position.scaling.attention_factor": 1.0},
         {"position.scaling.truncate": False}, {"position.scaling.kind": "linear"}, {"norm.epsilon": 1e-6}),
    ),
    Family(
        "mixtral",
        _llama(
            "MixtralForCausalLM", "mixtral", intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, rope_theta=1e6,
            sliding_window=None, output_router_logits=False, router_aux_loss_coef=0.02, router_jitter_noise=0.0,
        ),
        ({"moe.weights": "softmax"}, {"moe.top_k": 3}, {"position.theta": 10_000.0}, {"norm.epsilon": 1e-6}),
        gradients=True,
        seed=4,
    ),
    Family(
        "qwen3_moe",
        _llama(
            "Qwen3MoeForCausalLM", "qwen3_moe", num_hidden_layers=3, head_dim=16, intermediate_size=40,
            moe_intermediate_size=12, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, decoder_sparse_step=1,
            mlp_only_layers=[1], output_router_logits=False, router_aux_loss_coef=0.001, rope_theta=20_000.0,
            rope_scaling=None, attention_bias=False, max_window_layers=3, sliding_window=None, use_sliding_window=False,
        ),
        ({"moe.weights": "softmax"}, {"attention.qk_norm": "none"}, {"moe.top_k": 2}, {"position.theta": 1e6}, {"norm.epsilon": 1e-6}),
        seed=3,
    ),
    Family(
        "olmoe",
        _llama(
            "OlmoeForCausalLM", "olmoe", intermediate_size=12, num_experts=8, num_experts_per_tok=3, norm_topk_prob=False,
            clip_qkv=2.0, output_router_logits=False, router_aux_loss_coef=0.01, attention_bias=False, rope_theta=5000.0,
            rope_scaling=None,
        ),
        ({"attention.clip_qkv": None}, {"moe.weights": "renormalized"}, {"attention.qk_norm": "none"}, {"attention.clip_qkv": 2.5},
         {"moe.top_k": 2}, {"norm.epsilon": 1e-6}),
    ),
    Family(
        "olmo2",
        _llama(
            "Olmo2ForCausalLM", "olmo2", num_key_value_heads=4, attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        ),
        ({"attention.qk_norm": "none"}, {"norm.epsilon": 1e-6}, {"position.theta": 10_000.0}, {"position.interleaved": True}),
    ),
    Family(
        "deepseek_v3",
        _llama(
            "DeepseekV3ForCausalLM", "deepseek_v3", num_hidden_layers=3, num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16,
            qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=1, moe_intermediate_size=12,
            n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, n_group=4, topk_group=2, norm_topk_prob=True,
            routed_scaling_factor=1.8, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1, ep_size=1,
            num_nextn_predict_layers=1, max_position_embeddings=1024, attention_bias=False, rope_theta=100.0,
            aux_loss_alpha=0.001, seq_aux=True,
            rope_scaling={
                "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "beta_fast": 4, "beta_slow": 1,
                "mscale": 1.0, "mscale_all_dim": 0.7,
            },
        ),
        ({"position.interleaved": False}, {"moe.groups": (1, 1)}, {"attention.query_scale": None}, {"moe.scale": 1.0},
         {"position.scaling": None}, {"position.scaling.beta_fast": 32.0}, {"position.scaling.attention_factor": 1.0},
         {"moe.bias_rate": None}, {"moe.weights": "sigmoid"}, {"moe.weights": "renormalized"}, {"moe.shared_experts": 0},
         {"moe.groups": (4, 3)}, {"norm.epsilon": 1e-6}),
        gradients=True,
    ),
    Family(
        "gemma2",
        {
            "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "vocab_size": V, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3, "rope_theta": 3000.0, "attention_bias": False, "attention_dropout": 0.0,
            "query_pre_attn_scalar": 24, "sliding_window": WINDOW, "attn_logit_softcapping": 12.0, "final_logit_softcapping": 4.0,
            "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "cache_implementation": "hybrid", "torch_dtype": "float32",
        },
        ({"attention.softcap": None}, {"norm.unit_offset": False}, {"attention.query_scale": None}, {"final_softcap": None},
         {"attention.softcap": 15.0}, {"embedding_scale": None}, {"norm.epsilon": 1e-6}, {"mlp.kind": "swiglu"},
         {"attention.layers": ("global",)}, {"attention.layers": ("global", "sliding")}, {"attention.window": WINDOW + 1},
         {"position.theta": 10_000.0}),
        embedding_std=0.2,
    ),
    Family(
        "gemma3",
        {
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "vocab_size": V, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
            "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 64, "rms_norm_eps": 1e-3,
            "rope_theta": 50_000.0, "rope_local_base_freq": 2000.0, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "attention_bias": False, "attention_dropout": 0.0, "query_pre_attn_scalar": 24, "sliding_window": WINDOW,
            "sliding_window_pattern": 3, "attn_logit_softcapping": None, "final_logit_softcapping": None, "bos_token_id": 2,
            "eos_token_id": 1, "pad_token_id": 0, "cache_implementation": "hybrid", "torch_dtype": "float32",
        },
        ({"position.local_theta": None}, {"position.scaling": None}, {"attention.qk_norm": "none"}, {"norm.unit_offset": False},
         {"attention.query_scale": None}, {"embedding_scale": None}, {"norm.epsilon": 1e-6}, {"position.theta": 10_000.0},
         {"attention.layers": ("sliding",)}, {"attention.layers": ("sliding", "global")}, {"attention.window": WINDOW - 1}),
        embedding_std=0.2,
    ),
    Family(
        "gpt_oss",
        _llama(
            "GptOssForCausalLM", "gpt_oss", head_dim=16, intermediate_size=24, max_position_embeddings=1024,
            num_local_experts=4, num_experts_per_tok=2,
            experts_per_token=2, attention_bias=True, sliding_window=WINDOW, rope_theta=1500.0, initial_context_length=128,
            layer_types=["sliding_attention", "full_attention"], swiglu_limit=7.0, output_router_logits=False,
            router_aux_loss_coef=0.9, rope_scaling={
                "beta_fast": 4.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 128, "rope_type": "yarn",
                "truncate": False,
            },
        ),
        ({"attention.sinks": False}, {"mlp.kind": "swiglu"}, {"position.scaling.truncate": True}, {"attention.bias": "none"},
         {"attention.bias": "qkv"}, {"mlp.bias": False}, {"moe.weights": "softmax"}, {"position.scaling": None},
         {"position.scaling.beta_fast": 32.0}, {"attention.layers": ("global",)}, {"attention.layers": ("global", "sliding")},
         {"attention.window": WINDOW + 1}, {"norm.epsilon": 1e-6}, {"position.theta": 10_000.0}),
    ),
)  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}


def tokens(family: Family) -> np.ndarray:
    """Return the input tokens, int32 [B, T]."""
    return np.random.RandomState([family.seed, 0]).randint(0, V, (B, T)).astype(np.int32)


def draw(family: Family, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 tensor with this name and shape on disk.

    Matrices are N(0, 1 / inputs). Queries and keys (or their norms) are doubled, so that attention is peaked. Norms,
    biases, sinks and the router's correction are far from their usual initial values, so that wrong options show.
    """
    n = np.random.RandomState([family.seed, zlib.crc32(name.encode())]).standard_normal(shape).astype(np.float32)
    last = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if last in ("embed_tokens", "wte", "wpe"):
        return n * np.float32(family.embedding_std)
    if last == "sinks":
        return n
    if last.endswith("bias"):
        return n * np.float32(0.3)
    if re.search(r"norm|ln_", last):
        scale = 1 + 0.2 * n
        scale = 2 * scale if last in ("q_norm", "k_norm") else scale
        return scale - 1 if "gemma" in family.name else scale
    if family.name == "gpt2" and last in ("c_attn", "c_proj", "c_fc"):  # [inputs, outputs]
        n *= np.float32(shape[0] ** -0.5)
        if last == "c_attn":
            n[:, : 2 * shape[0]] *= 2
        return n
    inputs = shape[-2] if len(shape) == 3 else shape[-1]  # gpt-oss's experts are [E, inputs, outputs]
    times = 1.0
    if last in ("q_proj", "k_proj", "q_b_proj", "kv_a_proj_with_mqa", "gate", "router"):
        times = 2.0
    if last == "gate_up_proj":
        times = 4.0  # so that some values are clamped
    return n * np.float32(times * inputs**-0.5)


@cache
def load(family: Family) -> dict[str, np.ndarray]:
    """Return the reference: `logits` [B, T, V], `loss`, and `d_NAME` for each tensor if it has gradients."""
    with np.load(family.file) as file:
        return {name: value for name, value in file.items() if name != "tensors"}


@cache
def shapes(family: Family) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that transformers' save_pretrained writes."""
    with np.load(family.file) as file:
        return {name: tuple(shape) for name, shape in json.loads(file["tensors"].tobytes()).items()}


def write_folder(family: Family, folder: Path, named: dict[str, tuple[int, ...]] | None = None) -> Path:
    """Write the published folder: config.json and two shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(family.config, indent=2))
    tensors = {name: draw(family, name, shape) for name, shape in sorted((named or shapes(family)).items())}
    index: dict[str, Any] = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": {}}
    names = list(tensors)
    for i, mine in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in mine}, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
