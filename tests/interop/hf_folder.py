"""A tiny Llama as a folder, written by the safetensors library."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

V, D, F, HEADS, KEYS, H, LAYERS = 96, 32, 48, 4, 2, 8, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "head_dim": H,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tensors(dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Return all tensors of the network by their published names."""
    shapes = {EMBEDDING: (V, D), "model.norm.weight": (D,), HEAD: (V, D)}
    for i in range(LAYERS):
        layer = {
            "self_attn.q_proj": (HEADS * H, D), "self_attn.k_proj": (KEYS * H, D), "self_attn.v_proj": (KEYS * H, D),
            "self_attn.o_proj": (D, HEADS * H), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
            "input_layernorm": (D,), "post_attention_layernorm": (D,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def write(
    folder: Path, held: dict[str, np.ndarray] | None = None, *, shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """Write `held` in one file, or in several with an index, and CONFIG with the changes `config`."""
    held = tensors() if held is None else held
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    if shards == 1:
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = dict(list(held.items())[i::shards])
        save_file(mine, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(mine, name)
    write_index(folder, places, sum(x.nbytes for x in held.values()))
    return folder


def write_index(folder: Path, places: dict[str, str], total_size: int) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
