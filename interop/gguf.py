"""Read GGUF files of Llama's architecture (llama.cpp: LLM_ARCH_LLAMA) as if from a Hugging Face folder.

llama.cpp rotates pairs (2i, 2i+1) of a head where Hugging Face rotates (i, i + half), so its converter reorders the
rows of queries and keys; this reader restores them. The vector rope_freqs.weight is Llama 3's RoPE scaling, evaluated.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from interop.gguf_file import GGUFFile
from interop.load import ModelFilesError, TensorInfo
from interop.translate import Keys, UnsupportedModelError
from model.config import RopeScalingConfig
from model.positions import inverse_frequencies

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FACTORS = "rope_freqs.weight"
# Keys below llama.* that do not affect a dense Llama.
_IGNORED_KEYS = ("tensor_data_layout", "rope.scaling.finetuned", "pooling_type", "attention.layer_norm_epsilon")


class GGUFSource:
    """The tensors under Hugging Face's names, with rows of queries and keys in Hugging Face's order.

    Reading decodes a quantized tensor to float32 and needs a few megabytes besides it. Other tensors are views of the
    file, except for queries and keys, which are copied.
    """

    def __init__(self, file: GGUFFile, num_heads: int, num_kv_heads: int):
        self._file = file
        self._heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
        self._theirs = {published_name(name): name for name in file.tensors if name != _FACTORS}
        self.tensors = {
            ours: TensorInfo(file.tensors[name].shape, file.tensors[name].dtype.name, str(file.path))
            for ours, name in self._theirs.items()
        }

    def read(self, name: str) -> np.ndarray:
        """Return the tensor, as float32 if it is quantized in the file."""
        theirs = self._theirs[name]
        heads = self._heads.get(theirs.split(".")[-2])
        rows = None if heads is None else unpermuted(self.tensors[name].shape[0], heads)
        if rows is None or len(self.tensors[name].shape) > 1:
            return self._file.array(theirs, rows)
        biases = self._file.array(theirs)
        ordered = np.empty_like(biases)
        ordered[rows] = biases
        return ordered

    def release(self) -> None:
        """Release the pages of the file."""
        self._file.release()


def open_gguf(path: str | Path) -> tuple[dict[str, Any], GGUFSource]:
    """Return (config.json that a Hugging Face folder of this model would hold, its tensors), reading only the header.

    Raises UnsupportedModelError if the model is not a dense Llama and ModelFilesError if the file is damaged.
    """
    file = GGUFFile(Path(path))
    keys = Keys({key: _common_value(str(path), key, value) for key, value in file.metadata.items()}, str(path))
    if keys.take("split.count", 1) > 1:
        raise UnsupportedModelError(
            f"{path}: is one of {file.metadata['split.count']} parts. Merge them with llama-gguf-split --merge"
        )
    keys.must("general.type", "model", default="model")
    keys.must("general.quantization_version", 2, default=2)
    keys.must("general.architecture", "llama")
    values = _config(keys, file)
    left = [
        key for key in file.metadata if key.startswith("llama.") and key in keys.left() and key[6:] not in _IGNORED_KEYS
    ]
    if left:
        raise UnsupportedModelError(
            f"{path}: {', '.join(f'{key} = {file.metadata[key]!r}' for key in left)}: not supported by this reader. "
            f"Use the model's safetensors release"
        )
    return values, GGUFSource(file, values["num_attention_heads"], values["num_key_value_heads"])


def published_name(name: str) -> str:
    """Return Hugging Face's name of a tensor: 'blk.3.attn_q.weight' -> 'model.layers.3.self_attn.q_proj.weight'.

    An unknown name is returned unchanged.
    """
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{int(match[1])}."
    return f"{layer}{_NAMES[match[2]]}.{match[3]}"


def unpermuted(rows: int, heads: int) -> np.ndarray:
    """Return int [rows]: the index in Hugging Face's order of each row of llama.cpp's q or k."""
    if rows % (2 * heads):
        raise ModelFilesError(
            f"attn_q or attn_k has {rows} rows, which are not {heads} heads of even size. The file is damaged. "
            "Download it again"
        )
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()


def _common_value(where: str, key: str, value: Any) -> Any:
    """Return the common value of a key that lists one value per layer. Raises UnsupportedModelError if they differ."""
    if not (isinstance(value, list) and key.startswith("llama.")):
        return value
    if len(set(value)) != 1:
        raise UnsupportedModelError(f"{where}: {key} differs between layers ({value[:4]} ...): not supported")
    return value[0]


def _config(keys: Keys, file: GGUFFile) -> dict[str, Any]:
    """Return config.json for the metadata."""
    if keys.take("llama.expert_count", 0) or keys.take("llama.expert_used_count", 0):
        raise UnsupportedModelError(
            f"{keys.where}: llama.expert_count = {file.metadata.get('llama.expert_count')}: GGUF files with mixtures "
            "of experts are not supported. Use the model's safetensors release"
        )
    keys.must("llama.attention.causal", True, default=True)
    keys.must("llama.use_parallel_residual", False, default=False)
    for key in ("attention.sliding_window", "attention.max_alibi_bias", "attention.clamp_kqv", "attention.scale"):
        keys.must(f"llama.{key}", 0, default=0)
    for key in ("logit_scale", "residual_scale", "embedding_scale"):
        keys.must(f"llama.{key}", 0, 1, default=0)
    width, heads = keys.count("llama.embedding_length"), keys.count("llama.attention.head_count")
    if "token_embd.weight" not in file.tensors:
        raise ModelFilesError(
            f"{keys.where}: token_embd.weight is missing. The file is damaged or does not hold a language model"
        )
    vocab = file.tensors["token_embd.weight"].shape[0]
    tokens = keys.take("tokenizer.ggml.tokens", None)
    for what, size in (
        ("llama.vocab_size", keys.take("llama.vocab_size", vocab)),
        ("tokenizer.ggml.tokens", len(tokens or []) or vocab),
    ):
        if size != vocab:
            raise ModelFilesError(
                f"{keys.where}: {what} has {size} tokens, but token_embd.weight has {vocab} rows. Get a consistent file"
            )
    head_dim = keys.count("llama.attention.key_length", width // heads)
    keys.must("llama.attention.value_length", head_dim, default=head_dim)
    keys.must("llama.rope.dimension_count", head_dim, default=head_dim)
    theta, length = keys.take("llama.rope.freq_base", 10_000.0), keys.count("llama.context_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": keys.count("llama.block_count"),
        "max_position_embeddings": length,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.count("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "attention_bias": any(name.startswith("blk.") and name.endswith("attn_q.bias") for name in file.tensors),
        "mlp_bias": any(name.startswith("blk.") and name.endswith("ffn_up.bias") for name in file.tensors),
        "hidden_act": "silu",
        "rms_norm_eps": _short(keys.number("llama.attention.layer_norm_rms_epsilon")),
        "intermediate_size": keys.count("llama.feed_forward_length"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(keys, file, head_dim, theta, length),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }


def _short(value: float | np.floating) -> float:
    """Return the shortest decimal of a float32 in the metadata: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(keys: Keys, file: GGUFFile, dim: int, theta: float, length: int) -> dict[str, Any] | None:
    prefix = "llama.rope.scaling."
    kind = keys.must(f"{prefix}type", "none", "linear", "yarn", default="none")
    old = _short(keys.take("llama.rope.scale_linear", 1.0))
    factor = _short(keys.take(f"{prefix}factor", old))
    if kind == "none" and old != 1:
        kind = "linear"
    original = keys.take(f"{prefix}original_context_length", length)
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        keys.must(f"{prefix}{key}", 1.0, default=1.0)
    keys.must(f"{prefix}yarn_log_multiplier", 0.0, default=0.0)
    fast, slow = (
        _short(keys.take(f"{prefix}yarn_beta_{end}", value)) for end, value in (("fast", 32.0), ("slow", 1.0))
    )
    if _FACTORS in file.tensors:
        if kind != "none":
            raise UnsupportedModelError(
                f"{keys.where}: {prefix}type = {kind!r}: not supported together with the tensor {_FACTORS}"
            )
        return _llama3(keys.where, file.array(_FACTORS), dim, theta)
    if kind == "none" or factor in (0, 1):
        return None
    scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
    return scaling | ({"beta_fast": fast, "beta_slow": slow} if kind == "yarn" else {})


def _llama3(where: str, divisors: np.ndarray, dim: int, theta: float) -> dict[str, Any] | None:
    """Return the llama3 scaling that has these frequency divisors, or None if all are 1.

    The file holds only the divisors. The factor is the last one, and original lengths of powers of two are tried for
    the ramp between wavelengths original / 4 and original / 1. Raises UnsupportedModelError if none fits.
    """
    if divisors.shape != (dim // 2,):
        raise ModelFilesError(
            f"{where}: {_FACTORS} has shape {list(divisors.shape)}, but heads of {dim} need [{dim // 2}]"
        )
    if (divisors == 1).all():
        return None
    factor, plain = _short(divisors[-1]), inverse_frequencies(dim, theta, None)
    for original in (8192, *(1 << power for power in range(9, 21))):
        if math.isfinite(factor) and factor > 1:
            scaled = inverse_frequencies(dim, theta, RopeScalingConfig("llama3", factor, original))
            if np.allclose(plain / scaled, divisors, rtol=1e-5, atol=0):
                return {
                    "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                }  # fmt: skip
    raise UnsupportedModelError(
        f"{where}: {_FACTORS} ({divisors[0]:g} ... {divisors[-1]:g}) is not Llama 3's RoPE scaling, the only one "
        "supported in this form. Use the model's safetensors release"
    )
